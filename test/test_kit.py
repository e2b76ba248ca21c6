"""The kit's own promises; those about processes are in soak/kit."""

import pytest
from kit.environment import child_environment
from kit.ports import free_ports


def test_none_removes_a_variable_from_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_INHERITED", "1")
    assert child_environment()["KIT_INHERITED"] == "1"
    assert "KIT_INHERITED" not in child_environment({"KIT_INHERITED": None})


def test_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
