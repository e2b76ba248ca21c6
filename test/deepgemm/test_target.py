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
        type(None): lambda value: (1, 128),
    }
    for name in target.__struct_fields__:
        value = getattr(target, name)
        changed = msgspec.structs.replace(target, **{name: other[type(value)](value)})
        assert changed != target
        assert len({changed, target}) == 2


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
