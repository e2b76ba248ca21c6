"""The GPUs of this machine, by NVML: torch would start CUDA in the process that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def capabilities() -> set[tuple[int, int]]:
    """The compute capabilities of all GPUs; empty where NVML does not say."""
    return _of_all(lambda nvml, gpu: tuple(nvml.nvmlDeviceGetCudaComputeCapability(gpu)))


def names() -> set[str]:
    """What their driver calls them; empty where NVML does not say."""
    return _of_all(lambda nvml, gpu: str(nvml.nvmlDeviceGetName(gpu)))


def _of_all(ask: Callable[[Any, Any], T]) -> set[T]:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return {ask(pynvml, gpu) for gpu in gpus}
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return set()
