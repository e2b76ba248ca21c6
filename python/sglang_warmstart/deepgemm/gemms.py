"""How to call DeepGEMM once for an M, per kernel type: the arguments of the call, and the memory that they take.

The tensors of a call come from one of two places. While kernels are recorded, stubs run in place of kernels. Nothing is
read or written, so a tensor may claim more memory than there is. Loading runs the real kernels, on real memory.

An operand in FP8 or FP4 is a pair of values and scales. A scale covers a block of rows and columns. Scales are float32,
or packed as Blackwell's kernels read them: four to an int32, each only an exponent (UE8M0).

Source: ``gemm.hpp``, ``layout.hpp`` and ``hyperconnection.hpp`` in ``csrc/apis`` and ``csrc/utils/layout.hpp`` of
DeepGEMM 0.1.x for what a call checks; ``layers/deep_gemm_wrapper/entrypoint.py`` of SGLang 0.5.12 and 0.5.23 for how it
is called there.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from sglang_warmstart.deepgemm.target import LhsScale, Major, RhsScale, Target

if TYPE_CHECKING:
    import torch

# One scale covers this many columns of an operand, and this many rows of the right one, where a call says nothing else.
BLOCK = 128
BLOCKS = (32, BLOCK)
# Scales to an int32.
PACKED = 4
# TMA wants a stride of 16 bytes: four scales, or as many int32.
_TMA_ROWS = 4
# A block of columns at the end of a group may reach this far into the next one.
_BLOCK_N_MAX = 256
# Rows of the left operand of a masked GEMM: no kernel depends on them.
_MASKED_ROWS = 128
# What operands lie over that do not have to exist.
_CLAIMED_BYTES = 1 << 16

Call = Callable[[int], None]
Recipe = tuple[int, ...]
# The positional arguments of a call for an M.
Arguments = Callable[[int], tuple[Any, ...]]


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


class MeasuringRoom:
    """Tensors without memory; it counts what they would take."""

    def __init__(self) -> None:
        self.nbytes = 0

    def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        there = math.prod(shape[:-1])
        self.nbytes += min(rows or there, there) * shape[-1] * dtype.itemsize
        return _nowhere(shape, dtype)

    def touched(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.nbytes += math.prod(shape) * dtype.itemsize
        return _nowhere(shape, dtype)

    def claimed(self) -> Room:
        self.nbytes += _CLAIMED_BYTES
        return MeasuringRoom()


def _nowhere(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


class Gemm(Protocol):
    """One function of DeepGEMM, as SGLang calls it by one kernel type."""

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

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of a call by this kernel type; None if the kernel type does not depend on it."""

    @property
    def scaled(self) -> bool:
        """Whether its operands have scales."""

    @property
    def contiguous(self) -> bool:
        """Whether groups follow each other in the rows, each aligned as DeepGEMM wants it."""

    @property
    def depends_on_m(self) -> bool:
        """Whether M takes part in the choice of a kernel."""

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        """The target of a call that is under way.

        Args:
            arguments: the call's arguments by DeepGEMM's names for them.
            alignment: rows of a group in the contiguous layout.

        Raises:
            UnsupportedCallError: a target would not say all that selects its kernel.
        """

    def arguments(self, target: Target, m_max: int, room: Room) -> Arguments:
        """The positional arguments of a call for an M up to ``m_max``, on tensors made here."""


@dataclass(frozen=True)
class _MatMul:
    """What GEMMs of two operands have in common: in bfloat16, or in FP8, where the right one may be in FP4."""

    kernel_type: str
    function: str
    scaled: bool = True
    recipe: Recipe | None = None
    parameters: tuple[str, ...] = ("a", "b", "d")
    outputs: tuple[str, ...] = ("d",)
    contiguous: bool = False
    depends_on_m: bool = True

    def target(self, arguments: Mapping[str, Any], num_sms: int, m_max: int, alignment: int) -> Target:
        if arguments.get("use_psum_layout"):
            raise UnsupportedCallError("use_psum_layout")
        described = _scaled(arguments) if self.scaled else _unscaled(arguments)
        lhs, rhs = (_values(arguments[name]) for name in ("a", "b"))
        *groups, n, _ = rhs.shape
        if groups:
            _check_k_major(lhs, rhs)
        return Target(
            kernel_type=self.kernel_type,
            n=n,
            k=lhs.shape[-1],
            num_groups=groups[0] if groups else 1,
            num_sms=num_sms,
            m_max=m_max,
            m_alignment=alignment if self.contiguous else 1,
            out_dtype=_name(arguments["d"].dtype),
            function="" if self.function == GEMMS[self.kernel_type].function else self.function,
            **described,
        )


