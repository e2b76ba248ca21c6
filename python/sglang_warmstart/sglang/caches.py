"""Where SGLang's caches of compiled kernels are. It depends on the installed release."""

from __future__ import annotations

import importlib.util
import os.path
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ENVIRON = "sglang.srt.environ"
DEEP_GEMM_CACHE = "SGLANG_DG_CACHE_DIR"
# In 0.5.18 and later, the root of all caches.
ALL_CACHES = "SGLANG_CACHE_DIR"


def deep_gemm_cache(environment: Mapping[str, str]) -> Path:
    """The root of DeepGEMM's cache of a server with this environment; of several, the one that is written.

    It raises nothing for a user who has no home: as for SGLang, it is then a directory ``~`` in the working directory.

    Source: ``environ.py`` and ``layers/deep_gemm_wrapper/compile_utils.py`` of SGLang; ``csrc/jit/compiler.hpp`` of
    DeepGEMM, which SGLang hands an empty value on to.
    """
    named = environment.get(DEEP_GEMM_CACHE)
    if named and ":" in named:
        # Not above: the plugin is imported by every process of SGLang.
        from sglang_warmstart.libraries.deep_gemm import installed_dialect

        return installed_dialect().roots(named)[0]
    if named:
        return Path(named)
    if named is not None:
        return _expanded("~/.deep_gemm")
    if _is_below_one_root():
        root = environment.get(ALL_CACHES, "~/.cache/sglang")
        return _expanded(root) / "deep_gemm"
    return _expanded("~/.cache/deep_gemm")


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where there is no home)


def _is_below_one_root() -> bool:
    """Whether the installed SGLang keeps DeepGEMM's cache below ``SGLANG_CACHE_DIR`` (0.5.18 and later).

    The default of the cache's switch then follows another switch, so it is a function. A command that has not imported
    SGLang reads that in the source: importing it takes seconds.
    """
    environ = sys.modules.get(ENVIRON)
    if environ is not None:
        switch = vars(getattr(environ, "Envs", object)).get(DEEP_GEMM_CACHE)
        return callable(getattr(switch, "default", None))
    package = importlib.util.find_spec("sglang")
    for directory in (package.submodule_search_locations or ()) if package else ():
        path = Path(directory, "srt", "environ.py")
        if path.is_file():
            return bool(re.search(rf"\b{DEEP_GEMM_CACHE} = \w+\(\s*lambda\b", path.read_text(encoding="utf-8")))
    return False
