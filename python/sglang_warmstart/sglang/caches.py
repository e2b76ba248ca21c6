"""Where a server's caches of compiled kernels are. It depends on the installed release of SGLang."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ENVIRON = "sglang.srt.environ"
DEEP_GEMM_CACHE = "SGLANG_DG_CACHE_DIR"
# In 0.5.20 and later, the root of SGLang's cache of CuTe DSL's kernels.
CUTE_DSL_CACHE = "SGLANG_CUTE_AOT_CACHE_DIR"
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


def caches_below(directory: Path) -> dict[str, str]:
    """The variables that have a server of any release keep the caches of all its JIT libraries below a directory."""
    return {
        ALL_CACHES: str(directory),
        DEEP_GEMM_CACHE: str(directory / "deep_gemm"),
        "SGLANG_JIT_CACHE_DIR": str(directory / "jit"),
        "TRITON_CACHE_DIR": str(directory / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(directory),
        "TVM_FFI_CACHE_DIR": str(directory / "tvm-ffi"),
        "TILELANG_CACHE_DIR": str(directory / "tilelang"),
    }


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that a server which is started with this one gives to its JIT libraries.

    From 0.5.18 on, SGLang names directories below ``SGLANG_CACHE_DIR`` to most of them as soon as it is imported, if
    nobody else has named any. Which libraries these are, and where, SGLang's own source says.

    Raises:
        OSError: SGLang is installed, and does not say.
    """
    if environment is os.environ and (environ := sys.modules.get(ENVIRON)) is not None:
        # It has done so. What is left are its own caches, which it looks for only when it uses them.
        return {**_own_caches(environ), **environment}
    source = _source_of_environ()
    if source is None or f"def {_DEFAULTS}(" not in source.read_text(encoding="utf-8"):
        return dict(environment)
    return {**_asked(source, environment), **environment}


def _own_caches(environ: ModuleType) -> dict[str, str]:
    switch = getattr(environ.envs, CUTE_DSL_CACHE, None)
    return {} if switch is None else {CUTE_DSL_CACHE: switch.get()}


# In 0.5.18 and later: a function that says which variables SGLang sets, and to what.
_DEFAULTS = "third_party_cache_defaults"

# Run in a process of its own: the module reads its environment, and may change it. Importing SGLang takes seconds.
_ASK = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("environ", sys.argv[1])
environ = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environ)
caches = environ.{_DEFAULTS}()
switch = getattr(environ.envs, "{CUTE_DSL_CACHE}", None)
print(json.dumps(caches if switch is None else {{**caches, "{CUTE_DSL_CACHE}": switch.get()}}))
"""
_ASK_LIMIT_S = 60


def _asked(source: Path, environment: Mapping[str, str]) -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-c", _ASK, str(source)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_ASK_LIMIT_S, check=True
        )
        caches: dict[str, str] = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise OSError(f"SGLang does not say where its caches are: {source}: {error}") from error
    return caches


def _source_of_environ() -> Path | None:
    package = importlib.util.find_spec("sglang")
    for directory in (package.submodule_search_locations or ()) if package else ():
        path = Path(directory, "srt", "environ.py")
        if path.is_file():
            return path
    return None


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
    source = _source_of_environ()
    return source is not None and bool(
        re.search(rf"\b{DEEP_GEMM_CACHE} = \w+\(\s*lambda\b", source.read_text(encoding="utf-8"))
    )