@dataclass(frozen=True)
class Dense(_MatMul):
    """``(m, k) @ (n, k).T``."""

    def arguments(self, target: Target, m_max: int, room: Room) -> Arguments:
        lhs, rhs = _left_rows(target, m_max, room), _right(target, (), room, room)
        out = room.operand((m_max, target.n), _dtype(target.out_dtype))
        return lambda m: (lhs(m), rhs, out[:m])


@dataclass(frozen=True)
class GroupedContiguous(_MatMul):
    """``(m, k) @ (num_groups, n, k).mT``: each aligned block of rows belongs to one group, here all to the first."""

    parameters: tuple[str, ...] = ("a", "b", "d", "grouped_layout")
    contiguous: bool = True

    def arguments(self, target: Target, m_max: int, room: Room) -> Arguments:
        import torch

        # Only the first group's weights are read.
        lhs = _left_rows(target, m_max, room)
        rhs = _right(target, (target.num_groups,), room, room, rows=target.n + _BLOCK_N_MAX)
        out = room.operand((m_max, target.n), _dtype(target.out_dtype))
        group_of_row = room.touched((m_max,), torch.int32)
        return lambda m: (lhs(m), rhs, out[:m], group_of_row[:m])


@dataclass(frozen=True)
class GroupedMasked(_MatMul):
    """``(num_groups, rows, k) @ (num_groups, n, k).mT`` over the first ``masked_m`` rows of each group.

    ``expected_m`` picks the kernel. With no row in any group the kernel returns at once, so nothing of the operands has
    to exist, not even for the real kernel.
    """

    parameters: tuple[str, ...] = ("a", "b", "d", "masked_m", "expected_m")

    def arguments(self, target: Target, m_max: int, room: Room) -> Arguments:
        import torch

        claimed, leading = room.claimed(), (target.num_groups,)
        values = claimed.operand((*leading, _MASKED_ROWS, target.k), _lhs_dtype(target))
        lhs = _with_scales(values, _scales(target.lhs_scale, leading, _MASKED_ROWS, target.k, recipes(target)[0], room))
        rhs = _right(target, leading, claimed, room)
        out = claimed.operand((*leading, _MASKED_ROWS, target.n), _dtype(target.out_dtype))
        rows = room.touched(leading, torch.int32)
        return lambda m: (lhs, rhs, out, rows, m)


@dataclass(frozen=True)
class HcPrenorm:
    """DeepSeek-V4's mHC prenorm: ``(m, k) @ (n, k).T`` in tf32 and the sum of squares of each row.

    ``num_groups`` of its target is the number of splits, 0 for the unsplit path.
    """

    kernel_type: str
    function: str
    scaled: bool = False
    recipe: Recipe | None = None
    parameters: tuple[str, ...] = ("a", "b", "d", "sqr_sum", "num_splits")
    outputs: tuple[str, ...] = ("d", "sqr_sum")
    contiguous: bool = False
    depends_on_m: bool = False

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

    def arguments(self, target: Target, m_max: int, room: Room) -> Arguments:
        import torch

        num_splits = target.num_groups or None
        parts = max(target.num_groups, 1)
        x = room.operand((m_max, target.k), torch.bfloat16)
        fn = room.operand((target.n, target.k), torch.float32)
        out = room.operand((parts * m_max * target.n,), torch.float32)
        squares = room.operand((parts * m_max,), torch.float32)

        def arguments(m: int) -> tuple[Any, ...]:
            leading = (m,) if num_splits is None else (num_splits, m)
            out_of_m = out[: parts * m * target.n].view(*leading, target.n)
            return x[:m], fn, out_of_m, squares[: parts * m].view(leading), num_splits

        return arguments


