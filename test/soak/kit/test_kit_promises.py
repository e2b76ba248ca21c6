"""The kit's own promises: no process stays behind, and what fails is reported instead of waited for."""

import os
from pathlib import Path
from typing import Any

import pytest
from kit.runner import dummy_run
from kit.server import Server
from kit.stages import StageFailed, run_stages


def _attention_layers(runner: Any, batch_size: int) -> list[str]:
    dummy_run(runner, batch_size)
    return [name for name, _ in runner.model.named_modules() if name.endswith("self_attn")]


def _die(_: Any) -> None:
    os._exit(7)


def test_a_stage_runs_its_own_layers_of_a_real_forward(tiny_model: Path) -> None:
    layers = run_stages(_attention_layers, 2, tiny_model, 4)
    assert layers == [["model.layers.0.self_attn"], ["model.layers.1.self_attn"]]


def test_a_stage_that_dies_is_reported_with_its_exit_code(tiny_model: Path) -> None:
    with pytest.raises(StageFailed, match="stage 0 died with exit code 7"):
        run_stages(_die, 1, tiny_model)


def test_stop_ends_every_process_also_after_the_main_one_was_killed(tiny_model: Path) -> None:
    with Server(tiny_model) as server:
        assert len(server.processes()) >= 3  # main, scheduler and detokenizer
        assert len(server.generate([5, 6, 7, 8], max_new_tokens=3)) == 3
        server.process.kill()
    assert server.processes() == []
    assert "fired up" in server.log


def test_a_server_that_cannot_start_says_why(tiny_model: Path) -> None:
    server = Server(tiny_model, "--no-such-flag")
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-flag"):
        server.__enter__()
    assert server.processes() == []


def _fail_on_the_last_stage(runner: Any) -> None:
    import torch.distributed

    if runner.model.end_layer == 2:
        raise ValueError("no luck on the last stage")
    torch.distributed.barrier()  # waits for a stage that never comes


def test_a_failing_stage_is_reported_with_its_traceback(tiny_model: Path) -> None:
    with pytest.raises(StageFailed, match=r"(?s)stage 1 failed:.*ValueError: no luck on the last stage"):
        run_stages(_fail_on_the_last_stage, 2, tiny_model)
