"""Make plans and bundles from a cache. The markers of finished warm-ups say what it has."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from sglang_warmstart import __version__
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.bundle.manifest import Manifest
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.dialects import UnknownJitError
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE
from sglang_warmstart.deepgemm.flags import unknown_option
from sglang_warmstart.deepgemm.identity import build_hash, distribution_of, headers_hash
from sglang_warmstart.deepgemm.marker import Marker, Markers
from sglang_warmstart.deepgemm.plan import Plan, PlanError, Planner, merged
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan, BuildPlanError
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.libraries.library import Library


@dataclass(frozen=True)
class Exported:
    """What a cache has, as a plan.

    Args:
        plan: of all its launches.
        installations: the directories of DeepGEMM that its kernels are named for.
        notes: what was left out, and why.
    """

    plan: Plan
    installations: tuple[Path, ...]
    notes: tuple[str, ...]


def export(root: Path, identity: str = "") -> Exported:
    """The plan of all finished warm-ups in a cache. Nothing in the cache is changed.

    Args:
        root: of DeepGEMM's cache.
        identity: only those whose directory below ``markers`` begins so.

    Raises:
        PlanError: there is none, or they are of several compilers or builds of DeepGEMM.
    """
    notes: list[str] = []
    plans: dict[str, Plan] = {}
    installations: dict[Path, None] = {}
    for place in (root, root / "nvrtc"):
        for directory in sorted(KernelCache(place).own.glob(f"markers/{identity}*")):
            cache, markers = _markers_in(place, directory)
            if markers:
                plans[directory.name] = _plan_of(cache, markers, notes)
                installations[Path(markers[0].identity.installed_in)] = None
    if not plans:
        hint = f" that begins with {identity}" if identity else ""
        raise PlanError(f"{root} has no marker of a finished warm-up{hint}: start a server with it first")
    try:
        return Exported(merged(plans), tuple(installations), tuple(notes))
    except PlanError as error:
        raise PlanError(f"{error}. Choose one with --identity: {', '.join(plans)}") from error


def _markers_in(root: Path, directory: Path) -> tuple[KernelCache, list[Marker]]:
    for path in sorted(directory.glob("*.json")):
        try:
            first = msgspec.json.decode(path.read_bytes(), type=Marker)
            cache = KernelCache(root, dialects.named(first.identity.jit))
            is_its_own = first.identity.digest == directory.name
        except (OSError, ValueError, OverflowError, RecursionError, UnknownJitError):
            continue
        # Those that are of another identity than their directory's are not read.
        return cache, list(Markers(cache, first.identity).all()) if is_its_own else []
    return KernelCache(root), []


def _plan_of(cache: KernelCache, markers: list[Marker], notes: list[str]) -> Plan:
    identity = markers[0].identity
    deep_gemm = Path(identity.installed_in)
    if not deep_gemm.is_dir() or build_hash(deep_gemm) != identity.deep_gemm:
        raise PlanError(
            f"the DeepGEMM of {deep_gemm} is not that of the warm-up in {cache.root} any more: "
            "export the plan before you replace DeepGEMM"
        )
    planner = Planner(identity, distribution_of(deep_gemm), headers_hash(deep_gemm))
    for marker in markers:
        found = []
        for each in marker.targets:
            try:
                found.append(
                    (each.target, [_recorded(cache, marker, each.flags, use.directory, use.m) for use in each.kernels])
                )
            except (OSError, PlanError) as error:
                planner.leave_out(str(each.target), str(error))
                notes.append(f"{each.target} is left out: {error}")
        planner.add(identity, marker.launch, found, _further(cache, marker, notes), marker.searched)
    return planner.plan()


def _further(cache: KernelCache, marker: Marker, notes: list[str]) -> list[RecordedKernel]:
    found = []
    for each in marker.further:
        try:
            found.append(_recorded(cache, marker, (each.flags,), each.directory, 0))
        except (OSError, PlanError) as error:
            notes.append(f"a further kernel is left out: {error}")
    return found


def _recorded(cache: KernelCache, marker: Marker, known: Iterable[str], directory: str, m: int) -> RecordedKernel:
    file = next(file for file in marker.files if file.directory == directory)
    if cache.describe(directory) != file:
        raise PlanError(f"{directory} is not what it was")
    entry = cache.path(directory)
    try:
        flags = cache.dialect.flags_of(entry, marker.identity.compiler, known)
    except (ValueError, KeyError) as error:
        raise PlanError(f"{directory}: its flags cannot be read: {error}") from error
    if flags is None:
        raise PlanError(f"{directory} was compiled with other flags than the marker has")
    if (option := unknown_option(flags, str(Path(marker.identity.installed_in, "include")))) is not None:
        raise PlanError(f"{directory}: {option!r} is no option that DeepGEMM gives to its compiler")
    return RecordedKernel(directory, (entry / SOURCE).read_bytes().decode(), flags, m)


@dataclass(frozen=True)
class Contents:
    """The manifest of a bundle that is about to be written, and what opens its files.

    Args:
        manifest: of all of them.
        open: a file of the bundle, by its SHA-256.
    """

    manifest: Manifest
    open: Callable[[str], BinaryIO]


def contents_of(
    plan: Plan,
    cubins: Mapping[str, bytes | Path],
    *,
    failed: Mapping[str, str] | None = None,
    caches: Iterable[tuple[LibraryCache, Mapping[str, Path]]] = (),
    builds: Mapping[str, BuildPlan] | None = None,
) -> Contents:
    """What goes into a bundle.

    Args:
        cubins: of the plan's kernels, by the plan's names: the bytes, or where they are.
        failed: why a kernel has none.
        caches: of other libraries, with the place of each file by its SHA-256.
        builds: plans of what other libraries compile, by the names of their files.
    """
    places: dict[str, bytes | Path] = {}
    sizes: dict[str, int] = {}
    names: dict[str, str] = {}
    for name, content in sorted(cubins.items()):
        data = content if isinstance(content, bytes) else content.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        names[name], places[sha256], sizes[sha256] = sha256, content, len(data)
    taken = []
    for cache, files in caches:
        taken.append(cache)
        for sha256, path in files.items():
            places[sha256], sizes[sha256] = path, path.stat().st_size
    planned = {}
    for name, builds_of_launch in sorted((builds or {}).items()):
        data = build_plan.encode(builds_of_launch)
        planned[name] = sha256 = hashlib.sha256(data).hexdigest()
        places[sha256], sizes[sha256] = data, len(data)
    manifest = Manifest(
        made_by=f"sglang-warmstart {__version__}",
        plan=plan,
        cubins=names,
        failed=dict(sorted((failed or {}).items())),
        caches=tuple(taken),
        builds=planned,
        files=dict(sorted(sizes.items())),
    )

    def open_(sha256: str) -> BinaryIO:
        content = places[sha256]
        return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")

    return Contents(manifest, open_)


def builds_in(root: Path, libraries: Iterable[Library], notes: list[str]) -> dict[str, BuildPlan]:
    """What launches have had these libraries compile, by the names of their plans.

    Args:
        root: of DeepGEMM's cache.
        notes: gets a line for each plan that cannot be read.
    """
    wanted, found = {library.name for library in libraries}, {}
    for path in sorted((root / build_plan.PLANS).glob("*.json")) if wanted else ():
        if not build_plan.NAME.fullmatch(path.name):
            continue
        try:
            parts = {name: part for name, part in build_plan.load(path).parts.items() if name in wanted}
        except (BuildPlanError, OSError) as error:
            notes.append(f"a plan of builds is left out: {first_line(error)}")
            continue
        if parts:
            found[path.name] = BuildPlan(parts)
    return found


def cubins_in(root: Path, exported: Exported) -> dict[str, Path]:
    """Where the kernels of an exported plan lie in its cache, by the plan's names.

    Args:
        root: of DeepGEMM's cache.
    """
    plan = exported.plan
    cache = plan.cache_in(root)
    found = {}
    for name in plan.kernels:
        for deep_gemm in exported.installations:
            directory = plan.directory_of(name, deep_gemm / "include")
            if cache.has(directory):
                found[name] = cache.path(directory) / CUBIN
    return found
