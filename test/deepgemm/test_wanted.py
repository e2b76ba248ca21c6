"""Targets in a file: what is said stays, what is left out is as in SGLang's calls."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.nogpu import BLACKWELL
from kit.recorded import recording
from sglang_warmstart.deepgemm.gemms import GEMMS
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.deepgemm.wanted import WantedError, moved, read

H200, B200 = gpu_of("h200"), gpu_of("b200")
DENSE = {"kernel_type": "GEMM_NT_F8F8BF16", "n": 4096, "k": 7168}
BLOCK32 = {**DENSE, "kernel_type": "GEMM_NT_F8F8BF16_BLOCK32"}
EXPERTS = {**DENSE, "kernel_type": "GROUPED_GEMM_NT_F8F8BF16_CONTIG", "num_groups": 8}
BF16 = {**DENSE, "kernel_type": "GEMM_NT_BF16BF16F32"}
PACKED = {"lhs_scale": "packed", "rhs_scale": "packed"}
# Beside that which every target has.
FIELDS = [name for name in Target.__struct_fields__ if name != "kernel_type"]
TARGETS = [each.target for each in recording().targets]


def test_the_targets_of_a_real_server_are_read_as_they_are() -> None:
    assert read(msgspec.json.encode(TARGETS), H200) == list(dict.fromkeys(TARGETS))


def test_what_is_left_out_is_as_in_a_real_server() -> None:
    for target in TARGETS:
        if (
            target.num_sms == H200.num_sms
            and target.m_max == 16384
            and (target.lhs_major, target.rhs_major) == ("k", "k")
        ):
            least = {"kernel_type": target.kernel_type, "n": target.n, "k": target.k, "num_groups": target.num_groups}
            (found,) = read(msgspec.json.encode([least]), H200)
            assert msgspec.structs.replace(found, lhs_scale=target.lhs_scale) == target


@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(msgspec.json.encode))
def test_nonsense_is_one_line(data: bytes) -> None:
    with pytest.raises(WantedError) as error:
        read(data, H200)
    assert "\n" not in str(error.value)


@given(
    st.fixed_dictionaries(
        {"kernel_type": st.sampled_from(sorted(GEMMS))},
        optional={name: st.integers(-2, 1 << 41) | st.text(max_size=3) for name in FIELDS},
    )
)
def test_a_target_is_read_whole_or_refused(item: dict[str, object]) -> None:
    try:
        (target,) = read(msgspec.json.encode([item]), H200)
    except WantedError as error:
        assert "\n" not in str(error)
        return
    assert min(target.n, target.k, target.m_max, target.num_sms, target.m_alignment) >= 1


def fields(item: dict[str, object], gpu: Gpu) -> dict[str, object]:
    """What differs from the least that a target has."""
    (found,) = read(msgspec.json.encode([item]), gpu)
    least = Target(kernel_type="", n=0, k=0, num_groups=0, num_sms=0, m_max=0)
    given = {"num_groups", "num_sms", "m_max", *item}
    names = [name for name in Target.__struct_fields__ if name not in given]
    return {name: getattr(found, name) for name in names if getattr(found, name) != getattr(least, name)}


@pytest.mark.parametrize(
    ("item", "on_h200", "on_b200"),
    [
        (DENSE, {"lhs_scale": "tma", "rhs_scale": "k"}, PACKED),
        (
            BLOCK32,
            {"lhs_scale": "tma", "rhs_scale": "k", "recipe": (1, 32, 32)},
            {"lhs_scale": "packed", "rhs_scale": "k", "recipe": (1, 32, 32)},
        ),
        (EXPERTS, {"lhs_scale": "tma", "rhs_scale": "k", "m_alignment": 128}, {**PACKED, "m_alignment": 128}),
        (BF16, {"out_dtype": "float32"}, {"out_dtype": "float32"}),
        (
            {**DENSE, "function": "fp8_fp4_gemm_nt"},
            {"lhs_scale": "tma", "rhs_scale": "k", "recipe_a": (1, 32), "recipe_b": (1, 32)},
            {**PACKED, "recipe_a": (1, 32), "recipe_b": (1, 32), "disable_ue8m0_cast": True},
        ),
    ],
    ids=["dense", "block 32", "experts", "bf16", "MXFP8"],
)
def test_what_is_left_out_is_as_on_that_gpu(
    item: dict[str, object], on_h200: dict[str, object], on_b200: dict[str, object]
) -> None:
    assert fields(item, H200) == on_h200
    assert fields(item, B200) == on_b200


def test_experts_in_fp4_have_their_recipes() -> None:
    recipes = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    assert fields({**EXPERTS, "rhs_type": "fp4"}, B200) == {**PACKED, **recipes, "m_alignment": 128}
    other = {"recipe_a": [1, 32], "recipe_b": [1, 32]}
    assert fields({**EXPERTS, "rhs_type": "fp4", **other}, B200) == {**PACKED, "m_alignment": 128}


@pytest.mark.parametrize(
    ("item", "gpu", "reason"),
    [
        (
            {**DENSE, **PACKED},
            H200,
            "lhs_scale is packed, which needs Blackwell, and NVIDIA H200 has compute capability",
        ),
        ({**DENSE, "rhs_scale": "packed"}, H200, "rhs_scale is packed, which needs Blackwell"),
        ({**EXPERTS, "rhs_type": "fp4"}, H200, "rhs_type is fp4, which needs Blackwell"),
        ({**EXPERTS, "rhs_type": "fp8"}, B200, "Invalid enum value 'fp8'"),
        ({**EXPERTS, "rhs_type": "fp4", "k": 7200}, B200, "K is 7200, and packed scales of 128 columns each need"),
        (
            {**EXPERTS, "rhs_type": "fp4", "k": 7200, "lhs_scale": "k"},
            B200,
            "K is 7200, and FP4 needs a multiple of 128",
        ),
        ({**DENSE, "k": 7200}, B200, "K is 7200, and packed scales of 128 columns each need a multiple"),
        ({**DENSE, "recipe": [1, 128, 128]}, B200, "rhs_scale is packed: there is one for each row, and not for 128"),
        ({**DENSE, "recipe": [1, 32, 32]}, B200, "SGLang calls that by another kernel type than GEMM_NT_F8F8BF16"),
        ({**BLOCK32, "recipe": [1, 128, 128]}, B200, "SGLang calls that by another kernel type than GEMM_NT_F8F8BF16_"),
        ({**BLOCK32, "recipe": None}, B200, "recipe is None, and SGLang calls that by another kernel type"),
        ({**DENSE, "recipe": [1, 64, 64]}, H200, "recipe=(1, 64, 64): DeepGEMM has blocks of 32 and 128 columns"),
        ({**DENSE, "recipe_a": [1, 128]}, H200, "recipe_a and recipe_b go together"),
        ({**DENSE, "lhs_scale": ""}, H200, "has scales: lhs_scale and rhs_scale cannot be empty"),
        ({**DENSE, "rhs_major": "mn"}, B200, "operands of GEMM_NT_F8F8BF16 are K-major"),
        ({**DENSE, "function": "fp8_gemm_tt"}, B200, "function is 'fp8_gemm_tt', and SGLang calls no such function by"),
        ({**BF16, "lhs_scale": "packed"}, B200, "lhs_scale is set, and GEMM_NT_BF16BF16F32 has no scales"),
        ({**BF16, "recipe": [1, 32, 32]}, B200, "recipe is set, and GEMM_NT_BF16BF16F32 has no scales"),
        ({**BF16, "rhs_type": "fp4"}, B200, "rhs_type is set, and GEMM_NT_BF16BF16F32 has no scales"),
    ],
)
def test_what_deep_gemm_cannot_have_is_one_line(item: dict[str, object], gpu: Gpu, reason: str) -> None:
    with pytest.raises(WantedError) as error:
        read(msgspec.json.encode([item]), gpu)
    assert reason in str(error.value)
    assert str(error.value).startswith("target 1: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BLACKWELL)
def test_what_is_recorded_on_blackwell_can_be_asked_for(name: str) -> None:
    target, _ = BLACKWELL[name]
    assert read(msgspec.json.encode([target]), B200) == [target]


def test_a_target_on_another_gpu_has_the_scales_that_are_usual_there() -> None:
    (hopper,), (blackwell,) = (read(msgspec.json.encode([DENSE]), gpu) for gpu in (H200, B200))
    there = moved(hopper, H200.num_sms, B200)
    assert there == blackwell != hopper
    assert moved(there, B200.num_sms, H200) == hopper
    fewer = msgspec.structs.replace(hopper, num_sms=120)
    assert moved(fewer, 132, gpu_of("h20")).num_sms == 78 - 12
    # What a server passes otherwise than usual is kept, where it can be.
    assert moved(msgspec.structs.replace(hopper, lhs_scale="k"), 132, gpu_of("h20")).lhs_scale == "k"