_USUAL: tuple[Gemm, ...] = (
    Dense("GEMM_NT_F8F8BF16", "fp8_gemm_nt"),
    Dense("GEMM_NT_F8F8BF16_BLOCK32", "fp8_gemm_nt", recipe=(1, 32, 32)),
    GroupedContiguous("GROUPED_GEMM_NT_F8F8BF16_CONTIG", "m_grouped_fp8_gemm_nt_contiguous"),
    GroupedMasked("GROUPED_GEMM_NT_F8F8BF16_MASKED", "fp8_m_grouped_gemm_nt_masked"),
    Dense("GEMM_NT_BF16BF16F32", "bf16_gemm_nt", scaled=False),
    GroupedContiguous("GROUPED_GEMM_NT_BF16_CONTIG", "m_grouped_bf16_gemm_nt_contiguous", scaled=False),
    GroupedMasked("GROUPED_GEMM_NT_BF16_MASKED", "m_grouped_bf16_gemm_nt_masked", scaled=False),
    HcPrenorm("TF32_HC_PRENORM_GEMM", "tf32_hc_prenorm_gemm"),
)
# The other function, where SGLang calls two by one kernel type.
_ALL = (*_USUAL, Dense("GEMM_NT_F8F8BF16", "fp8_fp4_gemm_nt"))
GEMMS: Mapping[str, Gemm] = {gemm.kernel_type: gemm for gemm in _USUAL}
FUNCTIONS = frozenset(gemm.function for gemm in _ALL)


def gemm_of(target: Target) -> Gemm | None:
    """What a target calls. None if there is no such GEMM here."""
    usual = GEMMS.get(target.kernel_type)
    if usual is None or not target.function:
        return usual
    return next(
        (each for each in _ALL if (each.kernel_type, each.function) == (usual.kernel_type, target.function)), None
    )


def asked_values(target: Target) -> Sequence[int]:
    """The Ms that DeepGEMM is asked for: all of a target's, or both ends where no kernel depends on M."""
    gemm, every = gemm_of(target), target.m_values
    return every if gemm is None or gemm.depends_on_m else (every[0], every[-1])


def gemm_of_call(function: str, recipe: Sequence[int] | None) -> Gemm:
    """The GEMM by which SGLang calls a function of DeepGEMM with a recipe."""
    known = [gemm for gemm in _ALL if gemm.function == function]
    given = None if recipe is None else tuple(recipe)
    return next((gemm for gemm in known if gemm.recipe == given), known[0])


def prepare(target: Target, m_max: int, room: Room | None = None, deep_gemm: Any = None) -> Call:
    """A function that calls DeepGEMM for an M of ``target``, up to ``m_max``; with real kernels if there is a room.

    Args:
        deep_gemm: what is called in place of the installed one.

    Raises:
        UnsupportedCallError: DeepGEMM has no such kernel type, or another alignment.
    """
    if deep_gemm is None:
        deep_gemm = importlib.import_module("deep_gemm")
    gemm = gemm_of(target)
    function = None if gemm is None else getattr(deep_gemm, gemm.function, None)
    if gemm is None or function is None:
        raise UnsupportedCallError(f"the installed DeepGEMM has no {target.function or target.kernel_type}")
    if gemm.contiguous and (alignment := deep_gemm.get_mk_alignment_for_contiguous_layout()) != target.m_alignment:
        raise UnsupportedCallError(f"groups aligned to {target.m_alignment} rows where DeepGEMM has {alignment}")
    if deep_gemm.get_num_sms() != target.num_sms:
        deep_gemm.set_num_sms(target.num_sms)
    arguments, named = gemm.arguments(target, m_max, room or ClaimedRoom()), _named_arguments(target)
    return lambda m: function(*arguments(m), **named)


def real_bytes(target: Target, m_max: int) -> int:
    """The GPU memory that calls up to ``m_max`` take with real kernels."""
    gemm, room = gemm_of(target) or GEMMS[target.kernel_type], MeasuringRoom()
    gemm.arguments(target, m_max, room)
    return room.nbytes + _copied_bytes(target, m_max)


def recipes(target: Target) -> tuple[Recipe, Recipe]:
    """(rows, columns) that share a scale, of the left operand and of the right one."""
    if target.recipe is not None:
        rows, rhs_rows, columns = target.recipe
        return (rows, columns), (rhs_rows, columns)
    # Packed scales are one for each row.
    usual = (1 if target.rhs_scale == "packed" else BLOCK, BLOCK)
    return target.recipe_a or (1, BLOCK), target.recipe_b or usual


def _named_arguments(target: Target) -> dict[str, Any]:
    """The keyword arguments of a call: on the scales, where the target says something of them."""
    named = {name: getattr(target, name) for name in ("recipe", "recipe_a", "recipe_b")}
    named = {name: recipe for name, recipe in named.items() if recipe is not None}
    return named | ({"disable_ue8m0_cast": True} if target.disable_ue8m0_cast else {})


