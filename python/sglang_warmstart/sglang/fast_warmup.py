"""F2: a sampled M list that is made when the server's arguments are known, and that keeps to its cap.

DeepGEMM's warm-up runs every M. Rank 0 compiles for minutes, the other ranks wait in a collective, and NCCL times out.
SGLang 0.5.12 has a sampled list, but it reads the switch when a module is imported, and the list runs past the largest
prefill. There, a warm-up that fails half way leaves DeepGEMM in the warm-up's compile mode and ends the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.m_list import fast_m_list, full_m_list
from sglang_warmstart.sglang.seams import seam

COMPILE_UTILS = "sglang.srt.layers.deep_gemm_wrapper.compile_utils"
ENTRYPOINT = "sglang.srt.layers.deep_gemm_wrapper.entrypoint"
M_LIST = "_BUILTIN_M_LIST"
COMPILE_ONE = "_compile_deep_gemm_one_type_all"
COMPILE_ONE_PARAMETERS = "kernel_type, n, k, num_groups, m_list"

logger = logging.getLogger(LOGGER_NAME)


def skip_refused_target(error: TypeError, kernel_type: Any, n: int, k: int, num_groups: int) -> None:
    """Say in one line that the target is skipped, and why.

    A DeepGEMM that does not know the arguments of a warm-up call (seen on B300 with FP4 experts) raises a TypeError.
    The server can serve: the kernels of that target compile when they are first called.

    Raises:
        TypeError: ``error`` itself, in strict mode.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_WARMSTART_STRICT.get():
        raise error
    logger.warning(
        "warmstart: the installed DeepGEMM refuses the warm-up of <%s> N=%d K=%d num_groups=%d and it is skipped: %s",
        getattr(kernel_type, "name", kernel_type),
        n,
        k,
        num_groups,
        str(error).splitlines()[0] if str(error) else "TypeError",
    )


@contextmanager
def compile_mode_kept(deep_gemm: Any) -> Iterator[None]:
    """Leave DeepGEMM's compile mode as it was found, also after an exception. Builds that have no such mode pass."""
    if not (hasattr(deep_gemm, "get_compile_mode") and hasattr(deep_gemm, "set_compile_mode")):
        yield
        return
    mode = deep_gemm.get_compile_mode()
    try:
        yield
    finally:
        deep_gemm.set_compile_mode(mode)


def install_m_list(hooks: Hooks, compile_utils: ModuleType) -> None:
    """Make the list late, from the arguments at hand, and keep a refused target from ending the start-up."""

    def update_deep_gemm_config(original: Callable[..., None], gpu_id: int, *args: Any, **kwargs: Any) -> None:
        from sglang.srt.environ import envs

        original(gpu_id, *args, **kwargs)  # which rank compiles stays SGLang's own decision
        size = seam().chunked_prefill_size(compile_utils, *args, **kwargs)
        fast = envs.SGLANG_JIT_DEEPGEMM_FAST_WARMUP.get()
        setattr(compile_utils, M_LIST, fast_m_list(size) if fast else list(full_m_list(size)))

    def compile_one_type_all(
        original: Callable[..., None], kernel_type: Any, n: int, k: int, num_groups: int, m_list: list[int]
    ) -> None:
        try:
            with compile_mode_kept(getattr(compile_utils, "deep_gemm", None)):
                original(kernel_type, n, k, num_groups, m_list)
        except TypeError as error:
            skip_refused_target(error, kernel_type, n, k, num_groups)

    if not hasattr(compile_utils, M_LIST):
        raise StandsAsideError(f"{COMPILE_UTILS}.{M_LIST}", "not there")
    hooks.wrap(compile_utils, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")
    hooks.wrap(compile_utils, COMPILE_ONE, compile_one_type_all, COMPILE_ONE_PARAMETERS)


def install_sanity_check(hooks: Hooks, entrypoint: ModuleType) -> None:
    """Check nothing where DeepGEMM's JIT is disabled: there is no DeepGEMM input to check."""

    def sanity_check_input(original: Callable[..., None], x_fp8: Any) -> None:
        if entrypoint.ENABLE_JIT_DEEPGEMM:
            original(x_fp8)

    hooks.wrap(entrypoint, "_sanity_check_input", sanity_check_input, "x_fp8")


FAST_WARMUP = Feature(
    name="fast-warmup",
    gains="a sampled M list that keeps to its cap and is read late; a failing warm-up does no harm",
    hooks={
        f"{COMPILE_UTILS}.update_deep_gemm_config": "runs in each rank when the server's arguments are known; the list "
        "that the original made is replaced by ours",
        f"{COMPILE_UTILS}.{COMPILE_ONE}": "all warm-up calls of a target go through it: its failure is caught here",
        f"{ENTRYPOINT}._sanity_check_input": "it looks at DeepGEMM's inputs also where there is no DeepGEMM",
    },
    upstream="#18111, #23756",
    drop_when="upstream's list keeps to its cap and is made when the arguments are known",
    built_in_as=(f"{COMPILE_UTILS}:fast_m_list",),  # by a patch of the series
    steps=(
        Step((COMPILE_UTILS,), install_m_list),
        Step((ENTRYPOINT,), install_sanity_check),
    ),
)
