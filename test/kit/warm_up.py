"""The warm-up of kernels of a real ModelRunner, and its dummy forwards, where each release has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
