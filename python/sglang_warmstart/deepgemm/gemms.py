"""How to call DeepGEMM once for an M, per kernel type: the arguments of the call, and the memory that they take.

The tensors of a call come from one of two places. While kernels are recorded, stubs run in place of kernels. Nothing is
read or written, so a tensor may claim more memory than there is. Loading runs the real kernels, on real memory.

Source: ``gemm.hpp``, ``layout.hpp`` and ``hyperconnection.hpp`` in ``csrc/apis`` of DeepGEMM 0.1.x for what a call
checks; ``layers/deep_gemm_wrapper/entrypoint.py`` of SGLang 0.5.12 for how it is called there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sglang_warmstart.deepgemm.target import LhsScale, Major, RhsScale, Target

if TYPE_CHECKING:
    import torch

# One scale covers this many columns of an operand, and this many rows of the right one.
BLOCK = 128
# TMA wants a stride of 16 bytes: four scales.
_TMA_ROWS = 4
# A block of columns at the end of a group may reach this far into the next one.
_BLOCK_N_MAX = 256
# Rows of the left operand of a masked GEMM: no kernel depends on them.
_MASKED_ROWS = 128
# What operands lie over that do not have to exist.
_CLAIMED_BYTES = 1 << 16

Call = Callable[[int], None]


class UnsupportedCallError(Exception):
    """A call to DeepGEMM that cannot be repeated from a target; says what it is in it."""


class Room(Protocol):
    """Where the tensors of a call lie."""

    def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """A contiguous tensor that only the kernel touches, and of it the first ``rows`` rows if they are given."""

    def touched(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor that DeepGEMM or torch touches on its way to the kernel. Filled with zeros."""

    def claimed(self) -> Room:
        """A room for tensors that need not exist."""


@dataclass
class _Claim:
    """What ``torch.as_tensor`` reads of a foreign CUDA array: it takes the shape for granted."""

    __cuda_array_interface__: dict[str, Any]