# A call's arguments, read.


def _values(operand: Any) -> torch.Tensor:
    values: torch.Tensor = operand[0] if isinstance(operand, (tuple, list)) else operand
    return values


def _unscaled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"lhs_major": _major(arguments["a"]), "rhs_major": _major(arguments["b"])}


def _scaled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    (lhs, lhs_scale), (rhs, rhs_scale) = arguments["a"], arguments["b"]
    is_fp4 = rhs.dtype in (torch.int8, torch.uint8) and 2 * rhs.shape[-1] == lhs.shape[-1]
    for name, tensor, expected in (("left", lhs, ""), ("right", rhs, " or packed FP4")):
        if tensor.dtype != torch.float8_e4m3fn and not (is_fp4 and tensor is rhs):
            raise UnsupportedCallError(
                f"{name} operand in {_name(tensor.dtype)}, expected {_name(torch.float8_e4m3fn)}{expected}"
            )
    for name, scale in (("left", lhs_scale), ("right", rhs_scale)):
        if scale.dtype == torch.int32 and not _is_packed(scale):
            raise UnsupportedCallError(f"{name} scale in int32, not M-major with columns of 16 bytes")
        if scale.dtype not in (torch.float32, torch.int32):
            raise UnsupportedCallError(f"{name} scale in {_name(scale.dtype)}, expected float32 or int32")
    _check_k_major(lhs, rhs)
    return {
        "lhs_scale": "packed" if lhs_scale.dtype == torch.int32 else _lhs_layout(lhs_scale),
        "rhs_scale": "packed" if rhs_scale.dtype == torch.int32 else _rhs_layout(rhs_scale),
        "rhs_type": "fp4" if is_fp4 else "",
        "disable_ue8m0_cast": bool(arguments.get("disable_ue8m0_cast")),
        **_recipes(arguments),
    }


def _recipes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: arguments.get(name) for name in ("recipe", "recipe_a", "recipe_b")}
    found = {name: None if recipe is None else tuple(recipe) for name, recipe in given.items()}
    if reason := wrong_recipe(**found):
        raise UnsupportedCallError(reason)
    return found


def wrong_recipe(recipe: Recipe | None, recipe_a: Recipe | None, recipe_b: Recipe | None) -> str:
    """What it is about the recipes of a call that nothing here describes; empty if they are fine."""
    if recipe is not None:
        is_known = recipe_a is None and recipe_b is None
        recipe_a, recipe_b = (recipe[0], recipe[2]), recipe[1:]
        said = f"recipe={recipe}"
    else:
        is_known, said = True, f"recipe_a={recipe_a} recipe_b={recipe_b}"
    is_known &= recipe_a is None or (recipe_a[0] == 1 and recipe_a[1] in BLOCKS)
    is_known &= recipe_b is None or (recipe_b[0] in (1, *BLOCKS) and recipe_b[1] in BLOCKS)
    return "" if is_known else said


def _check_k_major(lhs: torch.Tensor, rhs: torch.Tensor) -> None:
    """Refuse operands that lie otherwise than they are laid here."""
    for name, operand in (("left operand", lhs), ("right operand", rhs)):
        if _major(operand) != "k":
            raise UnsupportedCallError(f"{name} not K-major")


def _major(tensor: torch.Tensor) -> Major:
    return "k" if tensor.stride(-1) == 1 else "mn"


def _lhs_layout(scale: torch.Tensor) -> LhsScale:
    # Only contiguous scales are transposed by a kernel: all others by torch, or they are as they should be.
    return "k" if scale.is_contiguous() and not _is_tma(scale) else "tma"


def _rhs_layout(scale: torch.Tensor) -> RhsScale:
    return "k" if scale.stride(-1) == 1 else "mn"


def _is_tma(scale: torch.Tensor) -> bool:
    strides: tuple[int, ...] = scale.stride()
    return strides[-2:] == (1, _aligned(scale.shape[-2]))


def _is_packed(scale: torch.Tensor) -> bool:
    *groups, rows, columns = scale.shape
    padded = _aligned(rows)
    expected = (*(padded * columns for _ in groups), 1, padded)
    # The stride of a single row or column is anything.
    return all(
        length == 1 or found == wanted
        for length, found, wanted in zip(scale.shape, scale.stride(), expected, strict=True)
    )


# A call's arguments, made.


