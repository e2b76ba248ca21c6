"""The warm-up of kernels of a real ModelRunner, and its dummy forwards, where each release has them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner


def warm_up(runner: ModelRunner) -> None:
    """What SGLang does before it captures CUDA graphs."""
    if hasattr(runner, "kernel_warmup"):
        runner.kernel_warmup()
        return
    runner._kernel_warmed_up = False  # it was on the CPU, where there is nothing to warm
    runner.eager_runner.warmup()


def dummy_runner(runner: ModelRunner) -> Any:
    """What has the dummy forward."""
    return runner if hasattr(runner, "kernel_warmup") else runner.eager_runner


def dummy_forward(runner: ModelRunner, batch_size: int, mode: ForwardMode) -> None:
    """SGLang's own dummy forward of a mode."""
    owner = dummy_runner(runner)
    buffers = {} if owner is runner else {"buffers": owner._alloc_dummy_decode_buffers(batch_size)}
    owner._dummy_run(batch_size, forward_mode_override=mode, **buffers)


def autotuned_is(do: Callable[[], object], runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SGLang do this where it autotunes FlashInfer, and nothing else."""
    owner = dummy_runner(runner)
    if hasattr(owner, "_should_run_flashinfer_autotune"):
        decides_here = owner._should_run_flashinfer_autotune

        def should_run() -> bool:
            decides_here()  # it is hooked on 0.5.14
            return True

        monkeypatch.setattr(owner, "_should_run_flashinfer_autotune", should_run)
        monkeypatch.setattr(owner, "_flashinfer_autotune", lambda **_: do())
        return
    # What decides is hooked: let it decide, and do this when it has.
    module = sys.modules["sglang.srt.model_executor.runner.base_runner"]
    decides = module.should_run_flashinfer_autotune

    def should_run_flashinfer_autotune(model_runner: ModelRunner) -> bool:
        decides(model_runner)
        do()
        return False

    monkeypatch.setattr(module, "should_run_flashinfer_autotune", should_run_flashinfer_autotune)
