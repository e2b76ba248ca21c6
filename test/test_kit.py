"""The kit's own promises; those about processes are in soak/kit."""

import re
from pathlib import Path

import pytest
from kit.environment import child_environment
from kit.ports import free_ports
from kit.release import VERSIONS, Release


def test_none_removes_a_variable_from_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_INHERITED", "1")
    assert child_environment()["KIT_INHERITED"] == "1"
    assert "KIT_INHERITED" not in child_environment({"KIT_INHERITED": None})


def test_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_the_releases_of_the_kit_are_those_of_make() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    made = re.findall(r"^RELEASES_OF_\w+ := (.*)$", makefile, re.MULTILINE)
    assert " ".join(made).split() == list(VERSIONS)


@pytest.mark.parametrize(
    ("version", "other", "is_since"),
    [
        ("0.5.12", "0.5.12", True),
        ("0.5.9", "0.5.12", False),
        ("0.5.12.post1", "0.5.12", True),
        ("0.5.23", "0.6", False),
    ],
)
def test_a_release_knows_its_age(version: str, other: str, is_since: bool) -> None:
    assert Release(version).since(other) is is_since
