"""Keep the targets of a rank: in a marker for the next start, or in a plan for any machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from sglang_warmstart.base import files
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Identity, distribution_of, headers_hash
from sglang_warmstart.deepgemm.ledger import Entry
from sglang_warmstart.deepgemm.marker import FurtherKernel, Launch, Marker, Markers, TargetKernels
from sglang_warmstart.deepgemm.plan import Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target


class Sink(Protocol):
    """Keeps the targets of one rank.

    Args:
        compiles: whether the kernels are to be compiled, or recorded alone.
        complaint: what it means that it cannot be written.
    """

    compiles: bool
    complaint: str

    def earlier(self) -> Marker | None:
        """What an earlier start has left of this launch; None if nothing.

        Raises:
            MarkerError, OSError: what was left cannot be used.
        """

    def find(self, target: Target) -> TargetKernels | None:
        """A target that any earlier start has left."""

    def keep(self, finished: Sequence[Entry], searched: bool, if_there: bool = False) -> None:
        """Add targets that are done, maybe none.

        Args:
            searched: there are no others.
            if_there: only if an earlier start has left something.

        Raises:
            OSError: they cannot be written.
        """

    def further(self, kernels: Sequence[RecordedKernel]) -> bool:
        """Add kernels of no target (:mod:`.further`). Returns whether that is done with, or to be tried again.

        Raises:
            OSError: they cannot be written.
        """

    def leave(self, target: str, reason: str) -> None:
        """Say why a target is not among them.

        Raises:
            OSError: that cannot be written.
        """


@dataclass(frozen=True)
class LaunchMarker:
    """The marker of a launch, and what all markers of its identity know."""

    markers: Markers
    launch: Launch
    compiles = True
    complaint = "no marker is left for the next start"

    def earlier(self) -> Marker | None:
        """See :class:`Sink`."""
        return self.markers.load(self.launch)

    def find(self, target: Target) -> TargetKernels | None:
        """See :class:`Sink`."""
        return self.markers.find(target)

    def keep(self, finished: Sequence[Entry], searched: bool, if_there: bool = False) -> None:
        """See :class:`Sink`."""
        if if_there and not self.markers.path(self.launch).is_file():
            return
        kernels = [each.kernels for each in finished if each.kernels is not None]
        self.markers.add(self.launch, kernels, if_there=if_there, searched=searched)

    def further(self, kernels: Sequence[RecordedKernel]) -> bool:
        """See :class:`Sink`. They wait for the targets."""
        found = [FurtherKernel(each.directory, each.flags) for each in kernels]
        return self.markers.add(self.launch, (), found, if_there=True)

    def leave(self, target: str, reason: str) -> None:
        """A marker does not say it: the next start tries again."""


class RankPlan:
    """What was recorded for a rank, and what could not be, in a file that is whole at any time.

    Args:
        path: of the file.
        identity: what the rank compiles with.
        launch: what decides which targets it has.
    """

    compiles = False
    complaint = "the plan cannot be written"

    def __init__(self, path: Path, identity: Identity, launch: Launch) -> None:
        self._path, self._identity, self._launch = path, identity, launch
        self._lock = threading.Lock()
        self._kept: dict[Target, Entry] = {}
        self._left_out: dict[str, str] = {}
        self._searched = False

    def earlier(self) -> Marker | None:
        """A plan is made anew."""
        return None

    def find(self, target: Target) -> TargetKernels | None:
        """A marker has no sources."""
        return None

    def keep(self, finished: Sequence[Entry], searched: bool, if_there: bool = False) -> None:
        """See :class:`Sink`."""
        with self._lock:
            self._searched |= searched
            for entry in finished:
                assert entry.kernels is not None
                self._kept[entry.kernels.target] = entry
                self._left_out.pop(str(entry.kernels.target), None)
            self._write()

    def further(self, kernels: Sequence[RecordedKernel]) -> bool:
        """``record`` itself takes them from the cache, once the server has ended."""
        return True

    def leave(self, target: str, reason: str) -> None:
        """See :class:`Sink`."""
        with self._lock:
            self._left_out[target] = reason
            self._write()

    @cached_property
    def _tools(self) -> tuple[str, str]:
        deep_gemm = Path(self._identity.installed_in)
        return distribution_of(deep_gemm), headers_hash(deep_gemm)

    def _write(self) -> None:
        planner = Planner(self._identity, *self._tools)
        planner.add(
            self._identity,
            self._launch,
            ((target, list(entry.recorded)) for target, entry in self._kept.items()),
            searched=self._searched,
        )
        for target, reason in self._left_out.items():
            planner.leave_out(target, reason)
        files.write_atomically(self._path, plans.encode(planner.plan()))
