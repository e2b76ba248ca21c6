"""Look through a cache of kernels for what must not be in it, whatever has happened to those who wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.dialects import FIRST_JIT
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE
from sglang_warmstart.deepgemm.marker import Marker

# What a file is called until it is renamed to its place.
_UNFINISHED = re.compile(r".*\.[0-9a-f]{8}")


def faults_of(cache: KernelCache) -> list[str]:
    """What is wrong with a cache in which nobody works; empty if nothing is.

    A marker may know kernels that are gone: whoever reads it looks at them.
    """
    kernels = (found for path in _in(cache.root / "cache") for found in _of_kernel(cache, path))
    markers = (f"{path}: {found}" for path in cache.own.glob("markers/*/*.json") if (found := _of_marker(path)))
    return [*kernels, *markers, *rests_in(cache)]


def rests_in(cache: KernelCache) -> list[str]:
    """What was left behind before it came to its place."""
    unfinished = [path for path in cache.root.rglob("*") if path.is_file() and _UNFINISHED.fullmatch(path.name)]
    return [f"{path}: left behind" for path in [*_in(cache.root / "tmp"), *unfinished]]


def _in(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _of_kernel(cache: KernelCache, path: Path) -> list[str]:
    if not cache.dialect.is_whole(path):
        # DeepJIT takes it for not there; the JIT before it ends the server.
        return [f"{path}: half a kernel"] if cache.dialect is FIRST_JIT else []
    data = (path / CUBIN).read_bytes()
    defect = "a stub" if stub.is_stub(data) else cubin.defect_of(data)
    return [f"{path}: {what}" for what in (defect, not (path / SOURCE).read_bytes() and "no source") if what]


def _of_marker(path: Path) -> str:
    try:
        msgspec.json.decode(path.read_bytes(), type=Marker)
    except msgspec.DecodeError as error:
        return str(error)
    return ""
