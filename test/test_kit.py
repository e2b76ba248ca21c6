"""The kit's own promises: no process stays behind, and a failing stage is reported instead of waited for."""

from pathlib import Path
from typing import Any

import pytest
from kit.environment import child_environment
from kit.ports import free_ports
from kit.stages import StageFailed, run_stages


def _fail_on_the_last_stage(runner: Any) -> None:
    import torch.distributed

    if runner.model.end_layer == 2:
        raise ValueError("no luck on the last stage")
    torch.distributed.barrier()  # waits for a stage that never comes


def test_a_failing_stage_is_reported_with_its_traceback(tiny_model: Path) -> None:
    with pytest.raises(StageFailed, match=r"(?s)stage 1 failed:.*ValueError: no luck on the last stage"):
        run_stages(_fail_on_the_last_stage, 2, tiny_model)


def test_none_removes_a_variable_from_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_INHERITED", "1")
    assert child_environment()["KIT_INHERITED"] == "1"
    assert "KIT_INHERITED" not in child_environment({"KIT_INHERITED": None})


def test_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
