"""Calls of GEMMs through SGLang's DeepGEMM wrapper, as models make them, and the target that each of them has.

All operands are ones, so that every element of a result is k.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang_warmstart.deepgemm.target import LhsScale, Major, RhsScale, Target

N, K, GROUPS = 384, 512, 4

# Where a server's prefill chunk is 8192: as far as SGLang's own sweep goes.
M_MAX = 16384

DENSE, BF16, PRENORM = "GEMM_NT_F8F8BF16", "GEMM_NT_BF16BF16F32", "TF32_HC_PRENORM_GEMM"
CONTIGUOUS, MASKED = "GROUPED_GEMM_NT_F8F8BF16_CONTIG", "GROUPED_GEMM_NT_F8F8BF16_MASKED"
BF16_CONTIGUOUS, BF16_MASKED = "GROUPED_GEMM_NT_BF16_CONTIG", "GROUPED_GEMM_NT_BF16_MASKED"


def target(kernel_type: str, **others: Any) -> Target:
    """The target of the call of this type below, where nothing else is said."""
    made: dict[str, Any] = {"n": N, "k": K, "num_groups": 1, "num_sms": 132, "m_max": M_MAX}
    if "F8F8" in kernel_type:
        made |= {"lhs_scale": "k", "rhs_scale": "k"}
    if "GROUPED" in kernel_type:
        made["num_groups"] = GROUPS
    if kernel_type in (CONTIGUOUS, BF16_CONTIGUOUS):
        made["m_alignment"] = 128
    if kernel_type == PRENORM:
        made["num_groups"] = 0
    if kernel_type in (BF16, PRENORM):
        made["out_dtype"] = "float32"
    return Target(kernel_type=kernel_type, **{**made, **others})


def dense(m: int = 5, n: int = N, k: int = K, lhs_scale: LhsScale = "k", rhs_scale: RhsScale = "k") -> torch.Tensor:
    """``(m, k) @ (n, k).T`` in fp8; its result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out = _unwritten(m, n)
    deep_gemm_wrapper.gemm_nt_f8f8bf16(_lhs((m, k), lhs_scale), _rhs((n, k), rhs_scale), out)
    return out


def block_32(m: int = 5, n: int = N, k: int = K) -> torch.Tensor:
    """``(m, k) @ (n, k).T`` in fp8 with blocks of 32, from SGLang 0.5.22 on; its result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out = _unwritten(m, n)
    lhs, rhs = (torch.ones(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
    scales = torch.ones(m, k // 32), torch.ones(n // 32, k // 32)
    deep_gemm_wrapper.gemm_nt_f8f8bf16((lhs, scales[0]), (rhs, scales[1]), out, recipe=(1, 32, 32))
    return out


def mxfp8(m: int = 5, n: int = N, k: int = K) -> torch.Tensor:
    """``(m, k) @ (n, k).T`` in fp8 with a scale for 32 columns of a row, from SGLang 0.5.16 on; its result."""
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    out = _unwritten(m, n)
    lhs, rhs = ((torch.ones(rows, k).to(torch.float8_e4m3fn), torch.ones(rows, k // 32)) for rows in (m, n))
    entrypoint.gemm_nt_mxfp8_f8f8bf16(lhs, rhs, out)
    return out


def contiguous(
    m: int = 384, n: int = N, k: int = K, lhs_scale: LhsScale = "k", rhs_scale: RhsScale = "k"
) -> torch.Tensor:
    """Groups of rows, one after another; the result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out, group_of_row = _unwritten(m, n), torch.zeros(m, dtype=torch.int32)
    lhs, rhs = _lhs((m, k), lhs_scale), _rhs((GROUPS, n, k), rhs_scale)
    deep_gemm_wrapper.grouped_gemm_nt_f8f8bf16_contig(lhs, rhs, out, group_of_row)
    return out


