"""Have the ranks of a group agree, without a collective.

A rank may take no part: its node has not the plugin, or another environment, or its hook has failed. In a collective
the others would wait for it until NCCL ends them. Here they wait with a bound, and all come to the same answer whoever
is late: the first proposal stands, by the compare-and-set of the store that the process group was made with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A rank joins before it loads its weights, and those of a group do so at the same time.
JOIN_S = 10.0
# From then on it may take this much longer than the others: its disk may be slower. SGLang would wait for it too.
VOTE_S = 600.0

_TRY_AGAIN_S = 0.02


@dataclass
class Votes:
    """What this process says and hears.

    Args:
        name: of what the votes are for; it is the same on all ranks.
    """

    name: str
    _store: Any = None
    _rank: int = -1
    # An elastic server puts a new process in the place of a rank. The others do not vote with it.
    _is_first: bool = False

    def join(self) -> None:
        """Say that this rank takes part. To be called before weights are loaded; a second call does nothing.

        Raises:
            ValueError: there is no process group.
            RuntimeError: its store is gone.
        """
        import torch
        from torch.distributed.distributed_c10d import _get_default_store

        if self._store is None:
            store, self._rank = _get_default_store(), torch.distributed.get_rank()
            self._is_first = store.add(self._key("joined", self._rank), 1) == 1
            self._store = store

    def leave(self, ranks: Sequence[int]) -> None:
        """Say that this rank does not vote with others any more, in whatever matter.

        Raises:
            RuntimeError: the store is gone.
        """
        if self._store is not None:
            self._store.set(self._key(_group(ranks), "left"), "")

    def least(self, ranks: Sequence[int], matter: str, mine: int, absent: int) -> int:
        """The least of what ranks say in a matter.

        Args:
            ranks: of the whole server, the same sequence on each of them.
            matter: is voted on once.
            mine: what this one says.
            absent: the answer where one of them does not take part, or says nothing.

        Returns:
            The same on all ranks.

        Raises:
            RuntimeError: the store is gone, and with it the rank that has it.
        """
        if len(ranks) == 1:
            return mine
        if self._store is None or not self._is_first:
            return absent
        matter = f"{_group(ranks)}/{matter}"
        self._store.set(self._key(matter, self._rank), str(mine))
        # Whoever says no need not hear the others.
        answer = self._heard(matter, ranks) if mine > absent else absent
        # Another rank may have come to another end of its wait, and was first.
        proposal = str(absent if answer is None else answer)
        return int(self._store.compare_set(self._key(matter, "answer"), "", proposal))

    def _heard(self, matter: str, ranks: Sequence[int]) -> int | None:
        """The least that was said; None where not all have spoken, or another rank has the answer."""
        start = time.monotonic()
        joined = [self._key("joined", rank) for rank in ranks]
        said = [self._key(matter, rank) for rank in ranks]
        over = [self._key(matter, "answer"), self._key(_group(ranks), "left")]
        while not self._store.check(said):
            limit_s = VOTE_S if self._store.check(joined) else JOIN_S
            if time.monotonic() - start > limit_s or any(self._store.check([key]) for key in over):
                return None
            time.sleep(_TRY_AGAIN_S)
        return min(int(self._store.get(key)) for key in said)

    def _key(self, matter: str, whose: object) -> str:
        return f"warmstart/{self.name}/{matter}/{whose}"


def _group(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}+{len(ranks)}"
