"""The table of all known JIT libraries. A new library is a file in this room and a line here."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from sglang_warmstart.libraries.cute_dsl import CuteDsl
from sglang_warmstart.libraries.deep_gemm import DeepGemm
from sglang_warmstart.libraries.flashinfer import FlashInfer
from sglang_warmstart.libraries.inductor import Inductor
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.sglang_jit import SglangJit
from sglang_warmstart.libraries.tilelang import TileLang
from sglang_warmstart.libraries.triton import Triton
from sglang_warmstart.libraries.tvm_ffi import TvmFfi

LIBRARIES: Mapping[str, Library] = {
    each.name: each
    for each in (
        DeepGemm(),
        Triton(),
        FlashInfer(),
        TileLang(),
        TvmFfi(),
        SglangJit(),
        CuteDsl(),
        Inductor(),
    )
}


# Where caches are, and which compilers there are.
_VARIABLES = ("HOME", "PATH", "CUDA_HOME", "CUDA_PATH", "CXX", "CC", "LIBRARY_PATH", "CPATH", "MAX_JOBS")


def build_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide what any of the libraries compiles, and into which cache."""
    patterns = {*_VARIABLES, *(pattern for library in LIBRARIES.values() for pattern in library.variables)}
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def parse_include(text: str) -> tuple[Library, ...]:
    """The libraries that are named, of those whose caches a bundle carries as files.

    Args:
        text: names with commas between them, or "all".

    Raises:
        ValueError: one of them is not known, or there is none.
    """
    known = {name: library for name, library in LIBRARIES.items() if library.in_files}
    names = {name.strip() for name in text.split(",")}
    for name in sorted(names - {"all"}):
        if name not in known:
            raise ValueError(f"no library {name!r}: choose among {', '.join(known)}, with commas, or all")
    return tuple(library for name, library in known.items() if name in names or "all" in names)
