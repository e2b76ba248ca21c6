"""Markers: what a finished warm-up leaves in the cache, so that a restart need not ask again.

A marker lists the targets of a launch, the kernels of each, and sizes and checksums that prove that those are still in
the cache. It lies in a directory named after the identity. So a marker of another GPU, DeepGEMM or compiler is not
found.
"""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang_warmstart.base import files
from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache, KernelFile
from sglang_warmstart.deepgemm.dialects import UnknownJitError
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import KernelUse, Target

FORMAT = 2

# After this a marker is written without its lock. At worst a target that another rank adds now is lost, and is recorded
# once more at the next start.
LOCK_S = 10.0

Launch = dict[str, str]


class TargetKernels(msgspec.Struct, frozen=True):
    """A target and its kernels, by ascending M.

    Args:
        flags: the compiler's flags, each line of them that these kernels were compiled with. The cache does not keep
            them, and without them nobody else can compile the kernels.
    """

    target: Target
    kernels: tuple[KernelUse, ...]
    flags: tuple[str, ...] = ()


class FurtherKernel(msgspec.Struct, frozen=True, order=True):
    """A kernel that belongs to no target (:mod:`.further`).

    Args:
        flags: the compiler's.
    """

    directory: str
    flags: str


def name_of(launch: Launch) -> str:
    """The name of the marker of a launch, without its suffix."""
    return hashlib.sha256(msgspec.json.encode(launch, order="deterministic")).hexdigest()[:16]


def targets_kernels(target: Target, kernels: Iterable[RecordedKernel]) -> TargetKernels:
    """A target with what was recorded for it."""
    recorded = list(kernels)
    uses = sorted(KernelUse(kernel.m, kernel.directory) for kernel in recorded)
    return TargetKernels(target, tuple(uses), tuple(sorted({kernel.flags for kernel in recorded})))


class Marker(msgspec.Struct, frozen=True):
    """A completion marker.

    Args:
        identity: what the kernels were compiled with and for.
        launch: what a rank of a server was started with, as far as it decides which targets there are.
        targets: with the kernels of each.
        files: of all those kernels.
        further: kernels that belong to no target.
        searched: whether somebody has looked for all targets of the launch. Without, some are not known: those of mHC
            are asked for before any dry forward.
    """

    format: int
    identity: Identity
    launch: Launch
    targets: tuple[TargetKernels, ...]
    files: tuple[KernelFile, ...]
    further: tuple[FurtherKernel, ...] = ()
    searched: bool = False

    @property
    def of_targets(self) -> set[str]:
        """The names of the targets' kernels."""
        return {use.directory for each in self.targets for use in each.kernels}


class MarkerError(QuotingError):
    """A marker that cannot be used; says why."""


