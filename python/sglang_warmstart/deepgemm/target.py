"""A target: what selects a DeepGEMM kernel, apart from M.

A JIT kernel library picks a kernel from the shape. A target is everything in a call that takes part in this choice,
except the number of rows, and the range that the rows can take.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec

from sglang_warmstart.base.errors import printable

# K-major is what `.contiguous()` gives. "tma" is M-major with columns padded to 16 bytes, as the GEMM wants the scales
# of the left operand; in any other layout DeepGEMM transposes them first, by a kernel of its own if they are K-major.
# "packed" is "tma" for int32: four scales along K are the four bytes of one number, each a power of two (UE8M0).
Major = Literal["k", "mn"]
LhsScale = Literal["", "k", "tma", "packed"]
RhsScale = Literal["", "k", "mn", "packed"]
# "fp4" is two e2m1 to a byte: a row of K values takes K / 2 bytes.
RhsType = Literal["", "fp4"]


def _written(default: Any) -> Any:
    """A default that is written to files too: these fields were, before a target had others."""
    return msgspec.field(default_factory=itertools.repeat(default).__next__)


class Target(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
        recipe: the same for both in one: (rows of the left, rows of the right, columns).
        rhs_type: of the right operand, where it is not that of the left one.
        function: what DeepGEMM exports, where SGLang calls two by this kernel type and this is not the usual one.
        disable_ue8m0_cast: whether the call forbids DeepGEMM to pack scales itself.
    """

    kernel_type: str
    n: int
    k: int
    num_groups: int
    num_sms: int
    m_max: int
    m_alignment: int = _written(1)
    lhs_major: Major = _written("k")
    rhs_major: Major = _written("k")
    lhs_scale: LhsScale = _written("")
    rhs_scale: RhsScale = _written("")
    out_dtype: str = _written("bfloat16")
    recipe_a: tuple[int, int] | None = _written(None)
    recipe_b: tuple[int, int] | None = _written(None)
    recipe: tuple[int, int, int] | None = None
    rhs_type: RhsType = ""
    function: str = ""
    disable_ue8m0_cast: bool = False

    @property
    def m_values(self) -> range:
        """Every M of the target, ascending."""
        return range(self.m_alignment, self.m_max + 1, self.m_alignment)

    def __lt__(self, other: Target) -> bool:
        return self._in_order < other._in_order

    @property
    def _in_order(self) -> tuple[Any, ...]:
        # None cannot be compared with a recipe.
        return tuple(() if value is None else value for value in msgspec.structs.astuple(self))

    def __str__(self) -> str:
        unusual = {
            name: value
            for name in ("lhs_scale", "rhs_scale", "recipe_a", "recipe_b", "recipe", "rhs_type", "function")
            if (value := getattr(self, name)) not in ("", "k", "mn", "tma", None)
        }
        if self.disable_ue8m0_cast:
            unusual["disable_ue8m0_cast"] = True
        # A marker or a plan may have been written by anybody.
        return printable(
            f"<{self.kernel_type}> N={self.n} K={self.k} num_groups={self.num_groups} num_sms={self.num_sms} "
            f"M={self.m_alignment}..{self.m_max}"
            + "".join(f" {name}={_shown(value)}" for name, value in unusual.items())
        )


def _shown(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


class KernelUse(msgspec.Struct, frozen=True, order=True):
    """A kernel that a target needs.

    Args:
        m: the smallest M that needs it: its representative.
        directory: name of its directory in DeepGEMM's cache, ``kernel.NAME.DIGEST``.
    """

    m: int
    directory: str
