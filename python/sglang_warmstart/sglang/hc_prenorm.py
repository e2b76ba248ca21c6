"""F3: DeepSeek-V4's mHC prenorm GEMM goes through DeepGEMM's warm-up.

Its kernel depends on (n, k, num_splits) and not on M. SGLang 0.5.12 calls ``deep_gemm.tf32_hc_prenorm_gemm`` directly,
so nothing warms it. The wrapper of 0.5.13 walks the whole list of Ms for each split bucket. That of 0.5.14 and later
warms nothing. Ours takes their place: one M warms a bucket, and a bucket that is met tells all others of the model.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_warmstart.base.errors import StandsAsideError, passing
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang import mhc_at_once
from sglang_warmstart.sglang.fast_warmup import COMPILE_ONE, COMPILE_ONE_PARAMETERS, COMPILE_UTILS, ENTRYPOINT
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.mhc_at_once import is_without_prenorm

if TYPE_CHECKING:
    import torch

DEEPSEEK_V4 = "sglang.srt.models.deepseek_v4"
MHC, NEW_MHC = "sglang.srt.layers.mhc", "sglang.kernels.ops.layernorm.mhc"
# Where SGLang's rule for the number of splits is, in later releases and in earlier ones.
_RULE_IN, _RULE = (NEW_MHC, MHC), "_compute_num_split_for_mhc_pre"
# Where the function that `deep_gemm` exports stays reachable once the module's attribute is ours.
DIRECT = "__warmstart_direct__"
KERNEL_TYPE = "TF32_HC_PRENORM_GEMM"
GEMM = "tf32_hc_prenorm_gemm"

_GB = 1 << 30

logger = logging.getLogger(LOGGER_NAME)


def memory_requirement(max_m: int, n: int, k: int, num_splits: int) -> float:
    """Gigabytes that one warm-up call takes: x in bf16; fn, out and sqrsum in fp32, the latter two per split."""
    x, fn = 2 * max_m * k, 4 * n * k
    out, sqrsum = 4 * max_m * n, 4 * max_m
    return (x + fn + max(num_splits, 1) * (out + sqrsum)) / _GB


class HcPrenormWarmupExecutor:
    """One call of the GEMM per M, on tensors of its own.

    Args:
        max_m: rows of x at the most.
        n: outputs per row (mix_hc).
        k: hc_mult * hidden_size.
        num_groups: num_splits, which takes the place of SGLang's fourth key; 0 is the unsplit path.
    """

    def __init__(self, max_m: int, n: int, k: int, num_groups: int) -> None:
        import torch

        self.num_splits = num_groups or None
        self.x = torch.empty((max_m, k), device="cuda", dtype=torch.bfloat16)
        self.fn = torch.empty((n, k), device="cuda", dtype=torch.float32)

    def execute(self, m: int) -> None:
        """Run the GEMM on m rows; out and sqrsum are made here since a slice of larger ones would be strided."""
        from sglang.srt.layers.deep_gemm_wrapper import entrypoint

        leading = (m,) if self.num_splits is None else (self.num_splits, m)
        out = self.fn.new_empty((*leading, self.fn.shape[0]))
        sqrsum = self.fn.new_empty(leading)
        entrypoint.tf32_hc_prenorm_gemm.direct()(self.x[:m], self.fn, out, sqrsum, num_splits=self.num_splits)


def other_buckets(target: Target) -> list[Target]:
    """The targets of a prenorm's other split buckets. The number of tokens of a forward decides which of them it needs.

    Empty for other GEMMs, for a prenorm without splits, and where SGLang's rule does not lead to this bucket.
    """
    if target.kernel_type != KERNEL_TYPE or not target.num_groups:
        return []
    rules = (getattr(sys.modules.get(name), _RULE, None) for name in _RULE_IN)
    rule: Callable[[int, int], int] | None = next(filter(None, rules), None)
    buckets = set() if rule is None else {rule(num_tokens, target.k) for num_tokens in target.m_values}
    if target.num_groups not in buckets:
        return []
    others = sorted(buckets - {target.num_groups})
    return [msgspec.structs.replace(target, num_groups=num_splits) for num_splits in others]


def exported_gemm() -> Callable[..., None]:
    """The GEMM as DeepGEMM exports it, which is imported when it is needed: not every machine has it."""
    import deep_gemm

    gemm: Callable[..., None] = deep_gemm.tf32_hc_prenorm_gemm
    return gemm


def _is_warmed(entrypoint: ModuleType) -> bool:
    """Whether this GEMM is warmed before it is called. It is called also where DeepGEMM's others are switched off."""
    from sglang.srt.environ import envs

    return bool(entrypoint.ENABLE_JIT_DEEPGEMM and envs.SGLANG_WARMSTART.get())


