"""Process groups of one rank that is alone: they know their sizes, and nothing is sent.

SGLang makes its groups itself, and so decides who is in them. Only the class of a group and what it asks of torch's
``distributed`` are stood in for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Group:
    """A group of ranks, seen from one of them. Whatever is sent arrives as if all ranks had the same.

    Source: ``GroupCoordinator`` in ``distributed/parallel_state.py`` of SGLang.
    """

    rank_in_world = 0
    use_symmetric_memory = False
    pynccl_comm = ca_comm = qr_comm = pymscclpp_comm = torch_symm_mem_comm = None
    device_group = cpu_group = mq_broadcaster = None

    def __init__(self, group_ranks: list[list[int]], local_rank: int, *_: Any, **named: Any) -> None:
        self.rank, self.local_rank = Group.rank_in_world, local_rank
        self.ranks = next(ranks for ranks in group_ranks if self.rank in ranks)
        self.world_size, self.rank_in_group = len(self.ranks), self.ranks.index(self.rank)
        self.unique_name = str(named.get("group_name"))
        self.device = torch.device("cuda", 0)

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    def all_reduce(self, input_: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return input_

    def broadcast(self, input_: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return input_

    def broadcast_object(self, obj: Any = None, *_: Any, **__: Any) -> Any:
        return obj

    def all_gather(self, input_: torch.Tensor, dim: int = -1, *_: Any, **__: Any) -> torch.Tensor:
        return torch.cat([input_] * self.world_size, dim=dim)

    def barrier(self) -> None: ...

    @contextmanager
    def graph_capture(self, *_: Any, **__: Any) -> Iterator[None]:
        yield


def stand_alone(rank: int, world_size: int) -> None:
    """Let SGLang make its groups for this rank of a server, of which no other is there."""
    from sglang.srt.distributed import parallel_state

    Group.rank_in_world = rank
    parallel_state.GroupCoordinator = Group
    distributed = torch.distributed
    distributed.is_initialized = lambda: True
    distributed.get_rank = lambda *_: rank
    distributed.get_world_size = lambda *_: world_size
    distributed.get_backend = lambda *_: "nccl"
    for name in ("init_process_group", "barrier", "all_reduce", "broadcast", "broadcast_object_list"):
        setattr(distributed, name, lambda *_, **__: None)
