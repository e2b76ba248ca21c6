"""The switches read as SGLang reads its own, and an empty variable is one that is not set."""

import warnings
from typing import Any

import pytest
from sglang_warmstart.base.switches import (
    COMPILER,
    ONLY,
    PLUGIN_NAME,
    STRICT,
    SWITCHES,
    WARMSTART,
    WORKERS,
    Switch,
    boolean,
    left_out_by,
)

KNOWN_WORDS = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}
UNKNOWN_WORDS = ("maybe", "on", "off", "2", " 1")


@pytest.mark.parametrize(("word", "value"), KNOWN_WORDS.items())
def test_a_known_word_counts_in_any_case_and_without_a_complaint(word: str, value: bool) -> None:
    for switch in (WARMSTART, STRICT):
        for spelled in (word, word.upper(), word.capitalize()):
            assert switch.read({switch.name: spelled}) == (value, None)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_a_switch_that_is_not_set_or_empty_has_its_default_and_no_complaint(switch: Switch[Any]) -> None:
    assert switch.read({}) == switch.read({switch.name: ""}) == (switch.default, None)


@pytest.mark.parametrize(
    ("switch", "word", "what"),
    [
        *((STRICT, word, "a valid boolean value, using the default 0") for word in UNKNOWN_WORDS),
        (WARMSTART, "maybe", "a valid boolean value, using the default 1"),
        *((WORKERS, word, "a number above 0, using the default") for word in ("0", "-1", "1.5", "many", " 4")),
        (COMPILER, "NVRTC", "nvcc or nvrtc, using the default nvcc"),
    ],
)
def test_a_word_that_is_not_understood_is_said_in_one_line_and_leaves_the_default(
    switch: Switch[Any], word: str, what: str
) -> None:
    assert switch.read({switch.name: word}) == (switch.default, f'{switch.name}: "{word}" is not {what}')


@pytest.mark.parametrize("word", [*KNOWN_WORDS, *UNKNOWN_WORDS, "TRUE", "No"])
def test_sglang_reads_the_same_value_from_the_same_word(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = pytest.importorskip("sglang.srt.environ", reason="compares with SGLang")
    name = "SGLANG_WARMSTART_TEST_OF_SWITCHES"
    field = environ.EnvBool(True)
    field.name = name
    monkeypatch.setenv(name, word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Switch(name, True, boolean, "a switch of this test").value({name: word}) is field.get()


def test_numbers_choices_and_lists_are_parsed() -> None:
    assert [WORKERS.value({WORKERS.name: word}) for word in ("1", "16", "007")] == [1, 16, 7]
    assert COMPILER.value({COMPILER.name: "nvrtc"}) == "nvrtc"
    assert ONLY.value({ONLY.name: " a, b ,,c"}) == ("a", "b", "c")


@pytest.mark.parametrize("plugins", ["", ",", " ", "warmstart", "other", "other, warmstart", "warmstart,", "Warmstart"])
def test_sglang_leaves_us_out_where_we_say_that_it_does(plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = pytest.importorskip("sglang.srt.plugins", reason="compares with SGLang")
    monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    loaded = PLUGIN_NAME in loader.load_plugins_by_group(loader.GENERAL_PLUGINS_GROUP)
    assert (left_out_by({"SGLANG_PLUGINS": plugins}) is None) is loaded


def test_switches_are_named_once_each_and_say_what_they_are_for() -> None:
    assert len({switch.name for switch in SWITCHES}) == len(SWITCHES)
    assert all(switch.name.startswith("SGLANG_") and switch.meaning for switch in SWITCHES)
