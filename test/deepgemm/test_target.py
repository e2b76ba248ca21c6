"""A target says which Ms it stands for, and is itself on its way through files and sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.recorded import RecordedTarget, recording
from sglang_warmstart.deepgemm.target import KernelUse, Target

TARGETS = [each.target for each in recording().targets]


def _target(m_max: int, m_alignment: int) -> Target:
    return Target(
        kernel_type="GEMM_NT_F8F8BF16",
        n=2112,
        k=7168,
        num_groups=1,
        num_sms=132,
        m_max=m_max,
        m_alignment=m_alignment,
    )


@given(st.integers(0, 5000), st.integers(1, 300))
def test_the_ms_of_a_target_are_the_multiples_of_its_alignment_up_to_its_maximum(m_max: int, m_alignment: int) -> None:
    expected = [m for m in range(1, m_max + 1) if m % m_alignment == 0]
    assert list(_target(m_max, m_alignment).m_values) == expected


@given(st.builds(_target, st.integers(0, 5000), st.integers(1, 300)))
def test_a_target_is_the_same_after_a_file_and_after_a_socket(target: Target) -> None:
    assert msgspec.json.decode(msgspec.json.encode(target), type=Target) == target
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(target), type=Target) == target


def test_targets_that_differ_in_anything_are_different_targets() -> None:
    target = TARGETS[0]
    other: dict[type, Callable[[Any], object]] = {
        int: lambda value: value + 1,
        str: lambda value: value + "x",
        bool: lambda value: not value,
        type(None): lambda value: (1, 128),
    }
    for name in target.__struct_fields__:
        value = getattr(target, name)
        changed = msgspec.structs.replace(target, **{name: other[type(value)](value)})
        assert changed != target
        assert len({changed, target}) == 2


# Of a marker that was written before targets had more fields than these.
WRITTEN = (
    b'{"kernel_type":"GEMM_NT_F8F8BF16","n":2112,"k":7168,"num_groups":1,"num_sms":132,"m_max":512,"m_alignment":1,'
    b'"lhs_major":"k","rhs_major":"k","lhs_scale":"tma","rhs_scale":"k","out_dtype":"bfloat16","recipe_a":null,'
    b'"recipe_b":[128,128]}'
)


def test_a_target_of_an_old_file_is_read_and_written_to_the_byte() -> None:
    target = msgspec.json.decode(WRITTEN, type=Target)
    assert target == msgspec.structs.replace(_target(512, 1), lhs_scale="tma", rhs_scale="k", recipe_b=(128, 128))
    assert msgspec.json.encode(target) == WRITTEN


def test_targets_are_in_the_order_of_their_fields_whatever_they_say() -> None:
    plain = _target(512, 1)
    others = [{"recipe_a": (1, 32)}, {"recipe_a": (1, 128)}, {"recipe": (1, 32, 32)}, {"n": 2113}, {"rhs_type": "fp4"}]
    targets = [msgspec.structs.replace(plain, **each) for each in ({}, *others)]
    first, *rest, last = sorted(reversed(targets))
    assert (first, last) == (plain, targets[4])
    assert rest == [targets[5], targets[3], targets[1], targets[2]]


def test_what_is_not_as_usual_is_shown() -> None:
    packed = msgspec.structs.replace(_target(8, 1), lhs_scale="packed", rhs_scale="k", recipe=(1, 32, 32))
    assert str(packed).endswith(" M=1..8 lhs_scale=packed recipe=1x32x32")
    fp4 = {"rhs_type": "fp4", "function": "fp8_fp4_gemm_nt", "disable_ue8m0_cast": True, "recipe_b": (1, 32)}
    assert str(msgspec.structs.replace(_target(8, 1), **fp4)).endswith(
        " M=1..8 recipe_b=1x32 rhs_type=fp4 function=fp8_fp4_gemm_nt disable_ue8m0_cast=True"
    )


def test_a_target_is_shown_as_sglang_shows_its_own() -> None:
    assert str(TARGETS[0]) == "<GEMM_NT_F8F8BF16> N=2112 K=7168 num_groups=1 num_sms=132 M=1..16384"


@pytest.mark.parametrize("recorded", recording().targets, ids=lambda each: str(each.target))
def test_the_representatives_that_were_recorded_are_ms_of_their_target(recorded: RecordedTarget) -> None:
    assert {use.m for use in recorded.kernels} <= set(recorded.target.m_values)
    # The first M always needs a kernel.
    assert min(recorded.kernels).m == recorded.target.m_values[0]


def test_kernels_are_in_the_order_of_their_ms() -> None:
    uses = [KernelUse(64, "kernel.a"), KernelUse(8, "kernel.b"), KernelUse(8, "kernel.a")]
    assert sorted(uses) == [KernelUse(8, "kernel.a"), KernelUse(8, "kernel.b"), KernelUse(64, "kernel.a")]
