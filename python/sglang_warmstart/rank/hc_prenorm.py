"""DeepSeek-V4's mHC prenorm GEMM goes through DeepGEMM's warm-up machinery.

Where ``deep_gemm.tf32_hc_prenorm_gemm`` is called directly, nothing warms it and nothing sees it. Here it gets a kernel
type of its own. Its kernel depends on (n, k, num_splits) and not on M, so one M warms a split bucket: the list of Ms is
not walked in the middle of serving.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KERNEL_TYPE = "TF32_HC_PRENORM_GEMM"
GEMM = "tf32_hc_prenorm_gemm"

_GB = 1 << 30


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
    entrypoint: ModuleType, kernel_type: Any, direct: Callable[[], Callable[..., None]] = exported_gemm
) -> Callable[..., None]:
    """The wrapper of the GEMM, for SGLang's DeepGEMM wrapper beside those of the other GEMMs.

    Args:
        entrypoint: SGLang's wrapper, which has the library under the name ``deep_gemm``.
        kernel_type: the member of SGLang's ``DeepGemmKernelType``.
        direct: gives the GEMM as the library made it. The warm-up calls that one too: ``wrapper.direct``.
    """
    warmed: dict[tuple[int, int, int | None], Callable[..., None]] = {}

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
            with entrypoint.compile_utils.deep_gemm_execution_hook(m, fn.shape[0], k, num_splits or 0, kernel_type):
                # The hook may have put somebody at DeepGEMM's door, who is to see this call.
                at_the_door = not isinstance(entrypoint.deep_gemm, ModuleType)
                gemm = getattr(entrypoint.deep_gemm, GEMM) if at_the_door else direct()
                gemm(x, fn, out, sqrsum, num_splits=num_splits)
            if not at_the_door:
                warmed[key] = gemm
        else:
            gemm(x, fn, out, sqrsum, num_splits=num_splits)

    tf32_hc_prenorm_gemm.direct = direct  # type: ignore[attr-defined]
    return tf32_hc_prenorm_gemm
