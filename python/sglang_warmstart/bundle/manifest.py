"""The manifest, the first file of a bundle: its contents, what it is for, and the SHA-256 of every other file."""

from __future__ import annotations

import re
from itertools import pairwise

import msgspec

from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.plan import Plan, PlanError
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.cached import LibraryCache, defect_of

FORMAT = 1
# Contents of files are in the archive under their own SHA-256, so that no name in it is ever taken for a path.
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Kernels share lines of flags, so that a small manifest can have much to hash: names are hashes, computed in Python.
_TEXT_LIMIT = 16 << 20


class BundleError(QuotingError):
    """What is wrong with a bundle, in one line. It may quote the bundle."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a bundle.

    Args:
        format: of the bundle.
        made_by: version of this package.
        plan: what it was made from.
        cubins: the SHA-256 of each kernel's, by the plan's name for the kernel.
        failed: why a kernel has none, likewise.
        caches: of other libraries.
        builds: the SHA-256 of each plan of what other libraries compile, by the name of its file.
        files: bytes of each file in the archive, by SHA-256.
    """

    format: int = FORMAT
    made_by: str
    plan: Plan
    cubins: dict[str, str]
    failed: dict[str, str] = {}
    caches: tuple[LibraryCache, ...] = ()
    builds: dict[str, str] = {}
    files: dict[str, int]


def encode(manifest: Manifest) -> bytes:
    """The manifest as it is kept and signed."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """A manifest that holds together.

    Raises:
        BundleError: it is none, or does not.
    """
    try:
        head = msgspec.json.decode(data, type=plans.Head)
        if head.format != FORMAT:
            raise BundleError(f"a bundle of format {head.format}, this version reads format {FORMAT}")
        manifest = msgspec.json.decode(data, type=Manifest)
        if manifest.plan.format != plans.FORMAT:
            raise BundleError(f"its plan is of format {manifest.plan.format}, this version reads format {plans.FORMAT}")
        # What was decoded can be encoded, but for integers of more than 64 bits where msgspec is not new.
        msgspec.json.encode(manifest)
        _check_text(manifest.plan)
        plans.check(manifest.plan)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, PlanError, RecursionError) as error:
        raise BundleError(f"its manifest: {error}") from error
    _check(manifest)
    return manifest


def _check_text(plan: Plan) -> None:
    lengths = dict(enumerate(map(len, plan.flags)))
    text = sum(len(kernel.source) + lengths.get(kernel.flags, 0) for kernel in plan.kernels.values())
    if text > _TEXT_LIMIT:
        raise BundleError(f"its manifest: its kernels have {text} characters of sources and flags")


def _check(manifest: Manifest) -> None:
    for name, size in manifest.files.items():
        if not _SHA256.fullmatch(name) or size < 0:
            raise BundleError(f"its manifest: not a file: {name!r} of {size} bytes")
    for kernel in (*manifest.cubins, *manifest.failed):
        if kernel not in manifest.plan.kernels:
            raise BundleError(f"its manifest: {kernel!r} is not in its plan")
    for plan in manifest.builds:
        if not build_plan.NAME.fullmatch(plan):
            raise BundleError(f"its manifest: {plan!r} is no name of a plan of builds")
    named = {*manifest.cubins.values(), *manifest.builds.values()}
    for cache in manifest.caches:
        _check_paths(cache)
        named |= {file.sha256 for file in cache.files}
    libraries = [cache.library for cache in manifest.caches]
    if len(set(libraries)) < len(libraries):
        raise BundleError("its manifest: a library's cache is in it twice")
    if named != manifest.files.keys():
        odd = sorted(named ^ manifest.files.keys())[0]
        raise BundleError(f"its manifest: what it names and its files do not agree: {odd!r}")


def _check_paths(cache: LibraryCache) -> None:
    for file in cache.files:
        defect = defect_of(file.path)
        if defect is not None:
            raise BundleError(f"its manifest: {cache.library}: {file.path!r}: {defect}")
        if not 0 <= file.mtime_ns < 1 << 63:
            raise BundleError(f"its manifest: {cache.library}: {file.path!r}: changed at {file.mtime_ns} ns")
    # With the slash, all that lies below a path comes right after it.
    for above, path in pairwise(sorted(f"{file.path}/" for file in cache.files)):
        if path == above:
            raise BundleError(f"its manifest: {cache.library}: {path[:-1]!r} is in it twice")
        if path.startswith(above):
            raise BundleError(f"its manifest: {cache.library}: {above[:-1]!r} is a file and a directory")
