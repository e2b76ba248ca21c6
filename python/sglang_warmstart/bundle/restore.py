"""Restore the contents of a bundle into the caches of this node.

A kernel's name in DeepGEMM's cache depends on where DeepGEMM is installed. A bundle has its kernels without such names.
Here they get their names, and the markers that let a server start without asking the service for kernels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sglang_warmstart.base import trust
from sglang_warmstart.base.errors import printable
from sglang_warmstart.base.files import remove_left_behind, write_atomically
from sglang_warmstart.bundle import archive, entries
from sglang_warmstart.bundle.manifest import BundleError, Manifest
from sglang_warmstart.bundle.signature import PublicKey
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache, KernelFile
from sglang_warmstart.deepgemm.compiler import Compiler, CompilerError
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN
from sglang_warmstart.deepgemm.identity import build_hash, distribution_of
from sglang_warmstart.deepgemm.marker import Launch, Markers, TargetKernels
from sglang_warmstart.deepgemm.plan import Plan, PlannedLaunch
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlanError
from sglang_warmstart.libraries.cached import CachedFile
from sglang_warmstart.libraries.table import LIBRARIES

# Publishing waits for the disk, mostly.
_THREADS = 8
# In the key of a marker that no server's launch has: what it knows is known, and the launch is not taken for warmed.
_PARTIAL = {"from a bundle": "not all targets"}


@dataclass(frozen=True)
class Place:
    """Where a bundle is unpacked.

    Args:
        cache: root of DeepGEMM's cache.
        deep_gemm: the directory of the package as the server will see it. It need not be there yet.
        environment: the server's. It says where its compiler is (where none is found, it is taken to be the plan's),
            and where the caches of other libraries are.
    """

    cache: Path
    deep_gemm: Path
    environment: Mapping[str, str]


@dataclass
class Restored:
    """What came of it.

    Args:
        kernels, kept: kernels that were published; those that were there.
        targets: that markers name now, of all ranks together.
        launches: ranks all of whose targets are among them.
        libraries: files that were published and that were kept, by library.
        builds: plans of what other libraries compile.
        notes: what was left out, and why.
        seconds: from beginning to end.
    """

    kernels: int = 0
    kept: int = 0
    targets: int = 0
    launches: int = 0
    libraries: dict[str, tuple[int, int]] = field(default_factory=dict)
    builds: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def in_words(self) -> str:
        """What came of unpacking a bundle, in one line."""
        kept = f" ({self.kept} were there)" if self.kept else ""
        others = "".join(
            f", {new} files of {library}'s cache" + (f" ({there} were there)" if there else "")
            for library, (new, there) in self.libraries.items()
        )
        if self.builds:
            others += f", {self.builds} plans of builds"
        return (
            f"{self.kernels} kernels restored{kept}{others}: {self.targets} targets of {self.launches} ranks "
            f"in {self.seconds:.2f} s"
        )


def restore(stream: BinaryIO, place: Place, public_key: PublicKey | None = None) -> Restored:
    """Unpack a bundle. Everything is checked before anything is written; what is there and good is never replaced.

    A server may use the cache meanwhile, and another may restore the same.

    Args:
        stream: the bundle; it is read twice.
        public_key: whose signature it must bear.

    Raises:
        BundleError: it is damaged, not signed by them, or not for the DeepGEMM or compiler of this place, or others can
            write the cache, and nothing has been written; or the cache cannot be written, and what is there is whole.
    """
    start = time.monotonic()
    manifest = archive.read(stream, is_signed_by=public_key)
    restored = Restored()
    cache = manifest.plan.cache_in(place.cache)
    try:
        trust.check_caches((cache.root, *cache.read_only), place.environment)
    except trust.UntrustedError as error:
        raise BundleError(str(error)) from error
    compiler = _checked(manifest.plan, place, restored.notes)
    include = place.deep_gemm / "include"
    names = manifest.plan.directories(include)
    caches = _caches(manifest, place, restored.notes)
    try:
        missing = [name for name in manifest.cubins if not has_good(cache, names[name])]
        wanted = {manifest.cubins[name] for name in missing}
        wanted |= {file.sha256 for files in caches.values() for file in files}
        wanted |= set(manifest.builds.values())
        with _staging(cache.root) as staging:
            archive.extract(stream, manifest, Path(staging), wanted)
            if defects := defects_of(manifest, missing, Path(staging)):
                raise BundleError(f"{defects[0]}: none of its kernels is restored")
            restored.builds = _keep_builds(manifest, cache.root, Path(staging), restored.notes)
            restored.kernels = _publish(
                cache, manifest, {name: names[name] for name in missing}, include, Path(staging)
            )
            restored.kept = len(manifest.cubins) - restored.kernels
            new = {names[name] for name in missing}
            marked = mark(cache, manifest.plan, place.deep_gemm, compiler, names, new)
            restored.targets, restored.launches = marked.targets, marked.launches
            restored.notes += marked.notes
            # Last, and each for itself: DeepGEMM's kernels do not need them.
            for library, files in caches.items():
                root = LIBRARIES[library].root(place.environment)
                assert root is not None  # else its files would not have been among these
                try:
                    published = entries.publish(root, files, Path(staging))
                except BundleError as error:
                    restored.notes.append(f"{library}: not all of it is restored: {error}")
                else:
                    restored.libraries[library] = (published.new, published.kept)
    except CacheError as error:
        raise BundleError(str(error)) from error
    except OSError as error:
        raise BundleError(f"{cache.root}: {error.strerror or error}") from error
    restored.notes = [printable(note) for note in restored.notes]
    restored.seconds = time.monotonic() - start
    return restored


def has_good(cache: KernelCache, directory: str) -> bool:
    """Whether a kernel is there. One whose cubin is none is moved away: power may have failed while it was written.

    Raises:
        OSError, CacheError: the cache cannot be read, or written.
    """
    if not cache.has(directory):
        return False
    data = (cache.path(directory) / CUBIN).read_bytes()
    if not stub.is_stub(data) and cubin.defect_of(data) is None:
        return True
    cache.set_aside(directory)
    return False


def _checked(plan: Plan, place: Place, notes: list[str]) -> str:
    """What the compiler says of itself here, if the plan's kernels are good here.

    Raises:
        BundleError: they are not.
    """
    if place.deep_gemm.is_dir():
        build = build_hash(place.deep_gemm)
        if build != plan.build:
            here = distribution_of(place.deep_gemm) or "one of unknown version"
            raise BundleError(
                f"it is for another DeepGEMM: {plan.deep_gemm or 'one of unknown version'} (build {plan.build[:12]}), "
                f"in {place.deep_gemm} is {here} (build {build[:12]})"
            )
    else:
        notes.append(f"there is no {place.deep_gemm} yet: whether that DeepGEMM is the bundle's could not be seen")
    try:
        compiler = compilers.find(place.environment, "nvrtc" if plan.kind == "nvrtc" else "nvcc", plan.dialect)
    except CompilerError as error:
        notes.append(f"the server's compiler is taken to be the bundle's: {error}")
        return plan.compiler
    planned = Compiler("", plan.compiler)
    if not plan.dialect.takes_for_same(planned.version, compiler.version):
        raise BundleError(
            f"it is for another compiler: nvcc {planned.release}, {compiler.path} is nvcc {compiler.release}"
        )
    if planned.release != compiler.release:
        # DeepGEMM itself makes no difference between them.
        notes.append(f"its kernels were compiled by nvcc {planned.release}, here is {compiler.release}")
    return compiler.version


def _caches(manifest: Manifest, place: Place, notes: list[str]) -> dict[str, tuple[CachedFile, ...]]:
    found: dict[str, tuple[CachedFile, ...]] = {}
    for cache in manifest.caches:
        library = LIBRARIES.get(cache.library)
        if library is None:
            notes.append(f"{cache.library}: this version knows no such cache")
        elif difference := library.mismatch(cache.key, place.environment):
            notes.append(f"{cache.library}: not restored: {difference}")
        else:
            found[cache.library] = cache.files
    return found


def _keep_builds(manifest: Manifest, root: Path, staging: Path, notes: list[str]) -> int:
    """Keep the plans of builds. One that is there is of a start on this machine, and stays."""
    kept = 0
    for name, sha256 in manifest.builds.items():
        place, data = root / build_plan.PLANS / name, (staging / sha256).read_bytes()
        try:
            build_plan.decode(data, name)
        except BuildPlanError as error:
            notes.append(f"not restored: {error}")
            continue
        if not place.exists():
            write_atomically(place, data)
            kept += 1
    return kept


def _staging(root: Path) -> tempfile.TemporaryDirectory[str]:
    directory = root / "tmp"
    directory.mkdir(parents=True, exist_ok=True)
    staging = tempfile.TemporaryDirectory(prefix="warmstart-bundle-", dir=directory, ignore_cleanup_errors=True)
    remove_left_behind(directory, Path(staging.name))
    return staging


def _publish(cache: KernelCache, manifest: Manifest, names: Mapping[str, str], include: Path, staging: Path) -> int:
    def publish(name: str) -> None:
        data = (staging / manifest.cubins[name]).read_bytes()
        plan = manifest.plan
        cache.publish(names[name], plan.kernels[name].source, data, plan.flags_of(name, include))

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(publish, names):
            pass
    return len(names)


@dataclass
class Marked:
    """What markers name.

    Args:
        targets, launches, notes: see :class:`Restored`.
    """

    targets: int = 0
    launches: int = 0
    notes: list[str] = field(default_factory=list)


def mark(
    cache: KernelCache, plan: Plan, deep_gemm: Path, compiler: str, names: Mapping[str, str], published: set[str]
) -> Marked:
    """Leave the markers of the plan's launches, for all targets whose kernels are there.

    Args:
        deep_gemm: the directory of the package as the server will see it.
        compiler: what the server's compiler prints for ``--version``.
        names: DeepGEMM's here, by the plan's.
        published: those that were not there before.

    Raises:
        OSError: they cannot be written.
    """
    marked = Marked()
    for launch in plan.launches:
        markers = Markers(cache, plan.identity_of(launch, deep_gemm, compiler))
        targets = plan.targets_of(launch, deep_gemm / "include", names)
        complete = [each for each in targets if _is_there(cache, each)]
        for marker in markers.all():
            # One that names a kernel which was gone has the checksum of that.
            stale = [each for each in marker.targets if not published.isdisjoint(_directories(each))]
            if stale and all(file.directory in published or _is_unchanged(cache, file) for file in marker.files):
                markers.add(marker.launch, stale)
        lacking = len(targets) - len(complete)
        key = launch.launch if not lacking else {**launch.launch, **_PARTIAL}
        known = _known(markers, key)
        fresh = [each for each in complete if each.target not in known]
        further = [
            each for each in plan.further_of(launch, deep_gemm / "include", names) if has_good(cache, each.directory)
        ]
        if fresh or further:
            markers.add(key, fresh, further, searched=launch.searched)
        marked.targets += len(complete)
        marked.launches += not lacking
        if lacking:
            marked.notes.append(f"{_name(launch)}: {lacking} of {len(targets)} targets lack kernels")
    return marked


def _is_there(cache: KernelCache, each: TargetKernels) -> bool:
    return all(has_good(cache, directory) for directory in _directories(each))


def _is_unchanged(cache: KernelCache, file: KernelFile) -> bool:
    try:
        return cache.describe(file.directory) == file
    except OSError:
        return False


def _directories(each: TargetKernels) -> list[str]:
    return [use.directory for use in each.kernels]


def _known(markers: Markers, launch: Launch) -> set[Target]:
    return {each.target for marker in markers.all() if marker.launch == launch for each in marker.targets}


def _name(launch: PlannedLaunch) -> str:
    return f"rank {launch.launch.get('rank', '?')} on {launch.gpu}"


def defects_of(manifest: Manifest, names: Iterable[str], contents: Path) -> list[str]:
    """What is wrong with the cubins of a bundle beyond checksums: one that is no whole cubin, or a recorder's stub.

    Args:
        names: of the kernels to look at.
        contents: where :func:`.archive.extract` has put them.
    """
    defects = []
    for name in sorted(names):
        data = (contents / manifest.cubins[name]).read_bytes()
        defect = "a recorder's stub" if stub.is_stub(data) else cubin.defect_of(data)
        if defect is not None:
            defects.append(f"{name}: {defect}")
    return defects
