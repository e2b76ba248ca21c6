"""The plan of one rank, in a file that grows with what is recorded for it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Identity, distribution_of, headers_hash
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.deepgemm.plan import Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target


class RankPlan:
    """What was recorded for a rank, and what could not be.

    Args:
        path: the file, which is whole at any time.
        identity: what the rank compiles with.
        launch: what decides which targets it has.
    """

    def __init__(self, path: Path, identity: Identity, launch: Launch) -> None:
        self._path, self._identity, self._launch = path, identity, launch
        self._targets: dict[Target, list[RecordedKernel]] = {}
        self._left_out: dict[str, str] = {}

    def add(self, target: Target, kernels: list[RecordedKernel]) -> None:
        """Add a target and its kernels."""
        self._targets[target] = kernels
        self._left_out.pop(str(target), None)

    def leave_out(self, target: str, reason: str) -> None:
        """Say why a target is not in it."""
        self._left_out[target] = reason

    @cached_property
    def _tools(self) -> tuple[str, str]:
        deep_gemm = Path(self._identity.installed_in)
        return distribution_of(deep_gemm), headers_hash(deep_gemm)

    def write(self) -> None:
        """Write the file anew.

        Raises:
            OSError: it cannot be written.
        """
        planner = Planner(self._identity, *self._tools)
        planner.add(self._identity, self._launch, self._targets.items())
        for target, reason in self._left_out.items():
            planner.leave_out(target, reason)
        write_atomically(self._path, plans.encode(planner.plan()))