def hc_prenorm_wrapper(
    entrypoint: ModuleType,
    kernel_type: Any,
    direct: Callable[[], Callable[..., None]] = exported_gemm,
    guard: Callable[[Callable[..., None], Callable[..., None]], Callable[..., None]] = functools.partial,
) -> Callable[..., None]:
    """The wrapper of the GEMM, for SGLang's DeepGEMM wrapper beside those of the other GEMMs.

    Args:
        entrypoint: SGLang's wrapper, which has the library under the name ``deep_gemm``.
        kernel_type: the member of SGLang's ``DeepGemmKernelType``.
        direct: gives the GEMM as the library made it. The warm-up calls that one too: ``wrapper.direct``.
        guard: guards the first call of a bucket (``Hooks.guarded``).
    """
    warmed: dict[tuple[int, int, int | None], Callable[..., None]] = {}

    def call_first(
        original: Callable[..., None],
        key: tuple[int, int, int | None],
        *tensors: torch.Tensor,
    ) -> None:
        if is_without_prenorm():
            return
        m, (n, k, num_splits) = tensors[0].shape[0], key
        with entrypoint.compile_utils.deep_gemm_execution_hook(m, n, k, num_splits or 0, kernel_type):
            # The hook may have put somebody at DeepGEMM's door, who is to see this call.
            if not isinstance(entrypoint.deep_gemm, ModuleType):
                with passing():
                    getattr(entrypoint.deep_gemm, GEMM)(*tensors, num_splits=num_splits)
                return
            original(key, *tensors)
        warmed[key] = direct()

    def call_cold(key: tuple[int, int, int | None], *tensors: torch.Tensor) -> None:
        direct()(*tensors, num_splits=key[2])

    first = guard(call_first, call_cold)

    def tf32_hc_prenorm_gemm(
        x: torch.Tensor, fn: torch.Tensor, out: torch.Tensor, sqrsum: torch.Tensor, num_splits: int | None = None
    ) -> None:
        """``out = x @ fn.T`` in tf32 and ``sqrsum = (x * x).sum(-1)``, through DeepGEMM's warm-up.

        Args:
            x: (m, k) bf16. With m == 0 nothing is done.
            fn: (n, k) fp32.
            out: (m, n) fp32, or (num_splits, m, n).
            sqrsum: (m,) fp32, or (num_splits, m).
            num_splits: parts that k is summed in, each in a slice of its own; None is the unsplit path.

        Source: follow-up of SGLang PR #25810; DeepGEMM ``tf32_hc_prenorm_gemm``.
        """
        m, k = x.shape
        if m == 0:
            return
        key = (fn.shape[0], k, num_splits)
        gemm = warmed.get(key)
        if gemm is None and not _is_warmed(entrypoint):
            gemm = warmed[key] = direct()
        # The hook has nothing to do for a bucket that it has seen, and entering it costs a fifth of the call.
        if gemm is None:
            first(key, x, fn, out, sqrsum)
        else:
            gemm(x, fn, out, sqrsum, num_splits=num_splits)

    tf32_hc_prenorm_gemm.direct = direct  # type: ignore[attr-defined]
    return tf32_hc_prenorm_gemm


def extended_kernel_types(kernel_types: type[IntEnum]) -> type[IntEnum]:
    """``kernel_types`` with one more member. Members of the old and of the new class are equal, and hash alike.

    SGLang 0.5.13 has the member.
    """
    if KERNEL_TYPE in kernel_types.__members__:
        return kernel_types
    members = [(member.name, member.value) for member in kernel_types]
    members.append((KERNEL_TYPE, max(kernel_types) + 1))
    extended = IntEnum(kernel_types.__name__, members, module=kernel_types.__module__)  # type: ignore[misc]
    return extended


