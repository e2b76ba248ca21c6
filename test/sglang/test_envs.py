"""The product's switches read and behave like the ones that SGLang declares itself."""

from __future__ import annotations

import os
import warnings

import pytest
from sglang.srt.environ import EnvBool, Envs, EnvStr, envs

SWITCHES = {
    "SGLANG_WARMSTART": True,
    "SGLANG_WARMSTART_STRICT": False,
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": False,
}
# One of SGLang's own, to compare with.
NEIGHBOUR = "SGLANG_JIT_DEEPGEMM_FAST_WARMUP"


@pytest.fixture(params=SWITCHES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for each in (request.param, NEIGHBOUR):
        monkeypatch.delenv(each, raising=False)
    return str(request.param)


def test_a_switch_is_declared_as_its_neighbours_are(name: str) -> None:
    assert isinstance(vars(Envs)[name], EnvBool)
    assert getattr(envs, name).name == name


def test_unset_means_the_default(name: str) -> None:
    switch = getattr(envs, name)
    assert switch.get() is SWITCHES[name]
    assert not switch.is_set()


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "y", "0", "false", "FALSE", "no", "N"])
def test_words_mean_what_they_mean_for_a_neighbour(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (name, NEIGHBOUR):
        monkeypatch.setenv(each, word)
    switch = getattr(envs, name)
    assert switch.get() is getattr(envs, NEIGHBOUR).get() is (word.lower() in ("1", "true", "yes", "y"))
    assert switch.is_set()


@pytest.mark.parametrize("word", ["maybe", "", "2", "on"])
def test_an_unknown_value_warns_by_name_and_gives_the_default(
    name: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (name, NEIGHBOUR):
        monkeypatch.setenv(each, word)
    said = []
    for each in (name, NEIGHBOUR):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(envs, each).get()
        said.append(str(caught[0].message).replace(each, "NAME").replace(str(value), "DEFAULT"))
        assert value is SWITCHES.get(each, False)
        assert each in str(caught[0].message)
    assert said[0] == said[1]


def test_set_and_clear_write_the_environment(name: str) -> None:
    switch = getattr(envs, name)
    switch.set(True)
    assert os.environ[name] == "True"
    assert switch.get() is True
    switch.set(False)
    assert switch.get() is False
    assert switch.is_set()
    switch.clear()
    assert name not in os.environ
    assert switch.get() is SWITCHES[name]


def test_override_ends_with_its_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = getattr(envs, name)
    with switch.override(not SWITCHES[name]):
        assert switch.get() is not SWITCHES[name]
    assert not switch.is_set()
    monkeypatch.setenv(name, "1")
    with switch.override(False):
        assert switch.get() is False
    assert os.environ[name] == "1"


def test_a_switch_has_no_truth_of_its_own(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"\.get\(\)"):
        bool(getattr(envs, name))


COMPILER = "SGLANG_WARMSTART_COMPILER"


def test_the_choice_of_the_compiler_is_a_word_with_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMPILER, raising=False)
    switch = getattr(envs, COMPILER)
    assert isinstance(vars(Envs)[COMPILER], EnvStr)
    assert switch.name == COMPILER
    assert (switch.get(), switch.is_set()) == ("nvcc", False)
    with switch.override("nvrtc"):
        assert os.environ[COMPILER] == "nvrtc"
        assert (switch.get(), switch.is_set()) == ("nvrtc", True)
    assert not switch.is_set()
