"""What NVML says on a machine with a GPU, for processes that are started on one without."""

from __future__ import annotations

from pathlib import Path

_MODULE = """
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(_): return {name!r}
def nvmlDeviceGetCudaComputeCapability(_): return {capability!r}
"""


def write_nvml(place: Path, name: str, capability: tuple[int, int] = (9, 0)) -> Path:
    """Write a module ``pynvml`` that knows one GPU into a directory. Returns the directory."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "pynvml.py").write_text(_MODULE.format(name=name, capability=capability))
    return place
