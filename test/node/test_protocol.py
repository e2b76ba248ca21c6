"""What goes over the socket: every message arrives as it was sent, and nothing else does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import KernelUse, Target
from sglang_warmstart.node import protocol
from sglang_warmstart.node.protocol import (
    Announce,
    Answer,
    Hello,
    Message,
    ProtocolError,
    Restore,
    Warm,
    Warmed,
    Welcome,
)

numbers = st.integers(0, 1 << 40)
texts = st.text(max_size=20)
pairs = st.tuples(st.integers(1, 128), st.integers(1, 128))
targets = st.builds(
    Target,
    kernel_type=texts,
    n=numbers,
    k=numbers,
    num_groups=numbers,
    num_sms=numbers,
    m_max=numbers,
    m_alignment=numbers,
    lhs_major=st.sampled_from(["k", "mn"]),
    rhs_major=st.sampled_from(["k", "mn"]),
    lhs_scale=st.sampled_from(["", "k", "tma"]),
    rhs_scale=st.sampled_from(["", "k", "mn"]),
    out_dtype=texts,
    recipe_a=st.none() | pairs,
    recipe_b=st.none() | pairs,
)
some_targets = st.lists(targets, max_size=3).map(tuple)
some_texts = st.lists(texts, max_size=3).map(tuple)
gpus = st.builds(Gpu, texts, numbers, st.tuples(numbers, numbers), numbers, st.none() | texts)
kernels = st.lists(st.builds(KernelUse, numbers, texts), max_size=3).map(tuple)
outcomes = st.builds(Warmed, targets, kernels, texts, st.booleans(), st.booleans())
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        cache=texts,
        environment=st.dictionaries(texts, texts, max_size=3),
        deep_gemm=texts,
        gpu=gpus,
        launch=st.dictionaries(texts, texts, max_size=3),
        kind=st.sampled_from(["nvcc", "nvrtc"]),
        workers=st.none() | numbers,
    ),
    st.builds(Welcome, some_texts, texts),
    st.just(Restore()),
    st.builds(Announce, some_targets, numbers),
    st.builds(Warm, some_targets, numbers, st.floats(0, 1000)),
    st.builds(Answer, st.lists(outcomes, max_size=3).map(tuple), numbers, some_texts),
)


@given(messages)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    frame = protocol.encode(message)
    prefix, body = frame[: protocol.LENGTH.size], frame[protocol.LENGTH.size :]
    assert protocol.length_of(prefix) == len(body)
    assert protocol.decode(body) == message


@given(messages, st.data())
def test_a_message_that_is_cut_off_is_none(message: Message, data: st.DataObject) -> None:
    body = protocol.encode(message)[protocol.LENGTH.size :]
    with pytest.raises(ProtocolError, match="not a message"):
        protocol.decode(body[: data.draw(st.integers(0, len(body) - 1))])


@given(st.binary(max_size=100))
def test_bytes_are_a_message_or_refused(body: bytes) -> None:
    try:
        protocol.decode(body)
    except ProtocolError as error:
        assert str(error).startswith("not a message: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "Farewell"},
        {"type": "Announce"},
        {"type": "Announce", "targets": [], "free_bytes": "much"},
        {"type": "Announce", "targets": [{"kernel_type": "GEMM"}], "free_bytes": 1},
        ["Restore"],
    ],
)
def test_a_message_of_another_kind_or_with_other_fields_is_refused(wrong: object) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        protocol.decode(msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize(
    "recipe",
    [
        {"form": {"a": {(1, 2): 3}}},
        {"form": {"a": msgspec.msgpack.Ext(5, b"x")}},
        *({"form": {"a": 1}, "seconds": seconds} for seconds in (float("inf"), float("nan"), -1.0)),
    ],
    ids=["keys that are no text", "another type", "inf", "nan", "-1"],
)
@pytest.mark.parametrize("kind", ["Build", "Compiled"])
def test_a_recipe_that_no_plan_can_hold_is_refused(kind: str, recipe: dict[str, object]) -> None:
    body = msgspec.msgpack.encode({"type": kind, "recipe": {"library": "triton", "name": "k", "made": "m", **recipe}})
    with pytest.raises(ProtocolError, match=r"a recipe that no plan can hold|not a message"):
        protocol.decode(body)


def test_a_length_that_nobody_sends_is_refused() -> None:
    assert protocol.length_of(protocol.LENGTH.pack(protocol.LIMIT)) == protocol.LIMIT
    with pytest.raises(ProtocolError, match=f"a message of {protocol.LIMIT + 1} bytes"):
        protocol.length_of(protocol.LENGTH.pack(protocol.LIMIT + 1))


def test_all_targets_of_a_large_server_fit_into_a_message() -> None:
    target = Target(kernel_type="GEMM_NT_F8F8BF16", n=2112, k=7168, num_groups=1, num_sms=132, m_max=16384)
    uses = tuple(KernelUse(m, f"kernel.sm90_fp8_gemm_1d2d.{m:032x}") for m in range(100))
    assert len(protocol.encode(Answer((Warmed(target, uses),) * 1000))) < protocol.LIMIT