def install_kernel_type(hooks: Hooks, compile_utils: ModuleType, entrypoint: ModuleType) -> None:
    """Give the warm-up machinery the kernel type, its executor and its memory estimate; add the wrapper."""
    kernel_types = class_of(compile_utils, "DeepGemmKernelType")
    if not issubclass(kernel_types, IntEnum):
        raise StandsAsideError(f"{COMPILE_UTILS}.DeepGemmKernelType", "no IntEnum")
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

    guard = functools.partial(hooks.guarded, f"deep_gemm.{GEMM}")
    wrapper = hc_prenorm_wrapper(entrypoint, hc_prenorm, direct, guard)
    executors = class_of(compile_utils, "_BaseWarmupExecutor")
    if extended is not kernel_types:
        hooks.replace(compile_utils, "DeepGemmKernelType", extended)
    hooks.wrap(executors, "create", create, "kernel_type, kwargs")
    hooks.wrap(executors, "get_memory_requirement", get_memory_requirement, "kernel_type, max_m, n, k, num_groups")
    hooks.wrap(compile_utils, COMPILE_ONE, compile_one_type_all, COMPILE_ONE_PARAMETERS)
    put = hooks.replace if hasattr(entrypoint, GEMM) else hooks.add
    put(entrypoint, GEMM, wrapper)


def install_routing(hooks: Hooks, entrypoint: ModuleType, deepseek_v4: ModuleType) -> None:
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
                route_hc_prenorm(hooks, entrypoint, deep_gemm)
        original(self, *args, **kwargs)

    layer = class_of(deepseek_v4, "DeepseekV4DecoderLayer")
    # In 0.5.23 it is one of two classes: what constructs a layer may be inherited, and only hand its arguments on.
    owner = next(each for each in layer.__mro__ if "__init__" in vars(each))
    hooks.wrap(owner, "__init__", init, "self, config, layer_id", "self")


def route_hc_prenorm(hooks: Hooks, entrypoint: ModuleType, deep_gemm: ModuleType) -> None:
    """Put the wrapper in the place of ``deep_gemm.tf32_hc_prenorm_gemm``; a DeepGEMM without it is left alone."""
    if GEMM not in vars(deep_gemm):
        logger.warning("warmstart: hc-prenorm stands aside: deep_gemm.%s: not there", GEMM)
        return
    own, wrapper = vars(deep_gemm)[GEMM], getattr(entrypoint, GEMM)
    setattr(wrapper, DIRECT, own)
    # Only the module's attribute: what is bound to the wrapper elsewhere is meant to be.
    setattr(deep_gemm, GEMM, wrapper)

    def undo() -> None:
        vars(wrapper).pop(DIRECT, None)
        if vars(deep_gemm)[GEMM] is wrapper:
            setattr(deep_gemm, GEMM, own)

    hooks.made(f"deep_gemm.{GEMM}", undo)


HC_PRENORM = Feature(
    name="hc-prenorm",
    gains="DeepSeek-V4's mHC prenorm GEMM is part of the warm-up",
    hooks={
        f"{COMPILE_UTILS}.DeepGemmKernelType": "a kernel type of its own; the class is made anew with one more member, "
        "where it has none",
        f"{COMPILE_UTILS}._BaseWarmupExecutor.create": "the executor of that type",
        f"{COMPILE_UTILS}._BaseWarmupExecutor.get_memory_requirement": "its memory estimate",
        f"{COMPILE_UTILS}.{COMPILE_ONE}": "one M instead of the list, since the kernel does not depend on M",
        f"{ENTRYPOINT}.{GEMM}": "the wrapper, beside those of the other GEMMs; replaced where SGLang has one",
        f"{DEEPSEEK_V4}.DeepseekV4DecoderLayer.__init__": "tells that such a model has been chosen",
        f"deep_gemm.{GEMM}": "all call sites take it from the module inside the function; replaced when the first such "
        "layer is built",
        f"{NEW_MHC}.prewarm_mhc_pre": "runs every bucket once: its TileLang kernels are built at once before",
        f"{MHC}._prewarm_mhc_pre": "the same in 0.5.14",
    },
    upstream="follow-up of #25810",
    drop_when="upstream warms the prenorm GEMM per split bucket",
    built_in_as=(f"{ENTRYPOINT}:_HC_PRENORM_GEMMS",),  # by a patch of the series
    steps=(
        Step((COMPILE_UTILS, ENTRYPOINT), install_kernel_type),
        Step((ENTRYPOINT, DEEPSEEK_V4), install_routing, required=False),
        Step((NEW_MHC,), mhc_at_once.install, required=False),
        Step((MHC,), mhc_at_once.install, required=False),
    ),
)
