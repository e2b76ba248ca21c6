"""F3: DeepSeek-V4's mHC prenorm GEMM goes through DeepGEMM's warm-up (:mod:`sglang_warmstart.rank.hc_prenorm`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

from sglang_warmstart.errors import StandsAsideError
from sglang_warmstart.features.fast_warmup import COMPILE_ONE, COMPILE_ONE_PARAMETERS, COMPILE_UTILS, ENTRYPOINT
from sglang_warmstart.features.feature import Feature, Step
from sglang_warmstart.patch import Patch, class_of
from sglang_warmstart.rank.hc_prenorm import (
    GEMM,
    KERNEL_TYPE,
    HcPrenormWarmupExecutor,
    hc_prenorm_wrapper,
    memory_requirement,
)
from sglang_warmstart.rank.log import LOGGER_NAME

DEEPSEEK_V4 = "sglang.srt.models.deepseek_v4"

# Where the function that `deep_gemm` exports stays reachable once the module's attribute is ours.
DIRECT = "__warmstart_direct__"

logger = logging.getLogger(LOGGER_NAME)


def extended_kernel_types(kernel_types: type[IntEnum]) -> type[IntEnum]:
    """``kernel_types`` with one more member. Members of the old and of the new class are equal, and hash alike."""
    members = [(member.name, member.value) for member in kernel_types]
    members.append((KERNEL_TYPE, max(kernel_types) + 1))
    extended = IntEnum(kernel_types.__name__, members, module=kernel_types.__module__)  # type: ignore[misc]
    return extended


def install_kernel_type(patch: Patch, compile_utils: ModuleType, entrypoint: ModuleType) -> None:
    """Give the warm-up machinery the kernel type, its executor and its memory estimate; add the wrapper."""
    kernel_types = class_of(compile_utils, "DeepGemmKernelType")
    if not issubclass(kernel_types, IntEnum) or KERNEL_TYPE in kernel_types.__members__:
        raise StandsAsideError(f"{COMPILE_UTILS}.DeepGemmKernelType", f"no IntEnum without {KERNEL_TYPE}")
    extended = extended_kernel_types(kernel_types)
    hc_prenorm = extended[KERNEL_TYPE]

    def create(original: Callable[..., Any], kernel_type: IntEnum, **shape: int) -> Any:
        return HcPrenormWarmupExecutor(**shape) if kernel_type == hc_prenorm else original(kernel_type, **shape)

    def get_memory_requirement(
        original: Callable[..., float], kernel_type: IntEnum, max_m: int, n: int, k: int, num_groups: int
    ) -> float:
        if kernel_type == hc_prenorm:
            return memory_requirement(max_m, n, k, num_groups)
        return original(kernel_type, max_m=max_m, n=n, k=k, num_groups=num_groups)

    def compile_one_type_all(
        original: Callable[..., None], kernel_type: IntEnum, n: int, k: int, num_groups: int, m_list: list[int]
    ) -> None:
        m_list = m_list[:1] if kernel_type == hc_prenorm else m_list
        original(kernel_type=kernel_type, n=n, k=k, num_groups=num_groups, m_list=m_list)

    def direct() -> Callable[..., None]:
        # Kept on the wrapper once that has taken its place in the module.
        import deep_gemm

        own: Callable[..., None] = getattr(wrapper, DIRECT, None) or getattr(deep_gemm, GEMM)
        return own

    wrapper = hc_prenorm_wrapper(entrypoint, hc_prenorm, direct)
    executors = class_of(compile_utils, "_BaseWarmupExecutor")
    patch.replace(compile_utils, "DeepGemmKernelType", extended)
    patch.wrap(executors, "create", create, "kernel_type, kwargs")
    patch.wrap(executors, "get_memory_requirement", get_memory_requirement, "kernel_type, max_m, n, k, num_groups")
    patch.wrap(compile_utils, COMPILE_ONE, compile_one_type_all, COMPILE_ONE_PARAMETERS)
    patch.add(entrypoint, GEMM, wrapper)


def install_routing(patch: Patch, entrypoint: ModuleType, deepseek_v4: ModuleType) -> None:
    """Route the model's own calls through the wrapper as soon as such a model is built.

    The call sites (the decoder layer of target and NextN, and ``layers.mhc``) import ``deep_gemm`` inside the function
    and take the attribute from the module, so replacing it there reaches them all. It waits for the first decoder
    layer: a server of another model keeps a ``deep_gemm`` that nobody touched.
    """

    routed: list[ModuleType] = []

    def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        if entrypoint.ENABLE_JIT_DEEPGEMM:
            import deep_gemm

            # Once: what another plugin wraps around ours later is not to be taken for DeepGEMM's own.
            if deep_gemm not in routed:
                routed.append(deep_gemm)
                route_hc_prenorm(patch, entrypoint, deep_gemm)
        original(self, *args, **kwargs)

    patch.wrap(class_of(deepseek_v4, "DeepseekV4DecoderLayer"), "__init__", init, "self, config, layer_id")


def route_hc_prenorm(patch: Patch, entrypoint: ModuleType, deep_gemm: ModuleType) -> None:
    """Put the wrapper in the place of ``deep_gemm.tf32_hc_prenorm_gemm``; a DeepGEMM without it is left alone."""
    if GEMM not in vars(deep_gemm):
        logger.warning("warmstart: hc-prenorm stands aside: deep_gemm.%s: not there", GEMM)
        return
    own, wrapper = vars(deep_gemm)[GEMM], getattr(entrypoint, GEMM)
    setattr(wrapper, DIRECT, own)
    # Only the module's attribute: what is bound to the wrapper elsewhere is meant to be.
    setattr(deep_gemm, GEMM, wrapper)

    def undo() -> None:
        delattr(wrapper, DIRECT)
        if vars(deep_gemm)[GEMM] is wrapper:
            setattr(deep_gemm, GEMM, own)

    patch.made(f"deep_gemm.{GEMM}", undo)


HC_PRENORM = Feature(
    name="hc-prenorm",
    gains="DeepSeek-V4's mHC prenorm GEMM is part of the warm-up",
    hooks={
        f"{COMPILE_UTILS}.DeepGemmKernelType": "a kernel type of its own; the class is made anew with one more member",
        f"{COMPILE_UTILS}._BaseWarmupExecutor.create": "the executor of that type",
        f"{COMPILE_UTILS}._BaseWarmupExecutor.get_memory_requirement": "its memory estimate",
        f"{COMPILE_UTILS}.{COMPILE_ONE}": "one M instead of the list, since the kernel does not depend on M",
        f"{ENTRYPOINT}.{GEMM}": "the wrapper, beside those of the other GEMMs",
        f"{DEEPSEEK_V4}.DeepseekV4DecoderLayer.__init__": "tells that such a model has been chosen",
        f"deep_gemm.{GEMM}": "all call sites take it from the module inside the function; replaced when the first such "
        "layer is built",
    },
    upstream="follow-up of #25810",
    drop_when="upstream warms the prenorm GEMM per split bucket; left alone where the wrapper is there, in 0.5.13 as "
    "first written, in 0.5.23 without a warm-up",
    built_in_as=(f"{ENTRYPOINT}:{GEMM}",),
    steps=(
        Step((COMPILE_UTILS, ENTRYPOINT), install_kernel_type),
        Step((ENTRYPOINT, DEEPSEEK_V4), install_routing, required=False),
    ),
)
