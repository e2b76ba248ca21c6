"""The state of each target, in one place.

A target is *met* when a call has it or a rank has announced it, *recorded* when its kernels have names and sources,
*compiled* when they are in the cache, and *loaded* when they are in this process. Or it is *left*, with a reason. The
service of a node has one ledger per cache, by target. A rank has one by SGLang's key of a GEMM, because it meets the
key before it knows the whole target.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sglang_warmstart.deepgemm.marker import TargetKernels
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel

State = Literal["met", "recorded", "compiled", "loaded", "left"]

K = TypeVar("K", bound=Hashable)


@dataclass
class Entry:
    """One target.

    Args:
        state: how far it has come.
        kernels: its kernels, once they are known.
        recorded: the same with their sources, if they were recorded here.
        reason: why it was left.
        no_context: it was left for want of a CUDA context.
    """

    state: State = "met"
    kernels: TargetKernels | None = None
    recorded: tuple[RecordedKernel, ...] = ()
    reason: str = ""
    no_context: bool = False


class Ledger(Generic[K]):
    """The targets of a process, by K."""

    def __init__(self) -> None:
        # Of those nothing is left to do. Every call of a GEMM looks into it, and at nothing else of ours.
        self.done: set[K] = set()
        self._entries: dict[K, Entry] = {}

    def __getitem__(self, key: K) -> Entry:
        """The entry of a target, which is met if it was not before."""
        return self._entries.setdefault(key, Entry())

    def leave(self, key: K, reason: str, *, no_context: bool = False) -> Entry:
        """A target cannot be warmed. It is not done: SGLang may warm it, or it is tried again."""
        self._entries[key] = Entry("left", reason=reason, no_context=no_context)
        return self._entries[key]

    def is_left(self, key: K) -> bool:
        """Whether a target was left, and somebody else has yet to see to it."""
        entry = self._entries.get(key)
        return entry is not None and entry.state == "left" and key not in self.done

    def clear(self) -> None:
        """As in a process that has just been started."""
        self.done.clear()
        self._entries.clear()
