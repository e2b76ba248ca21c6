"""How a GEMM is called for a target, and which target a call has: the one is the other backwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.gpu_standins import CudaOnCpu, DeepGemm
from sglang_warmstart.deepgemm import gemms
from sglang_warmstart.deepgemm.door import named
from sglang_warmstart.deepgemm.gemms import (
    FUNCTIONS,
    GEMMS,
    ClaimedRoom,
    RealRoom,
    UnsupportedCallError,
    gemm_of,
    gemm_of_call,
)
from sglang_warmstart.deepgemm.target import Target
from torch.overrides import TorchFunctionMode

DENSE, BF16, PRENORM = "GEMM_NT_F8F8BF16", "GEMM_NT_BF16BF16F32", "TF32_HC_PRENORM_GEMM"
CONTIGUOUS, MASKED = "GROUPED_GEMM_NT_F8F8BF16_CONTIG", "GROUPED_GEMM_NT_F8F8BF16_MASKED"
BLOCK32, MXFP8 = "GEMM_NT_F8F8BF16_BLOCK32", "fp8_fp4_gemm_nt"
BF16_CONTIGUOUS, BF16_MASKED = "GROUPED_GEMM_NT_BF16_CONTIG", "GROUPED_GEMM_NT_BF16_MASKED"
ALL_CONTIGUOUS, ALL_MASKED = (CONTIGUOUS, BF16_CONTIGUOUS), (MASKED, BF16_MASKED)
GROUPED = (*ALL_CONTIGUOUS, *ALL_MASKED)
FP8 = (DENSE, CONTIGUOUS, MASKED)
SCALED = (*FP8, BLOCK32)
ALIGNMENT = 128


class GpuMemory(TorchFunctionMode):
    """Tensors on a GPU have shape, strides and dtype here, and no memory; but what they would take is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.as_tensor:  # of memory that is there already
            return torch.empty(args[0].__cuda_array_interface__["shape"], dtype=torch.uint8, device="meta")
        if kwargs.get("device") != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "meta"})
        self.taken += made.untyped_storage().nbytes()
        return made


