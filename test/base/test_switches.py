"""The switches read as SGLang reads its own."""

import warnings

import pytest
from sglang_warmstart.base.settings import number_above_0
from sglang_warmstart.base.switches import (
    COMPILER,
    PLUGIN_NAME,
    PLUGINS,
    STRICT,
    SWITCHES,
    WARMSTART,
    WORKERS,
    Switch,
    complaint_about,
    is_on,
    left_out_by,
)

KNOWN_WORDS = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}
UNKNOWN_WORDS = ("maybe", "", "on", "off", "2", " 1")


@pytest.mark.parametrize("switch", [WARMSTART, STRICT])
@pytest.mark.parametrize(("word", "value"), KNOWN_WORDS.items())
def test_a_known_word_counts_in_any_case_and_without_a_complaint(switch: Switch, word: str, value: bool) -> None:
    for spelled in (word, word.upper(), word.capitalize()):
        assert is_on(switch, {switch.name: spelled}) == (value, None)


@pytest.mark.parametrize(("switch", "default"), [(WARMSTART, True), (STRICT, False)])
def test_a_switch_that_is_not_set_has_its_default_and_no_complaint(switch: Switch, default: bool) -> None:
    assert is_on(switch, {}) == (default, None)


@pytest.mark.parametrize(("switch", "default"), [(WARMSTART, True), (STRICT, False)])
@pytest.mark.parametrize("word", UNKNOWN_WORDS)
def test_an_unknown_word_is_complained_of_and_leaves_the_default(switch: Switch, default: bool, word: str) -> None:
    value, complaint = is_on(switch, {switch.name: word})
    assert value is default
    assert complaint is not None
    assert switch.name in complaint
    assert f'"{word}"' in complaint
    assert "\n" not in complaint


@pytest.mark.parametrize("word", [*KNOWN_WORDS, *UNKNOWN_WORDS, "TRUE", "No"])
def test_sglang_reads_the_same_value_from_the_same_word(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = pytest.importorskip("sglang.srt.environ", reason="compares with SGLang")
    name = "SGLANG_WARMSTART_TEST_OF_SWITCHES"
    field = environ.EnvBool(True)
    field.name = name
    monkeypatch.setenv(name, word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert is_on(Switch(name, "1", "a switch of this test"), {name: word})[0] is field.get()


@pytest.mark.parametrize(("word", "value"), [("1", 1), ("16", 16), ("007", 7)])
def test_a_number_counts(word: str, value: int) -> None:
    assert number_above_0(WORKERS.name, {WORKERS.name: word}) == (value, None)
    assert complaint_about(WORKERS, {WORKERS.name: word}) is None


@pytest.mark.parametrize("word", ["", "0", "-1", "1.5", "many", " 4"])
def test_what_is_no_number_above_0_is_complained_of_and_is_none(word: str) -> None:
    assert number_above_0(WORKERS.name, {WORKERS.name: word})[0] is None
    assert complaint_about(WORKERS, {WORKERS.name: word}) == (
        f'{WORKERS.name}: "{word}" is not a number above 0, using the default'
    )


def test_a_number_that_is_not_set_is_none_whatever_sglangs_default_is() -> None:
    assert number_above_0(WORKERS.name, {}) == (None, None)
    assert complaint_about(WORKERS, {}) is None


@pytest.mark.parametrize(("word", "is_known"), [("nvcc", True), ("nvrtc", True), ("NVRTC", False), ("", False)])
def test_a_choice_is_one_of_its_words(word: str, is_known: bool) -> None:
    complaint = complaint_about(COMPILER, {COMPILER.name: word})
    assert complaint == (None if is_known else f'{COMPILER.name}: "{word}" is not nvcc or nvrtc, using the default')


def test_nothing_is_wrong_with_a_list_of_plugins_and_a_boolean_is_complained_of_as_such() -> None:
    assert complaint_about(PLUGINS, {PLUGINS.name: "whatever"}) is None
    assert complaint_about(STRICT, {STRICT.name: "maybe"}) == is_on(STRICT, {STRICT.name: "maybe"})[1]


@pytest.mark.parametrize("plugins", ["", PLUGIN_NAME, f"{PLUGIN_NAME},other", f" other , {PLUGIN_NAME} ", None])
def test_a_plugin_list_that_is_empty_or_names_us_loads_us(plugins: str | None) -> None:
    assert left_out_by({} if plugins is None else {"SGLANG_PLUGINS": plugins}) is None


@pytest.mark.parametrize("plugins", ["other", "other,another", "warmstart2", "Warmstart"])
def test_a_plugin_list_without_us_is_handed_back(plugins: str) -> None:
    assert left_out_by({"SGLANG_PLUGINS": plugins}) == plugins


@pytest.mark.parametrize("plugins", ["", ",", " ", "warmstart", "other", "other, warmstart", "warmstart,"])
def test_sglang_leaves_us_out_where_we_say_that_it_does(plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = pytest.importorskip("sglang.srt.plugins", reason="compares with SGLang")
    monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    loaded = PLUGIN_NAME in loader.load_plugins_by_group(loader.GENERAL_PLUGINS_GROUP)
    assert (left_out_by({"SGLANG_PLUGINS": plugins}) is None) is loaded


def test_switches_are_named_once_each_and_say_what_they_are_for() -> None:
    assert len({switch.name for switch in SWITCHES}) == len(SWITCHES)
    assert all(switch.name.startswith("SGLANG_") and switch.meaning for switch in SWITCHES)
