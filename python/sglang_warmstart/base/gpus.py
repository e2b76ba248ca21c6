"""The GPUs of this machine, by NVML: torch would start CUDA in the process that asks."""

from __future__ import annotations


def capabilities() -> set[tuple[int, int]]:
    """The compute capabilities of all GPUs; empty where NVML does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return {tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)) for gpu in gpus}
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return set()