def _claimed(shape: tuple[int, ...], dtype: torch.dtype, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor of any shape that begins where ``buffer`` does. It does not keep ``buffer`` alive."""
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    claim = _Claim({"shape": (nbytes,), "typestr": "|u1", "data": (buffer.data_ptr(), False), "version": 3})
    return torch.as_tensor(claim, device="cuda").view(dtype).view(shape)


class RealRoom:
    """Memory as large as what a real kernel touches of it."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        import torch

        if rows is None or rows >= math.prod(shape[:-1]):
            return torch.empty(shape, dtype=dtype, device="cuda")
        self._kept.append(torch.empty((rows, shape[-1]), dtype=dtype, device="cuda"))
        return _claimed(shape, dtype, self._kept[-1])

    def touched(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=dtype, device="cuda")

    def claimed(self) -> Room:
        return ClaimedRoom()


class ClaimedRoom(RealRoom):
    """Operands of any shape over a buffer of a few bytes. Only stubs may run on them."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        self._buffer = torch.empty(_CLAIMED_BYTES, dtype=torch.uint8, device="cuda")

    def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        return _claimed(shape, dtype, self._buffer)

    def touched(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        # Not filled: that would load torch's own kernels, and no stub looks.
        return torch.empty(shape, dtype=dtype, device="cuda")


class Gemm(Protocol):
    """One kernel type."""

    @property
    def kernel_type(self) -> str:
        """SGLang's name for it."""

    @property
    def function(self) -> str:
        """What DeepGEMM exports."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Its positional parameters."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of them that it writes."""

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        """The target of a call that is under way.

        Args:
            arguments: the call's arguments by DeepGEMM's names for them.
            alignment: rows of a group in the contiguous layout.

        Raises:
            UnsupportedCallError: a target would not say all that selects its kernel.
        """

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        """A function that calls DeepGEMM for an M up to ``m_max``, on tensors made here."""

    def real_bytes(self, target: Target, m_max: int) -> int:
        """The memory that ``prepare`` takes in a ``RealRoom``."""


@dataclass(frozen=True)
class Dense:
    """``(m, k) @ (n, k).T`` with scales: left (m, k / 128), right (n / 128, k / 128)."""

    kernel_type: str
    function: str
    parameters: tuple[str, ...] = ("a", "b", "d")
    outputs: tuple[str, ...] = ("d",)

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        return _fp8_target(self.kernel_type, arguments, num_sms, m_max)

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        import torch

        gemm, recipes = getattr(deep_gemm, self.function), recipe_arguments(target)
        lhs = room.operand((m_max, target.k), torch.float8_e4m3fn)
        rhs = room.operand((target.n, target.k), torch.float8_e4m3fn), _rhs_scale(target, room)
        out = room.operand((m_max, target.n), _dtype(target.out_dtype))
        lhs_scale = _lhs_scale(target, m_max, room)

        def call(m: int) -> None:
            gemm((lhs[:m], lhs_scale(m)), rhs, out[:m], **recipes)

        return call

    def real_bytes(self, target: Target, m_max: int) -> int:
        return m_max * target.k + target.n * target.k + _scale_bytes(target, m_max) + _out_bytes(target, m_max)


@dataclass(frozen=True)
class GroupedContiguous:
    """``(m, k) @ (num_groups, n, k).mT``: each aligned block of rows belongs to one group, here all to the first."""

    kernel_type: str
    function: str
    parameters: tuple[str, ...] = ("a", "b", "d", "grouped_layout")
    outputs: tuple[str, ...] = ("d",)

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        if arguments.get("use_psum_layout"):
            raise UnsupportedCallError("use_psum_layout")
        return _fp8_target(self.kernel_type, arguments, num_sms, m_max, alignment)

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        import torch

        alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
        if alignment != target.m_alignment:
            raise UnsupportedCallError(f"groups aligned to {target.m_alignment} rows where DeepGEMM has {alignment}")
        gemm, recipes = getattr(deep_gemm, self.function), recipe_arguments(target)
        lhs = room.operand((m_max, target.k), torch.float8_e4m3fn)
        shape = (target.num_groups, target.n, target.k)
        # Only the first group's weights are read.
        rhs = room.operand(shape, torch.float8_e4m3fn, rows=target.n + _BLOCK_N_MAX), _rhs_scale(target, room)
        out = room.operand((m_max, target.n), _dtype(target.out_dtype))
        group_of_row = room.touched((m_max,), torch.int32)
        lhs_scale = _lhs_scale(target, m_max, room)

        def call(m: int) -> None:
            gemm((lhs[:m], lhs_scale(m)), rhs, out[:m], group_of_row[:m], **recipes)

        return call

    def real_bytes(self, target: Target, m_max: int) -> int:
        weights = (target.n + _BLOCK_N_MAX) * target.k
        return m_max * (target.k + 4) + weights + _scale_bytes(target, m_max) + _out_bytes(target, m_max)


@dataclass(frozen=True)
class GroupedMasked:
    """``(num_groups, rows, k) @ (num_groups, n, k).mT`` over the first ``masked_m`` rows of each group.

    ``expected_m`` picks the kernel. With no row in any group the kernel returns at once, so nothing of the operands has
    to exist, not even for the real kernel.
    """

    kernel_type: str
    function: str
    parameters: tuple[str, ...] = ("a", "b", "d", "masked_m", "expected_m")
    outputs: tuple[str, ...] = ("d",)

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        return _fp8_target(self.kernel_type, arguments, num_sms, m_max)

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        import torch

        room, real = room.claimed(), room
        gemm, recipes = getattr(deep_gemm, self.function), recipe_arguments(target)
        leading = (target.num_groups, _MASKED_ROWS)
        lhs = room.operand((*leading, target.k), torch.float8_e4m3fn)
        rhs = room.operand((target.num_groups, target.n, target.k), torch.float8_e4m3fn), _rhs_scale(target, real)
        out = room.operand((*leading, target.n), _dtype(target.out_dtype))
        scale = real.touched((target.num_groups, _MASKED_ROWS, _blocks(target.k)), torch.float32)
        if target.lhs_scale == "tma":
            scale = scale.view(target.num_groups, -1, _MASKED_ROWS).transpose(1, 2)
        rows = real.touched((target.num_groups,), torch.int32)

        def call(m: int) -> None:
            gemm((lhs, scale), rhs, out, rows, m, **recipes)

        return call

    def real_bytes(self, target: Target, m_max: int) -> int:
        # Of the scales of the left operand there may be a transposed copy.
        scales = 4 * (2 * _MASKED_ROWS + _blocks(target.n)) * _blocks(target.k)
        return target.num_groups * (scales + 4) + _CLAIMED_BYTES


@dataclass(frozen=True)
class DenseBf16:
    """``(m, k) @ (n, k).T`` in bfloat16, without scales."""

    kernel_type: str
    function: str
    parameters: tuple[str, ...] = ("a", "b", "d")
    outputs: tuple[str, ...] = ("d",)

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        lhs, rhs, out = arguments["a"], arguments["b"], arguments["d"]
        n, k = rhs.shape
        return Target(
            kernel_type=self.kernel_type,
            n=n,
            k=k,
            num_groups=1,
            num_sms=num_sms,
            m_max=m_max,
            lhs_major=_major(lhs),
            rhs_major=_major(rhs),
            out_dtype=_name(out.dtype),
        )

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        import torch

        gemm = getattr(deep_gemm, self.function)
        lhs = room.operand((m_max * target.k,), torch.bfloat16)
        rhs = _laid_out(room.operand((target.n * target.k,), torch.bfloat16), target.n, target.k, target.rhs_major)
        out = room.operand((m_max, target.n), _dtype(target.out_dtype))

        def call(m: int) -> None:
            gemm(_laid_out(lhs[: m * target.k], m, target.k, target.lhs_major), rhs, out[:m])

        return call

    def real_bytes(self, target: Target, m_max: int) -> int:
        return 2 * (m_max + target.n) * target.k + _out_bytes(target, m_max)


@dataclass(frozen=True)
class HcPrenorm:
    """DeepSeek-V4's mHC prenorm: ``(m, k) @ (n, k).T`` in tf32 and the sum of squares of each row.

    ``num_groups`` of its target is the number of splits, 0 for the unsplit path.
    """

    kernel_type: str
    function: str
    parameters: tuple[str, ...] = ("a", "b", "d", "sqr_sum", "num_splits")
    outputs: tuple[str, ...] = ("d", "sqr_sum")

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        x, fn, num_splits = arguments["a"], arguments["b"], arguments.get("num_splits")
        n, k = fn.shape
        _check_k_major(x, fn)
        return Target(
            kernel_type=self.kernel_type,
            n=n,
            k=k,
            num_groups=num_splits or 0,
            num_sms=num_sms,
            m_max=m_max,
            out_dtype="float32",
        )

    def prepare(self, deep_gemm: Any, target: Target, m_max: int, room: Room) -> Call:
        import torch

        gemm = getattr(deep_gemm, self.function)
        num_splits = target.num_groups or None
        parts = max(target.num_groups, 1)
        x = room.operand((m_max, target.k), torch.bfloat16)
        fn = room.operand((target.n, target.k), torch.float32)
        out = room.operand((parts * m_max * target.n,), torch.float32)
        squares = room.operand((parts * m_max,), torch.float32)

        def call(m: int) -> None:
            leading = (m,) if num_splits is None else (num_splits, m)
            gemm(
                x[:m],
                fn,
                out[: parts * m * target.n].view(*leading, target.n),
                squares[: parts * m].view(leading),
                num_splits=num_splits,
            )

        return call

    def real_bytes(self, target: Target, m_max: int) -> int:
        parts = max(target.num_groups, 1)
        return 2 * m_max * target.k + 4 * target.n * target.k + 4 * parts * m_max * (target.n + 1)


# DeepGEMM 0.1.0 exports no grouped GEMM in bfloat16, so SGLang's kernel types of those are not here.
GEMMS: Mapping[str, Gemm] = {
    gemm.kernel_type: gemm
    for gemm in (
        Dense("GEMM_NT_F8F8BF16", "fp8_gemm_nt"),
        GroupedContiguous("GROUPED_GEMM_NT_F8F8BF16_CONTIG", "m_grouped_fp8_gemm_nt_contiguous"),
        GroupedMasked("GROUPED_GEMM_NT_F8F8BF16_MASKED", "fp8_m_grouped_gemm_nt_masked"),
        DenseBf16("GEMM_NT_BF16BF16F32", "bf16_gemm_nt"),
        HcPrenorm("TF32_HC_PRENORM_GEMM", "tf32_hc_prenorm_gemm"),
    )
}


def prepare(target: Target, m_max: int, room: Room | None = None) -> Call:
    """A function that calls DeepGEMM for an M of ``target``, up to ``m_max``; with real kernels if there is a room.

    Raises:
        UnsupportedCallError: DeepGEMM has no such kernel type, or another alignment.
    """
    import deep_gemm

    gemm = GEMMS.get(target.kernel_type)
    if gemm is None or getattr(deep_gemm, gemm.function, None) is None:
        raise UnsupportedCallError(f"the installed DeepGEMM has no {target.kernel_type}")
    if deep_gemm.get_num_sms() != target.num_sms:
        deep_gemm.set_num_sms(target.num_sms)
    return gemm.prepare(deep_gemm, target, m_max, room or ClaimedRoom())


def real_bytes(target: Target, m_max: int) -> int:
    """The GPU memory that calls up to ``m_max`` take with real kernels."""
    return GEMMS[target.kernel_type].real_bytes(target, m_max)


def recipe_arguments(target: Target) -> dict[str, tuple[int, int]]:
    """The keyword arguments of a call that says how many rows and columns share a scale."""
    recipes = {"recipe_a": target.recipe_a, "recipe_b": target.recipe_b}
    return {name: recipe for name, recipe in recipes.items() if recipe is not None}


def _fp8_target(kernel_type: str, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int = 1) -> Target:
    (lhs, lhs_scale), (rhs, rhs_scale), out = arguments["a"], arguments["b"], arguments["d"]
    *groups, n, k = rhs.shape
    return Target(
        kernel_type=kernel_type,
        n=n,
        k=k,
        num_groups=groups[0] if groups else 1,
        num_sms=num_sms,
        m_max=m_max,
        m_alignment=alignment,
        **_scaled(lhs, lhs_scale, rhs, rhs_scale, out),
        **_recipes(arguments),
    )


def _scaled(
    lhs: torch.Tensor, lhs_scale: torch.Tensor, rhs: torch.Tensor, rhs_scale: torch.Tensor, out: torch.Tensor
) -> dict[str, Any]:
    import torch

    for name, tensor, dtype in (
        ("left operand", lhs, torch.float8_e4m3fn),
        ("right operand", rhs, torch.float8_e4m3fn),
        ("left scale", lhs_scale, torch.float32),
        ("right scale", rhs_scale, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise UnsupportedCallError(f"{name} in {_name(tensor.dtype)}, expected {_name(dtype)}")
    _check_k_major(lhs, rhs)
    return {
        "lhs_scale": _lhs_layout(lhs_scale),
        "rhs_scale": _rhs_layout(rhs_scale),
        "out_dtype": _name(out.dtype),
    }


def _recipes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if arguments.get("recipe") is not None:
        raise UnsupportedCallError(f"recipe={arguments['recipe']}")
    recipes: dict[str, Any] = {}
    for name in ("recipe_a", "recipe_b"):
        recipe = arguments.get(name)
        recipes[name] = None if recipe is None else tuple(recipe)
    if recipes["recipe_a"] not in (None, (1, BLOCK)) or recipes["recipe_b"] not in (None, (BLOCK, BLOCK)):
        raise UnsupportedCallError(f"recipe_a={recipes['recipe_a']} recipe_b={recipes['recipe_b']}")
    return recipes


def _check_k_major(lhs: torch.Tensor, rhs: torch.Tensor) -> None:
    """Refuse operands that lie otherwise than ``prepare`` lays them."""
    for name, operand in (("left operand", lhs), ("right operand", rhs)):
        if _major(operand) != "k":
            raise UnsupportedCallError(f"{name} not K-major")


def _major(tensor: torch.Tensor) -> Major:
    return "k" if tensor.stride(-1) == 1 else "mn"


def _lhs_layout(scale: torch.Tensor) -> LhsScale:
    # Only contiguous scales are transposed by a kernel: all others by torch, or they are as they should be.
    aligned = _aligned(scale.shape[-2])
    is_tma = scale.stride(-2) == 1 and scale.stride(-1) == aligned
    return "k" if scale.is_contiguous() and not is_tma else "tma"


def _rhs_layout(scale: torch.Tensor) -> RhsScale:
    return "k" if scale.stride(-1) == 1 else "mn"


def _lhs_scale(target: Target, m_max: int, room: Room) -> Callable[[int], torch.Tensor]:
    import torch

    columns = _blocks(target.k)
    scales = room.touched((_aligned(m_max) * columns,), torch.float32)
    if target.lhs_scale == "k":
        return lambda m: scales[: m * columns].view(m, columns)
    return lambda m: scales.as_strided((m, columns), (1, _aligned(m)))


def _rhs_scale(target: Target, room: Room) -> torch.Tensor:
    import torch

    leading = () if target.num_groups == 1 and "GROUPED" not in target.kernel_type else (target.num_groups,)
    rows, columns = _blocks(target.n), _blocks(target.k)
    if target.rhs_scale == "k":
        return room.touched((*leading, rows, columns), torch.float32)
    return room.touched((*leading, columns, rows), torch.float32).transpose(-1, -2)


def _laid_out(flat: torch.Tensor, rows: int, columns: int, major: Major) -> torch.Tensor:
    return flat.view(rows, columns) if major == "k" else flat.view(columns, rows).t()


def _scale_bytes(target: Target, m_max: int) -> int:
    # Twice those of the left operand: DeepGEMM may make a transposed copy.
    return 4 * _blocks(target.k) * (2 * _aligned(m_max) + max(target.num_groups, 1) * _blocks(target.n))


def _out_bytes(target: Target, m_max: int) -> int:
    itemsize: int = _dtype(target.out_dtype).itemsize
    return m_max * target.n * itemsize


def _aligned(rows: int) -> int:
    return -(-rows // _TMA_ROWS) * _TMA_ROWS


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
