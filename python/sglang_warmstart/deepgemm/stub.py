"""The stub: the cubin that stands in for a kernel while kernels are recorded.

DeepGEMM loads and launches it like any other, but it does nothing. So it must never get into a cache that serves. It
carries a mark, and the publisher refuses a cubin with that mark.
"""

from __future__ import annotations

MARK = b"sglang_warmstart_stub"

SOURCE = f'extern "C" __global__ void {MARK.decode()}() {{}}\n'


def is_stub(cubin: bytes) -> bool:
    """Whether a cubin bears the mark: the name of its only kernel."""
    return MARK in cubin


def flags_for(capability: tuple[int, int]) -> list[str]:
    """The compiler's flags for a stub that a GPU of this compute capability loads."""
    major, minor = capability
    return [f"--gpu-architecture=sm_{major}{minor}"]
