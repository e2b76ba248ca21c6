"""A rank's first words to the service: what it compiles with, and into which cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from sglang_warmstart.base.switches import COMPILER, UNWATCHED, WORKERS
from sglang_warmstart.deepgemm.compiler import Kind
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.node.protocol import Hello
from sglang_warmstart.sglang.caches import deep_gemm_cache

# What else a rank's DeepGEMM and its search for a compiler read.
_PLACES = ("CUDA_HOME", "CUDA_PATH", "PATH")
# Variables of DeepGEMM begin so, with either of its JITs.
PREFIXES = ("DG_", "DJ_")


def hello_of(environment: Mapping[str, str], deep_gemm: Path, gpu: Gpu, launch: Launch) -> tuple[Hello, list[str]]:
    """What a rank says, and what is wrong with its switches.

    Args:
        environment: of the rank, in which SGLang has set what it sets.
        deep_gemm: directory of the package.
    """
    word, no_kind = COMPILER.read(environment)
    kind = cast(Kind, word)
    workers, no_number = WORKERS.read(environment)
    # SGLang hands on an empty value, and DeepGEMM then looks in a place of its own.
    cache = environment.get("DG_JIT_CACHE_DIR") or str(deep_gemm_cache(environment))
    if kind == "nvrtc":
        # Kernels of another compiler than DeepGEMM's own: once this is switched off again, none is in use.
        cache = str(Path(cache, "nvrtc"))
    own = {name: each for name, each in environment.items() if name.startswith(PREFIXES) or name in _PLACES}
    own["DG_JIT_CACHE_DIR"] = cache
    if (unwatched := environment.get(UNWATCHED)) is not None:
        # The service compiles ahead of use: that is nothing for the monitor's command.
        del own["DG_JIT_NVCC_COMPILER"]
        own |= {"DG_JIT_NVCC_COMPILER": unwatched} if unwatched else {}
    hello = Hello(
        cache=cache,
        environment=own,
        deep_gemm=str(deep_gemm),
        gpu=gpu,
        launch=launch,
        kind=kind,
        workers=workers,
    )
    return hello, [complaint for complaint in (no_kind, no_number) if complaint]
