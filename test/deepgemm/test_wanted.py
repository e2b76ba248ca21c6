"""Targets in a file: what is said stays, what is left out is as in SGLang's calls."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.recorded import recording
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.deepgemm.wanted import WantedError, read

H200 = gpu_of("h200")
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
        {"kernel_type": st.sampled_from(sorted({each.kernel_type for each in TARGETS}))},
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