def masked(
    m: int = 64,
    n: int = N,
    k: int = K,
    lhs_scale: LhsScale = "k",
    rhs_scale: RhsScale = "k",
    overlap_args: Any = None,
) -> torch.Tensor:
    """Groups of so many rows, all of which count; the result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out, rows = _unwritten(GROUPS, m, n), torch.full((GROUPS,), m, dtype=torch.int32)
    lhs, rhs = _lhs((GROUPS, m, k), lhs_scale), _rhs((GROUPS, n, k), rhs_scale)
    deep_gemm_wrapper.grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, rows, m, overlap_args=overlap_args)
    return out


def overlapped() -> SimpleNamespace:
    """What makes the masked GEMM one that a target does not describe."""

    return SimpleNamespace(num_sms=100, signal=torch.zeros(1))


def bf16(m: int = 5, n: int = N, k: int = K, lhs_major: Major = "k", rhs_major: Major = "k") -> torch.Tensor:
    """``(m, k) @ (n, k).T`` in bfloat16; its result."""
    from sglang.srt.layers import deep_gemm_wrapper

    lhs, rhs = (torch.ones(rows, k, dtype=torch.bfloat16) for rows in (m, n))
    lhs, rhs = (
        each if major == "k" else each.t().contiguous().t() for each, major in ((lhs, lhs_major), (rhs, rhs_major))
    )
    out = _unwritten(m, n).float()
    deep_gemm_wrapper.gemm_nt_bf16bf16f32(lhs, rhs, out)
    return out


def bf16_contiguous(m: int = 384, n: int = N, k: int = K) -> torch.Tensor:
    """Groups of rows, one after another, in bfloat16; the result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out, group_of_row = _unwritten(m, n), torch.zeros(m, dtype=torch.int32)
    lhs, rhs = torch.ones(m, k).bfloat16(), torch.ones(GROUPS, n, k).bfloat16()
    deep_gemm_wrapper.grouped_gemm_nt_bf16_contig(lhs, rhs, out, group_of_row)
    return out


def bf16_masked(m: int = 64, n: int = N, k: int = K) -> torch.Tensor:
    """Groups of so many rows in bfloat16, all of which count; the result."""
    from sglang.srt.layers import deep_gemm_wrapper

    out, rows = _unwritten(GROUPS, m, n), torch.full((GROUPS,), m, dtype=torch.int32)
    lhs, rhs = torch.ones(GROUPS, m, k).bfloat16(), torch.ones(GROUPS, n, k).bfloat16()
    deep_gemm_wrapper.grouped_gemm_nt_bf16_masked(lhs, rhs, out, rows, m)
    return out


def prenorm(m: int = 5, n: int = N, k: int = K, num_splits: int | None = None) -> torch.Tensor:
    """mHC's prenorm; the result, summed over the splits."""
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    x, fn = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k)
    leading = () if num_splits is None else (num_splits,)
    out, squares = torch.full((*leading, m, n), torch.nan), torch.full((*leading, m), torch.nan)
    entrypoint.tf32_hc_prenorm_gemm(x, fn, out, squares, num_splits)
    summed = out.view(-1, m, n).sum(0)
    assert squares.view(-1, m).sum(0).equal(summed[:, 0]), "of ones, the two outputs are the same"
    return summed


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    DENSE: dense,
    CONTIGUOUS: contiguous,
    MASKED: masked,
    BF16: bf16,
    BF16_CONTIGUOUS: bf16_contiguous,
    BF16_MASKED: bf16_masked,
    PRENORM: prenorm,
}


def _unwritten(*shape: int) -> torch.Tensor:
    # No number: what is not written shows.
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)


def _blocks(size: int) -> int:
    return -(-size // 128)


def _lhs(shape: tuple[int, ...], layout: LhsScale) -> tuple[torch.Tensor, torch.Tensor]:
    *leading, m, k = shape
    scales = torch.ones(*leading, m, _blocks(k))
    if layout == "tma":
        columns = torch.ones(*leading, _blocks(k), -(-m // 4) * 4)
        scales = columns.transpose(-1, -2)[..., :m, :]
    return torch.ones(shape).to(torch.float8_e4m3fn), scales


def _rhs(shape: tuple[int, ...], layout: RhsScale) -> tuple[torch.Tensor, torch.Tensor]:
    *leading, n, k = shape
    scales = torch.ones(*leading, _blocks(n), _blocks(k))
    if layout == "mn":
        scales = scales.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.ones(shape).to(torch.float8_e4m3fn), scales