@dataclass(frozen=True)
class Markers:
    """The markers of one identity in a cache."""

    cache: KernelCache
    identity: Identity

    @property
    def directory(self) -> Path:
        """Where they are written."""
        return self._directories[0]

    @property
    def _directories(self) -> list[Path]:
        return [own / "markers" / self.identity.digest for own in self.cache.all_own]

    def path(self, launch: Launch) -> Path:
        """The marker of a launch, or where it is to be written. One of our own root comes first."""
        paths = [directory / f"{name_of(launch)}.json" for directory in self._directories]
        return next(filter(Path.is_file, paths), paths[0])

    def load(self, launch: Launch) -> Marker | None:
        """The marker of a launch, all of whose targets' kernels are in the cache as they were. None if there is none.

        A further kernel may be gone: whoever calls it compiles it again.

        Raises:
            MarkerError: it is there and cannot be used. It has been set aside, and broken kernels too.
            OSError: it cannot be told, now.
        """
        path = self.path(launch)
        try:
            marker = self._read(path)
        except FileNotFoundError:
            return None
        except MarkerError as error:
            raise MarkerError(f"{error}; it is set aside as {_aside(path)}") from error
        if marker.launch != launch:
            raise MarkerError(f"{path}: of another launch; it is set aside as {_aside(path)}")
        of_targets = marker.of_targets
        defects = self._defects(file for file in marker.files if file.directory in of_targets)
        # What is broken of the others is moved out of the way too.
        self._defects(file for file in marker.files if file.directory not in of_targets)
        if defects:
            raise MarkerError(f"{path}: {defects[0]}{_and_more(defects)}; it is set aside as {_aside(path)}")
        return marker

    def find(self, target: Target) -> TargetKernels | None:
        """A target by any marker, if all its kernels are in the cache as they were."""
        for marker in self.all():
            for known in marker.targets:
                wanted = {use.directory for use in known.kernels}
                files = [file for file in marker.files if file.directory in wanted]
                with suppress(OSError):
                    if known.target == target and not self._defects(files):
                        return known
        return None

    def all(self) -> Iterator[Marker]:
        """The markers that can be read. Whether their kernels are still there is not looked at."""
        for directory in self._directories:
            try:
                paths = sorted(directory.glob("*.json"))
            except OSError:
                continue
            for path in paths:
                try:
                    yield self._read(path)
                except (OSError, MarkerError):
                    continue

    def add(
        self,
        launch: Launch,
        finished: Iterable[TargetKernels],
        further: Iterable[FurtherKernel] = (),
        *,
        if_there: bool = False,
        searched: bool = False,
    ) -> bool:
        """Add targets, maybe none, to the marker of a launch. Those that it has are replaced.

        Args:
            further: kernels of no target, which are added too.
            if_there: leave it if there is none. A marker without targets would say that the launch has none.
            searched: all targets of the launch are known now.

        Returns:
            Whether there is one now.

        Raises:
            OSError: the cache cannot be written, or a target's kernel is not there.
        """
        path = self.path(launch)
        with self.cache.locks.held(f"marker-{path.parent.name}-{path.stem}", LOCK_S):
            known: dict[Target, TargetKernels] = {}
            others: dict[str, FurtherKernel] = {}
            try:
                before = self._read(path)
                known = {each.target: each for each in before.targets}
                others = {each.directory: each for each in before.further}
                searched |= before.searched
            except (FileNotFoundError, MarkerError):
                if if_there:
                    return False
            known |= {each.target: each for each in finished}
            others |= {each.directory: each for each in further}
            others = {name: each for name, each in others.items() if self.cache.has(name)}
            directories = {use.directory for each in known.values() for use in each.kernels} | others.keys()
            marker = Marker(
                format=FORMAT,
                identity=self.identity,
                launch=launch,
                targets=tuple(known[target] for target in sorted(known)),
                files=tuple(self.cache.describe(directory) for directory in sorted(directories)),
                further=tuple(others[name] for name in sorted(others)),
                searched=searched,
            )
            path = self.directory / path.name
            files.write_atomically(path, msgspec.json.format(msgspec.json.encode(marker, order="sorted"), indent=1))
        files.remove_left_behind(self.cache.scratch, path)
        return True

    def _read(self, path: Path) -> Marker:
        data = path.read_bytes()
        try:
            marker = msgspec.json.decode(data, type=Marker)
            if marker.format != FORMAT:
                raise MarkerError(f"{path}: of format {marker.format}, expected {FORMAT}")
            if marker.identity.digest != self.identity.digest:
                raise MarkerError(f"{path}: of another GPU, DeepGEMM, compiler or setting")
            for file in marker.files:
                self.cache.dialect.kernel_name(file.directory)  # else it is no name, and may be a path to elsewhere
        except (ValueError, OverflowError, RecursionError, UnknownJitError) as error:
            raise MarkerError(f"{path}: damaged: {error}") from error
        named = marker.of_targets | {each.directory for each in marker.further}
        if named != {file.directory for file in marker.files}:
            raise MarkerError(f"{path}: damaged: its targets and its files do not agree")
        return marker

    def _defects(self, files: Iterable[KernelFile]) -> list[str]:
        defects = []
        for file in files:
            what = self._defect(file)
            if what is None:
                continue
            if os.path.exists(self.cache.path(file.directory)):  # noqa: PTH110  (Path.exists does raise)
                defects.append(f"{file.directory} is not what it was ({what})")
                # Half a kernel stays: it may be filled just now, and is completed by whoever compiles it.
                if self.cache.has(file.directory) and not self._is_known(file.directory):
                    self._set_aside(file.directory)
            else:
                defects.append(f"{file.directory} is not in the cache")
        return defects

    def _defect(self, file: KernelFile) -> str | None:
        try:
            found = self.cache.describe(file.directory)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise  # it is this host's view that is old, and not the kernel
            return "no cubin"
        if found.size != file.size:
            return f"{found.size} of {file.size} bytes"
        if found != file:
            return "changed"
        return None if self.cache.has(file.directory) else "no source"

    def _is_known(self, directory: str) -> bool:
        """Whether another marker knows a kernel as it is now: it was compiled, or restored, once more."""
        try:
            found = self.cache.describe(directory)
        except OSError:
            return False
        return any(found in marker.files for marker in self.all())

    def _set_aside(self, directory: str) -> None:
        # A cubin that is not what it was must not be loaded; where it cannot be moved, DeepGEMM will say so itself.
        try:
            self.cache.set_aside(directory)
        except CacheError:
            return


def _aside(path: Path) -> str:
    aside = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.set-aside")
    try:
        path.replace(aside)
    except OSError as error:
        return f"nothing ({error.strerror})"
    return aside.name


def _and_more(defects: list[str]) -> str:
    return f" and {len(defects) - 1} more" if len(defects) > 1 else ""
