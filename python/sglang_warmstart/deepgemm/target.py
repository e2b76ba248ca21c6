"""A target: what selects a DeepGEMM kernel, apart from M.

A JIT kernel library picks a kernel from the shape. A target is everything in a call that takes part in this choice,
except the number of rows, and the range that the rows can take.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# K-major is what `.contiguous()` gives. "tma" is M-major with columns padded to 16 bytes, as the GEMM wants the scales
# of the left operand; in any other layout DeepGEMM transposes them first, by a kernel of its own if they are K-major.
Major = Literal["k", "mn"]
LhsScale = Literal["", "k", "tma"]
RhsScale = Literal["", "k", "mn"]


class Target(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """One GEMM of a model on one GPU, for every M that it can be called with.

    Args:
        kernel_type: SGLang's name of the kernel type, such as ``GEMM_NT_F8F8BF16``.
        n: columns of the result.
        k: the dimension summed over.
        num_groups: experts of a grouped GEMM; 1 for a dense one; for hc_prenorm the splits of k, 0 for none.
        num_sms: SMs that the kernel is built for; serving changes it in places.
        m_max: the largest number of rows.
        m_alignment: rows come in multiples of this.
        lhs_major, rhs_major: memory layout of the operands.
        lhs_scale, rhs_scale: memory layout of their scales; empty for operands without.
        out_dtype: torch's name of the result's type, such as ``bfloat16``.
        recipe_a, recipe_b: (rows, columns) that share a scale, where the call says so.
    """

    kernel_type: str
    n: int
    k: int
    num_groups: int
    num_sms: int
    m_max: int
    m_alignment: int = 1
    lhs_major: Major = "k"
    rhs_major: Major = "k"
    lhs_scale: LhsScale = ""
    rhs_scale: RhsScale = ""
    out_dtype: str = "bfloat16"
    recipe_a: tuple[int, int] | None = None
    recipe_b: tuple[int, int] | None = None

    @property
    def m_values(self) -> range:
        """Every M of the target, ascending."""
        return range(self.m_alignment, self.m_max + 1, self.m_alignment)

    def __str__(self) -> str:
        return (
            f"<{self.kernel_type}> N={self.n} K={self.k} num_groups={self.num_groups} num_sms={self.num_sms} "
            f"M={self.m_alignment}..{self.m_max}"
        )


class KernelUse(msgspec.Struct, frozen=True, order=True):
    """A kernel that a target needs.

    Args:
        m: the smallest M that needs it: its representative.
        directory: name of its directory in DeepGEMM's cache, ``kernel.NAME.DIGEST``.
    """

    m: int
    directory: str