class Library(ModuleType):
    """A ``deep_gemm`` that keeps the calls of its GEMMs."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.num_sms = 132
        for function in FUNCTIONS:
            setattr(self, function, self._keeping(function))

    def _keeping(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def get_num_sms(self) -> int:
        return self.num_sms

    def set_num_sms(self, num_sms: int) -> None:
        self.num_sms = num_sms

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return ALIGNMENT


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(sys.modules, "deep_gemm", library)
    return library


@pytest.fixture
def gpu() -> Iterator[GpuMemory]:
    with GpuMemory() as memory:
        yield memory


def target(kernel_type: str, **others: Any) -> Target:
    """A target of 384 columns and a sum over 512, which is like this where a test says nothing else."""
    groups = {**dict.fromkeys(GROUPED, 4), PRENORM: 0}
    made: dict[str, Any] = {"n": 384, "k": 512, "num_groups": groups.get(kernel_type, 1), "num_sms": 132}
    made |= {"m_max": 1024, "m_alignment": ALIGNMENT if kernel_type in ALL_CONTIGUOUS else 1}
    made |= {"lhs_scale": "k", "rhs_scale": "k"} if kernel_type in SCALED else {}
    made |= {"recipe": (1, 32, 32)} if kernel_type == BLOCK32 else {}
    made |= {"out_dtype": "float32"} if kernel_type == PRENORM else {}
    return Target(kernel_type=kernel_type, **{**made, **others})


def called(library: Library, target: Target, m: int, room: gemms.Room | None = None) -> dict[str, Any]:
    """The arguments with which DeepGEMM is called for an M of a target, by name."""
    gemms.prepare(target, target.m_max, room)(m)
    ((function, args, kwargs),) = library.calls
    library.calls.clear()
    gemm = gemm_of_call(function, kwargs.get("recipe"))
    assert gemm == gemm_of(target)
    return named(gemm, args, kwargs)


def target_of(arguments: dict[str, Any], like: Target, num_sms: int = 132) -> Target:
    gemm = gemm_of_call(gemm_of(like).function, arguments.get("recipe"))  # type: ignore[union-attr]
    return gemm.target(arguments, num_sms, like.m_max, ALIGNMENT)


# There and back


@st.composite
def targets(draw: st.DrawFn) -> tuple[Target, int]:
    """A target that a call can have, and one of its Ms."""
    kernel_type = draw(st.sampled_from([*GEMMS]))
    grouped = kernel_type in GROUPED
    groups = st.integers(1, 9) if grouped else st.sampled_from([0, 1, 3, 16] if kernel_type == PRENORM else [1])
    alignment = ALIGNMENT if kernel_type in ALL_CONTIGUOUS else 1
    others: dict[str, Any] = {}
    if kernel_type in SCALED:
        # One row of scales lies the same in either layout.
        n, k = draw(st.integers(129, 3000)), 2 * draw(st.integers(65, 1500))
        others["lhs_scale"] = draw(st.sampled_from(["k", "tma", "packed"]))
        others["rhs_scale"] = draw(st.sampled_from(["k", "mn", "packed"]))
        others["rhs_type"] = draw(st.sampled_from(["", "fp4"]))
        others["disable_ue8m0_cast"] = draw(st.booleans())
        if kernel_type == DENSE:
            others["function"] = draw(st.sampled_from(["", MXFP8]))
        if kernel_type != BLOCK32:
            rows, columns = st.sampled_from([1, 32, 128]), st.sampled_from([32, 128])
            others["recipe_a"] = draw(st.none() | st.tuples(st.just(1), columns))
            others["recipe_b"] = draw(st.none() | st.tuples(rows, columns))
            if others["recipe_a"] is others["recipe_b"] is None:
                others["recipe"] = draw(st.sampled_from([None, (1, 128, 128), (1, 1, 32)]))
    else:
        n, k = draw(st.integers(2, 3000)), draw(st.integers(2, 3000))
    if kernel_type == BF16:
        others["lhs_major"], others["rhs_major"] = (draw(st.sampled_from(["k", "mn"])) for _ in range(2))
    if kernel_type != PRENORM:
        others["out_dtype"] = draw(st.sampled_from(["bfloat16", "float32"]))
    made = target(
        kernel_type,
        n=n,
        k=k,
        num_groups=draw(groups),
        num_sms=draw(st.sampled_from([20, 78, 132])),
        m_max=alignment * draw(st.integers(2, 300)),
        **others,
    )
    return made, draw(st.sampled_from(made.m_values[1:] if alignment == 1 else made.m_values))


@given(targets())
def test_the_call_made_for_a_target_has_that_target(example: tuple[Target, int]) -> None:
    target, m = example
    library = Library()
    with pytest.MonkeyPatch.context() as monkeypatch, GpuMemory():
        monkeypatch.setitem(sys.modules, "deep_gemm", library)
        assert target_of(called(library, target, m), target, library.num_sms) == target


@given(targets())
def test_real_kernels_take_the_stated_memory(example: tuple[Target, int]) -> None:
    target, m = example
    with pytest.MonkeyPatch.context() as monkeypatch, GpuMemory() as memory:
        monkeypatch.setitem(sys.modules, "deep_gemm", Library())
        gemms.prepare(target, m, RealRoom())
        copies = 0
        if target.kernel_type in SCALED:
            # DeepGEMM makes a copy of scales that do not lie as the kernel reads them.
            (_, lhs_columns), (_, columns) = gemms.recipes(target)
            rows = target.num_groups * 128 if target.kernel_type == MASKED else -(-m // 4) * 4
            copies += 4 * rows * -(-target.k // lhs_columns) if target.lhs_scale != "packed" else 0
            rows = target.num_groups * target.n if columns == 32 and target.rhs_scale != "packed" else 0
            copies += 5 * rows * -(-target.k // columns)
        assert gemms.real_bytes(target, m) == memory.taken + copies


# The arguments, one by one


def described(value: Any) -> Any:
    """Shape, strides and dtype in place of each tensor."""
    if isinstance(value, tuple):
        return tuple(map(described, value))
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


E4M3, F32, BF, I32 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.int32
LHS, RHS, RHS_SCALE = ((6, 512), (512, 1), E4M3), ((384, 512), (512, 1), E4M3), ((3, 4), (4, 1), F32)


@pytest.mark.parametrize(
    ("lhs_scale", "expected"), [("k", ((6, 4), (4, 1), F32)), ("tma", ((6, 4), (1, 8), F32))], ids=["k", "tma"]
)
@pytest.mark.parametrize(
    ("rhs_scale", "expected_rhs"), [("k", RHS_SCALE), ("mn", ((3, 4), (1, 3), F32))], ids=["k", "mn"]
)
@pytest.mark.parametrize(("out_dtype", "out"), [("bfloat16", BF), ("float32", F32)])
def test_a_dense_call(
    lhs_scale: str,
    expected: Any,
    rhs_scale: str,
    expected_rhs: Any,
    out_dtype: str,
    out: torch.dtype,
    library: Library,
    gpu: GpuMemory,
) -> None:
    asked = target(DENSE, lhs_scale=lhs_scale, rhs_scale=rhs_scale, out_dtype=out_dtype)
    assert {name: described(value) for name, value in called(library, asked, 6).items()} == {
        "a": (LHS, expected),
        "b": (RHS, expected_rhs),
        "d": ((6, 384), (384, 1), out),
    }


def test_recipes_are_handed_on_where_the_target_has_them(library: Library, gpu: GpuMemory) -> None:
    arguments = called(library, target(DENSE, recipe_a=(1, 128), recipe_b=(128, 128)), 6)
    assert (arguments["recipe_a"], arguments["recipe_b"]) == ((1, 128), (128, 128))
    assert not {"recipe_a", "recipe_b"} & called(library, target(DENSE), 6).keys()


@pytest.mark.parametrize(
    ("lhs_scale", "expected"), [("k", ((256, 4), (4, 1), F32)), ("tma", ((256, 4), (1, 256), F32))], ids=["k", "tma"]
)
@pytest.mark.parametrize(
    ("rhs_scale", "expected_rhs"),
    [("k", ((4, 3, 4), (12, 4, 1), F32)), ("mn", ((4, 3, 4), (12, 1, 3), F32))],
    ids=["k", "mn"],
)
def test_a_contiguous_call(
    lhs_scale: str, expected: Any, rhs_scale: str, expected_rhs: Any, library: Library, gpu: GpuMemory
) -> None:
    arguments = called(library, target(CONTIGUOUS, lhs_scale=lhs_scale, rhs_scale=rhs_scale), 256)
    assert {name: described(value) for name, value in arguments.items()} == {
        "a": (((256, 512), (512, 1), E4M3), expected),
        "b": (((4, 384, 512), (384 * 512, 512, 1), E4M3), expected_rhs),
        "d": ((256, 384), (384, 1), BF),
        "grouped_layout": ((256,), (1,), I32),
    }


@pytest.mark.parametrize(
    ("lhs_scale", "expected"),
    [("k", ((4, 128, 4), (512, 4, 1), F32)), ("tma", ((4, 128, 4), (512, 1, 128), F32))],
    ids=["k", "tma"],
)
@pytest.mark.parametrize(
    ("rhs_scale", "expected_rhs"),
    [("k", ((4, 3, 4), (12, 4, 1), F32)), ("mn", ((4, 3, 4), (12, 1, 3), F32))],
    ids=["k", "mn"],
)
def test_a_masked_call(
    lhs_scale: str, expected: Any, rhs_scale: str, expected_rhs: Any, library: Library, gpu: GpuMemory
) -> None:
    arguments = called(library, target(MASKED, lhs_scale=lhs_scale, rhs_scale=rhs_scale), 77)
    assert {name: described(value) for name, value in arguments.items()} == {
        "a": (((4, 128, 512), (128 * 512, 512, 1), E4M3), expected),
        "b": (((4, 384, 512), (384 * 512, 512, 1), E4M3), expected_rhs),
        "d": ((4, 128, 384), (128 * 384, 384, 1), BF),
        "masked_m": ((4,), (1,), I32),
        "expected_m": 77,
    }


# Packed scales: (rows, columns / 4 blocks), M-major with columns padded to four rows.
PACKED = {"lhs_scale": "packed", "rhs_scale": "packed"}


def test_a_call_with_packed_scales(library: Library, gpu: GpuMemory) -> None:
    arguments = called(library, target(DENSE, n=386, k=1024, **PACKED), 6)
    assert described(arguments["a"])[1] == ((6, 2), (1, 8), I32)
    assert described(arguments["b"])[1] == ((386, 2), (1, 388), I32)
    grouped = called(library, target(MASKED, n=386, k=1024, **PACKED), 6)
    assert described(grouped["a"])[1] == ((4, 128, 2), (256, 1, 128), I32)
    assert described(grouped["b"])[1] == ((4, 386, 2), (776, 1, 388), I32)


@pytest.mark.parametrize("kernel_type", [CONTIGUOUS, MASKED])
def test_a_call_with_experts_in_fp4(kernel_type: str, library: Library, gpu: GpuMemory) -> None:
    asked = target(kernel_type, rhs_type="fp4", recipe_a=(1, 128), recipe_b=(1, 32), **PACKED)
    arguments = called(library, asked, 256)
    assert described(arguments["b"]) == (
        ((4, 384, 256), (384 * 256, 256, 1), torch.int8),
        ((4, 384, 4), (4 * 384, 1, 384), I32),
    )
    assert described(arguments["a"])[1][0][-1] == 1
    assert (arguments["recipe_a"], arguments["recipe_b"]) == ((1, 128), (1, 32))
    # Some have it as bytes without a sign.
    arguments["b"] = changed(arguments["b"], values=arguments["b"][0].view(torch.uint8))
    assert target_of(arguments, asked) == asked


def test_a_call_with_blocks_of_32(library: Library, gpu: GpuMemory) -> None:
    arguments = called(library, target(BLOCK32, lhs_scale="packed"), 6)
    assert described(arguments["a"])[1] == ((6, 4), (1, 8), I32)
    assert described(arguments["b"])[1] == ((12, 16), (16, 1), F32)
    assert arguments["recipe"] == (1, 32, 32)


def test_a_call_in_mxfp8(library: Library, gpu: GpuMemory) -> None:
    asked = target(DENSE, function=MXFP8, recipe_a=(1, 32), recipe_b=(1, 32), disable_ue8m0_cast=True, **PACKED)
    gemms.prepare(asked, 6)(6)
    ((function, _, kwargs),) = library.calls
    assert (function, kwargs) == (MXFP8, {"recipe_a": (1, 32), "recipe_b": (1, 32), "disable_ue8m0_cast": True})
    assert asked != target(DENSE, recipe_a=(1, 32), recipe_b=(1, 32), disable_ue8m0_cast=True, **PACKED)


def test_grouped_calls_in_bfloat16(library: Library, gpu: GpuMemory) -> None:
    right = ((4, 384, 512), (384 * 512, 512, 1), BF)
    contiguous = called(library, target(BF16_CONTIGUOUS), 256)
    assert {name: described(value) for name, value in contiguous.items()} == {
        "a": ((256, 512), (512, 1), BF),
        "b": right,
        "d": ((256, 384), (384, 1), BF),
        "grouped_layout": ((256,), (1,), I32),
    }
    masked = called(library, target(BF16_MASKED), 77)
    assert {name: described(value) for name, value in masked.items()} == {
        "a": ((4, 128, 512), (128 * 512, 512, 1), BF),
        "b": right,
        "d": ((4, 128, 384), (128 * 384, 384, 1), BF),
        "masked_m": ((4,), (1,), I32),
        "expected_m": 77,
    }


@pytest.mark.parametrize(
    ("lhs_major", "lhs"), [("k", ((6, 512), (512, 1), BF)), ("mn", ((6, 512), (1, 6), BF))], ids=["k", "mn"]
)
@pytest.mark.parametrize(
    ("rhs_major", "rhs"), [("k", ((384, 512), (512, 1), BF)), ("mn", ((384, 512), (1, 384), BF))], ids=["k", "mn"]
)
def test_a_call_in_bfloat16(
    lhs_major: str, lhs: Any, rhs_major: str, rhs: Any, library: Library, gpu: GpuMemory
) -> None:
    asked = target(BF16, lhs_major=lhs_major, rhs_major=rhs_major, out_dtype="float32")
    assert {name: described(value) for name, value in called(library, asked, 6).items()} == {
        "a": lhs,
        "b": rhs,
        "d": ((6, 384), (384, 1), F32),
    }


@pytest.mark.parametrize(("num_groups", "num_splits", "leading"), [(0, None, ()), (1, 1, (1,)), (16, 16, (16,))])
def test_a_prenorm_call(
    num_groups: int, num_splits: int | None, leading: tuple[int, ...], library: Library, gpu: GpuMemory
) -> None:
    arguments = called(library, target(PRENORM, n=24, num_groups=num_groups), 6)
    assert {name: described(value) for name, value in arguments.items() if name not in ("d", "sqr_sum")} == {
        "a": ((6, 512), (512, 1), BF),
        "b": ((24, 512), (512, 1), F32),
        "num_splits": num_splits,
    }
    for name, shape in (("d", (*leading, 6, 24)), ("sqr_sum", (*leading, 6))):
        assert (arguments[name].shape, arguments[name].dtype) == (shape, F32)
        assert arguments[name].is_contiguous(), "a slice of a larger one would be strided, and the library refuses it"


# On memory


@pytest.mark.parametrize("kernel_type", GEMMS)
@pytest.mark.parametrize("m", [128, 384])
def test_a_library_that_computes_finds_all_operands_where_they_say(
    kernel_type: str, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep_gemm = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm.module)
    for lhs_scale in ("k", "tma") if kernel_type in SCALED else ("",):
        with CudaOnCpu():  # real memory: reading outside of it is an error
            gemms.prepare(target(kernel_type, lhs_scale=lhs_scale), 384, RealRoom())(m)
    assert {call.m for call in deep_gemm.calls} == {m}


@pytest.mark.parametrize("kernel_type", GEMMS)
def test_while_kernels_are_recorded_operands_of_any_size_take_no_memory(
    kernel_type: str, library: Library, gpu: GpuMemory
) -> None:
    groups = {**dict.fromkeys(GROUPED, 256), PRENORM: 16}.get(kernel_type, 1)
    large = target(kernel_type, n=16384, k=16384, num_groups=groups, m_max=131072)
    called(library, large, 131072, ClaimedRoom())
    blocks = 512 if kernel_type == BLOCK32 else 128
    rhs_scales = groups * blocks * blocks * 4 if kernel_type in SCALED else 0
    lhs_scales = 131072 * blocks * 4 if kernel_type in SCALED else 0
    assert gpu.taken < rhs_scales + lhs_scales + (36 << 20)


def test_claimed_operands_begin_where_there_is_memory() -> None:
    with CudaOnCpu():
        room = ClaimedRoom()
        claimed = room.operand((1 << 20, 1 << 20), torch.bfloat16)
        assert claimed.stride() == (1 << 20, 1)
        claimed.view(-1)[:1000] = 1.5
        assert claimed.view(-1)[:1000].tolist() == [1.5] * 1000


def test_of_a_contiguous_right_operand_the_first_group_is_there(library: Library, gpu: GpuMemory) -> None:
    few, many = (target(CONTIGUOUS, num_groups=groups) for groups in (8, 256))
    taken = []
    for each in (few, many):
        gpu.taken = 0
        called(library, each, 128, RealRoom())
        taken.append(gpu.taken)
    scales_of_a_group = 3 * 4 * 4
    assert taken[1] - taken[0] == (256 - 8) * scales_of_a_group


# What is left to others


def refusal(arguments: dict[str, Any], like: Target) -> str:
    with pytest.raises(UnsupportedCallError) as refused:
        target_of(arguments, like)
    return str(refused.value)


def changed(pair: tuple[torch.Tensor, torch.Tensor], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = pair
    return others.get("values", values), others.get("scales", scales)


@pytest.mark.parametrize("kernel_type", FP8)
@pytest.mark.parametrize(
    ("name", "part", "dtype", "words"),
    [
        ("a", "values", torch.bfloat16, "left operand in bfloat16, expected float8_e4m3fn"),
        ("b", "values", torch.bfloat16, "right operand in bfloat16, expected float8_e4m3fn or packed FP4"),
        # Two values to a byte would be half as many columns.
        ("b", "values", torch.int8, "right operand in int8, expected float8_e4m3fn or packed FP4"),
        ("a", "scales", torch.int32, "left scale in int32, not M-major with columns of 16 bytes"),
        ("b", "scales", torch.int32, "right scale in int32, not M-major with columns of 16 bytes"),
        ("b", "scales", torch.uint8, "right scale in uint8, expected float32 or int32"),
    ],
)
def test_other_dtypes_are_refused_by_name(
    kernel_type: str, name: str, part: str, dtype: torch.dtype, words: str, library: Library, gpu: GpuMemory
) -> None:
    asked = target(kernel_type)
    arguments = called(library, asked, 128)
    tensor = arguments[name][("values", "scales").index(part)]
    arguments[name] = changed(arguments[name], **{part: tensor.to(dtype)})
    assert refusal(arguments, asked) == words


@pytest.mark.parametrize("kernel_type", [*FP8, PRENORM, BF16_CONTIGUOUS, BF16_MASKED])
@pytest.mark.parametrize(("name", "words"), [("a", "left operand not K-major"), ("b", "right operand not K-major")])
def test_operands_that_lie_otherwise_than_they_would_be_laid_are_refused(
    kernel_type: str, name: str, words: str, library: Library, gpu: GpuMemory
) -> None:
    asked = target(kernel_type)
    arguments = called(library, asked, 128)
    operand = arguments[name][0] if kernel_type in FP8 else arguments[name]
    other = operand.transpose(-1, -2).contiguous().transpose(-1, -2)
    arguments[name] = changed(arguments[name], values=other) if kernel_type in FP8 else other
    assert refusal(arguments, asked) == words


@pytest.mark.parametrize("kernel_type", FP8)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"recipe": (128, 128, 128)}, "recipe=(128, 128, 128)"),
        ({"recipe": (1, 128, 64)}, "recipe=(1, 128, 64)"),
        ({"recipe": (1, 128, 128), "recipe_a": (1, 128)}, "recipe=(1, 128, 128)"),
        ({"recipe_a": (1, 64)}, "recipe_a=(1, 64) recipe_b=None"),
        ({"recipe_a": (1, 128), "recipe_b": (2, 128)}, "recipe_a=(1, 128) recipe_b=(2, 128)"),
    ],
)
def test_other_recipes_are_refused_by_name(
    kernel_type: str, words: dict[str, Any], said: str, library: Library, gpu: GpuMemory
) -> None:
    asked = target(kernel_type)
    assert refusal(called(library, asked, 128) | words, asked) == said


def test_the_other_layout_of_groups_is_refused_by_name(library: Library, gpu: GpuMemory) -> None:
    asked = target(CONTIGUOUS)
    arguments = called(library, asked, 128)
    assert refusal(arguments | {"use_psum_layout": True}, asked) == "use_psum_layout"
    assert target_of(arguments | {"use_psum_layout": False}, asked) == asked


def test_recipes_come_as_lists_too(library: Library, gpu: GpuMemory) -> None:
    asked = target(DENSE, recipe_a=(1, 128), recipe_b=(128, 128))
    arguments = called(library, asked, 6) | {"recipe_a": [1, 128], "recipe_b": [128, 128]}
    assert target_of(arguments, asked) == asked
    hash(target_of(arguments, asked))


def test_another_alignment_than_that_of_the_library_is_refused(library: Library, gpu: GpuMemory) -> None:
    with pytest.raises(UnsupportedCallError, match="groups aligned to 64 rows where DeepGEMM has 128"):
        gemms.prepare(target(CONTIGUOUS, m_alignment=64), 128)


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        (target("GROUPED_GEMM_NN"), "GROUPED_GEMM_NN"),
        (target(BF16_MASKED), BF16_MASKED),
        (target(DENSE, function=MXFP8), MXFP8),
        (target(DENSE, function="fp8_gemm_tt"), "fp8_gemm_tt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_library_lacks_is_refused_by_name(lacking: Target, missing: str, library: Library) -> None:
    del library.m_grouped_bf16_gemm_nt_masked, library.fp8_fp4_gemm_nt
    with pytest.raises(UnsupportedCallError, match=f"the installed DeepGEMM has no {missing}$"):
        gemms.prepare(lacking, 128)


def test_one_function_is_called_by_two_kernel_types() -> None:
    assert gemm_of_call("fp8_gemm_nt", [1, 32, 32]) == GEMMS[BLOCK32]
    for recipe in (None, (1, 128, 128)):
        assert gemm_of_call("fp8_gemm_nt", recipe) == GEMMS[DENSE]


def test_kernels_are_built_for_the_number_of_sms_of_the_target(library: Library, gpu: GpuMemory) -> None:
    gemms.prepare(target(DENSE, num_sms=78), 128)
    assert library.num_sms == 78