def _left_rows(target: Target, m_max: int, room: Room) -> Callable[[int], Any]:
    """The left operand of (m, k), for an M."""
    values = room.operand((m_max * target.k,), _lhs_dtype(target))
    scales = _flat_scales(target.lhs_scale, (), m_max, target.k, recipes(target)[0], room)

    def lhs(m: int) -> Any:
        return _with_scales(_laid_out(values[: m * target.k], m, target.k, target.lhs_major), scales and scales(m))

    return lhs


def _right(target: Target, leading: tuple[int, ...], values: Room, scales: Room, rows: int | None = None) -> Any:
    """The right operand of (*leading, n, k), with the first ``rows`` rows of its values if they are given.

    Args:
        values, scales: where they lie.
    """
    import torch

    shape, dtype = (*leading, target.n, target.k), _lhs_dtype(target)
    if target.rhs_type == "fp4":
        shape, dtype = (*leading, target.n, target.k // 2), torch.int8
    if target.rhs_major == "mn":
        shape = (*leading, shape[-1], target.n)
    operand = values.operand(shape, dtype, rows=rows)
    operand = operand if target.rhs_major == "k" else operand.transpose(-1, -2)
    return _with_scales(operand, _scales(target.rhs_scale, leading, target.n, target.k, recipes(target)[1], scales))


def _with_scales(values: torch.Tensor, scales: torch.Tensor | None) -> Any:
    return values if scales is None else (values, scales)


def _scales(layout: str, leading: tuple[int, ...], mn: int, k: int, recipe: Recipe, room: Room) -> torch.Tensor | None:
    """Scales of an operand of (*leading, mn, k); none if the layout is empty."""
    scales = _flat_scales(layout, leading, mn, k, recipe, room)
    return None if scales is None else scales(mn)


def _flat_scales(
    layout: str, leading: tuple[int, ...], mn: int, k: int, recipe: Recipe, room: Room
) -> Callable[[int], torch.Tensor] | None:
    """For up to ``mn`` rows of an operand, its scales."""
    import torch

    if not layout:
        return None
    rows, columns = _blocks(mn, recipe[0]), _scale_columns(layout, k, recipe)
    padded = _aligned(rows) if layout in ("tma", "packed") else rows
    dtype = torch.int32 if layout == "packed" else torch.float32
    return partial(
        _laid_scales, room.touched((math.prod(leading) * padded * columns,), dtype), layout, leading, columns, recipe
    )


def _laid_scales(
    flat: torch.Tensor, layout: str, leading: tuple[int, ...], columns: int, recipe: Recipe, mn: int
) -> torch.Tensor:
    rows = _blocks(mn, recipe[0])
    padded = _aligned(rows) if layout in ("tma", "packed") else rows
    strides = (columns, 1) if layout == "k" else (1, padded)
    return flat.as_strided((*leading, rows, columns), (*(padded * columns for _ in leading), *strides))


def _laid_out(flat: torch.Tensor, rows: int, columns: int, major: Major) -> torch.Tensor:
    return flat.view(rows, columns) if major == "k" else flat.view(columns, rows).t()


def _copied_bytes(target: Target, m_max: int) -> int:
    """The memory that DeepGEMM takes for scales in the layout that a kernel reads, if it has to make them."""
    if not target.lhs_scale:
        return 0
    lhs_recipe, rhs_recipe = recipes(target)
    rows = target.num_groups * _MASKED_ROWS if "MASKED" in target.kernel_type else _aligned(m_max)
    lhs = 0 if target.lhs_scale == "packed" else rows * _scale_columns(target.lhs_scale, target.k, lhs_recipe)
    # Of the right ones there is a copy where a kernel has one for each row: for block 32.
    is_copied = target.rhs_scale != "packed" and rhs_recipe[1] != BLOCK
    rhs = target.num_groups * target.n * _scale_columns(target.rhs_scale, target.k, rhs_recipe) if is_copied else 0
    # As they are, and packed four to one.
    return 4 * lhs + 5 * rhs


def _scale_columns(layout: str, k: int, recipe: Recipe) -> int:
    return _blocks(k, recipe[1] * (PACKED if layout == "packed" else 1))


def _lhs_dtype(target: Target) -> torch.dtype:
    return _dtype("float8_e4m3fn" if target.lhs_scale else "bfloat16")


def _aligned(rows: int) -> int:
    return -(-rows // _TMA_ROWS) * _TMA_ROWS


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
