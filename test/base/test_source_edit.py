"""An edit changes the lines that it names in the installed source; where it would change more, it is refused."""

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.source_edit import Edit, apply_edits, edited_function

FACTOR = 10
NOTHING = object()
TARGET = "samples.function"


def scaled(number: int, offset: int = FACTOR, *, nothing: object = NOTHING) -> tuple[int, object]:
    result = number * FACTOR
    return result + offset, nothing


def ratio(dividend: int, divisor: int) -> float:
    return dividend / divisor


def loud(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@loud
def wrapped(number: int) -> int:
    return number + 1


@unchanged
def decorated(number: int) -> int:
    return number + 1


def adder(step: int) -> Callable[[int], int]:
    def add(number: int) -> int:
        return number + step

    return add


class Base:
    def greet(self) -> str:
        return "base"


class Sample(Base):
    def method(self, number: int) -> int:
        if number > 0:
            number = number + 1
        return number

    def greet(self) -> str:
        return super().greet() + " and sample"

    def text(self) -> str:
        result = """
            two levels deep
        """
        return result + "!"

    def private(self) -> int:
        self.__count = 1
        return self.__count


def refusal(original: Any, *edits: Edit) -> StandsAsideError:
    with pytest.raises(StandsAsideError) as caught:
        edited_function(original, edits or (Edit("return", "return"),), TARGET)
    return caught.value


class TestAnchors:
    def test_every_edit_is_applied(self) -> None:
        edits = (Edit("one", "1"), Edit("three", "3"))
        assert apply_edits("one two three", edits, TARGET) == "1 two 3"

    def test_edits_that_overlap_are_refused(self) -> None:
        with pytest.raises(StandsAsideError, match="two edits overlap at `two three`"):
            apply_edits("one two three", (Edit("one two", ""), Edit("two three", "")), TARGET)

    def test_no_edits_leave_the_source_as_it_is(self) -> None:
        assert apply_edits("one two", (), TARGET) == "one two"

    @pytest.mark.parametrize(("anchor", "count"), [("four", 0), ("two", 2)])
    def test_an_anchor_that_is_not_there_exactly_once_names_itself_and_what_was_found(
        self, anchor: str, count: int
    ) -> None:
        edits = (Edit("one", "1"), Edit(f"{anchor}\n", "changed\n"))
        with pytest.raises(StandsAsideError) as caught:
            apply_edits("one\ntwo\ntwo\n", edits, TARGET)
        assert caught.value.target == TARGET
        assert caught.value.reason == f"edit 2 expects `{anchor}` once in its source, found {count}"

    def test_a_long_anchor_is_named_by_its_first_line(self) -> None:
        with pytest.raises(StandsAsideError) as caught:
            apply_edits("", (Edit("    if a:\n        b()\n", ""),), TARGET)
        assert "`if a:`" in caught.value.reason
        assert "\n" not in caught.value.reason

    def test_an_anchor_is_looked_for_in_the_installed_source_not_in_earlier_replacements(self) -> None:
        edits = (Edit("one", "two"), Edit("two", "three"))
        with pytest.raises(StandsAsideError, match="edit 2 expects `two` once in its source, found 0"):
            apply_edits("one", edits, TARGET)

    def test_a_replacement_may_repeat_the_anchor_of_a_later_edit(self) -> None:
        edits = (Edit("first", "second first"), Edit("second\n", "third\n"))
        assert apply_edits("first\nsecond\n", edits, TARGET) == "second first\nthird\n"


class TestEditedFunction:
    def test_it_runs_the_edited_lines_and_leaves_the_original_alone(self) -> None:
        edited = edited_function(scaled, (Edit("number * FACTOR", "number * FACTOR * 2"),), TARGET)
        assert edited(3) == (70, NOTHING)
        assert scaled(3) == (40, NOTHING)

    def test_it_lives_in_the_globals_of_the_original(self, monkeypatch: pytest.MonkeyPatch) -> None:
        edited = edited_function(scaled, (Edit("result + offset", "result - offset"),), TARGET)
        assert edited.__globals__ is scaled.__globals__
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", 100)
        assert edited(3, 1)[0] == 299

    def test_it_adds_no_name_to_the_module(self) -> None:
        before = set(globals())
        edited_function(scaled, (Edit("result + offset", "result - offset"),), TARGET)
        assert set(globals()) == before
        assert globals()["scaled"] is scaled

    def test_it_keeps_defaults_signature_and_names(self) -> None:
        edited = edited_function(scaled, (Edit("result + offset", "result - offset"),), TARGET)
        assert edited.__defaults__ == (FACTOR,)
        assert edited.__kwdefaults__ == {"nothing": NOTHING}
        assert inspect.signature(edited) == inspect.signature(scaled)
        assert edited.__annotations__ == scaled.__annotations__
        assert (edited.__name__, edited.__qualname__) == ("scaled", "scaled")
        assert edited.__module__ == __name__

    def test_it_keeps_the_qualified_name_of_a_method(self) -> None:
        # The anchor is written with the body at column 4, although the method stands deeper.
        edit = Edit("        if number > 0:\n            number = number + 1\n", "        number = number + 2\n")
        edited = edited_function(Sample.method, (edit,), TARGET)
        assert edited.__qualname__ == "Sample.method"
        assert edited(Sample(), -5) == -3

    def test_an_edit_may_give_the_function_another_parameter(self) -> None:
        edits = (Edit("def ratio(dividend: int, divisor: int)", "def ratio(dividend: int, divisor: int = 4)"),)
        assert edited_function(ratio, edits, TARGET)(8) == 2

    def test_a_traceback_shows_the_edited_line(self) -> None:
        edited = edited_function(ratio, (Edit("dividend / divisor", "7 * dividend / divisor  # edited"),), TARGET)
        with pytest.raises(ZeroDivisionError) as caught:
            edited(1, 0)
        shown = "".join(traceback.format_exception(caught.value))
        assert "return 7 * dividend / divisor  # edited" in shown
        assert f"<sglang-warmstart edit of {TARGET}>" in shown

    @pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
    def test_annotations_are_strings_only_where_the_module_of_the_original_makes_them_so(
        self, future: str, tmp_path: Path
    ) -> None:
        with module_with(tmp_path, future + "def function(number: int) -> int:\n    return number\n") as module:
            edited = edited_function(module.function, (Edit("return number", "return -number"),), TARGET)
            assert edited(1) == -1
            assert edited.__annotations__["number"] == ("int" if future else int)

    def test_a_string_over_several_lines_keeps_its_text(self) -> None:
        edited = edited_function(Sample.text, (Edit('result + "!"', 'result + "?"'),), TARGET)
        assert edited(Sample()) == Sample().text()[:-1] + "?"

    def test_a_private_name_is_that_of_the_class(self) -> None:
        sample = Sample()
        edited = edited_function(Sample.private, (Edit("self.__count = 1", "self.__count = 2"),), TARGET)
        assert edited(sample) == 2
        assert vars(sample) == {"_Sample__count": 2}


class TestRefusals:
    def test_a_wrapped_function_is_refused(self) -> None:
        assert "already wrapped" in refusal(wrapped).reason

    def test_a_decorated_function_is_refused_also_where_the_decorator_left_no_trace(self) -> None:
        assert "plain `def`" in refusal(decorated).reason

    def test_a_closure_is_refused(self) -> None:
        assert "closure" in refusal(adder(1)).reason

    def test_a_method_that_calls_super_without_arguments_is_refused(self) -> None:
        assert "closure" in refusal(Sample.greet).reason

    def test_a_lambda_is_refused(self) -> None:
        function = lambda number: number + 1  # noqa: E731
        assert "plain `def`" in refusal(function).reason

    def test_a_function_without_source_is_refused(self) -> None:
        namespace: dict[str, FunctionType] = {}
        exec("def function():\n    return 1\n", namespace)
        assert "cannot be read" in refusal(namespace["function"]).reason

    def test_the_refusal_names_the_target(self) -> None:
        error = refusal(scaled, Edit("not there", ""))
        assert error.target == TARGET
        assert str(error) == f"{TARGET}: {error.reason}"


@contextmanager
def module_with(directory: Path, source: str) -> Iterator[ModuleType]:
    path = directory / "sample_of_source_edit.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[path.stem]
