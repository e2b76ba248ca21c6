"""A failure of ours is one warning, and the original behaviour."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_warmstart.base.errors import IntendedError, passing
from sglang_warmstart.base.guard import guarded
from sglang_warmstart.base.switches import STRICT


class Original:
    """Counts its calls, and returns or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, number: int) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return number + 1


def before(_: Callable[..., int], number: int) -> int:
    raise ValueError("ours, before")


def after(original: Callable[..., int], number: int) -> int:
    original(number)
    raise ValueError("ours, after\nand more")


def swallowing(original: Callable[..., int], number: int) -> int:
    with contextlib.suppress(KeyError):
        original(number)
    raise ValueError("ours, in place of the original's")


@pytest.mark.parametrize("around", [before, after])
def test_the_caller_gets_what_the_original_returns_which_is_called_once(around: Callable[..., int]) -> None:
    original, said = Original(), list[str]()
    guard = guarded("a feature", around, original, said.append)
    assert [guard(1), guard(2)] == [2, 3]
    assert original.calls == 2
    assert len(said) == 1 and said[0].startswith(
        "warmstart: a feature failed, SGLang goes on without it: ValueError: ours"
    )
    assert "\n" not in said[0]


@pytest.mark.parametrize("around", [lambda call, number: call(number), swallowing], ids=["passed on", "hidden"])
def test_what_the_original_raises_reaches_the_caller(around: Callable[..., int]) -> None:
    error = KeyError("the original's")
    original = Original(error)
    with pytest.raises(KeyError) as raised:
        guarded("a feature", around, original, lambda _: None)(1)
    assert raised.value is error
    assert original.calls == 1


def test_an_error_that_is_intended_passes() -> None:
    def refuse(_: Callable[..., int], number: int) -> int:
        raise IntendedError("refused")

    def call_sglang(_: Callable[..., int], number: int) -> int:
        with passing():
            raise RuntimeError("SGLang's own")

    for around, kind in ((refuse, IntendedError), (call_sglang, RuntimeError)):
        original = Original()
        with pytest.raises(kind):
            guarded("a feature", around, original)(1)
        assert original.calls == 0


def test_in_strict_mode_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT.name, "1")
    with pytest.raises(ValueError, match="ours, before"):
        guarded("a feature", before, Original())(1)


@given(st.lists(st.sampled_from(["call", "raise", "return"]), max_size=4), st.booleans())
def test_whatever_we_do_the_original_is_called_once_or_as_often_as_we_called_it(steps: list[str], fails: bool) -> None:
    """As seen from outside: a result or an error of the original, or a result that we chose to return."""
    original = Original(KeyError("the original's") if fails else None)

    def around(call: Callable[..., int], number: int) -> Any:
        for step in steps:
            if step == "call":
                call(number)
            elif step == "raise":
                raise ValueError("ours")
            else:
                return "chosen"
        return "chosen"

    try:
        result: Any = guarded("a feature", around, original, lambda _: None)(1)
    except KeyError:
        result = "the original's error"
    ends = next((step for step in steps if step != "call"), "return")
    calls = steps.index(ends) if ends in steps else len(steps)
    if calls and fails:
        assert (result, original.calls) == ("the original's error", 1)
    elif ends == "return":
        assert (result, original.calls) == ("chosen", calls)
    else:
        assert original.calls == max(calls, 1)
        assert result == ("the original's error" if fails else 2)
