"""NVRTC with precompiled headers: another compiler for the kernels that DeepGEMM would give to nvcc.

It stays in one process and parses DeepGEMM's and CUTLASS's headers once, so a kernel takes less time than with nvcc.
Its kernels have the names in the cache that nvcc's would have, so they have a cache root of their own.

Source for the options: ``NVRTCCompiler`` in ``csrc/jit/compiler.hpp`` of DeepGEMM 0.1.x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# nvcc's own headers declare these; NVRTC has none of the CUDA runtime. One instruction each.
_PRELUDE = """#pragma once
__device__ inline void cudaGridDependencySynchronize() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void cudaTriggerProgrammaticLaunchCompletion() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
"""

_PRELUDE_NAME = "sglang_warmstart_prelude.cuh"

# Flags that NVRTC takes as they are.
_SHARED = ("-std=", "--diag-suppress=", "--ptxas-options=", "-I", "--gpu-architecture=", "-lineinfo")


class NvrtcError(Exception):
    """NVRTC is not there or refuses a source; holds its own log."""


def bindings() -> Any:
    """The module ``cuda.bindings.nvrtc``, with NVRTC behind it.

    Raises:
        NvrtcError: one of them is not there.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise NvrtcError(f"NVRTC's Python bindings (cuda-bindings) cannot be imported: {error}") from error
    try:
        # The bindings look for the library when it is first called.
        _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:
        raise NvrtcError(f"NVRTC itself (nvidia-cuda-nvrtc) cannot be loaded: {error}") from error
    return nvrtc


def version() -> str:
    """Such as ``NVRTC 13.0``.

    Raises:
        NvrtcError: NVRTC is not there.
    """
    nvrtc = bindings()
    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC {major}.{minor}"


def options(flags: str, cuda_home: Path) -> list[str]:
    """NVRTC's options for nvcc's flags.

    Args:
        flags: DeepGEMM's flags for nvcc, in one line.
        cuda_home: where CUDA's headers are.
    """
    include = cuda_home / "include"
    return [
        *(flag for flag in flags.split() if flag.startswith(_SHARED)),
        f"-I{include}",
        f"-I{include / 'cccl'}",
        "-default-device",
        "--device-int128",
    ]


def compile_source(source: str, flags: str, cuda_home: Path) -> bytes:
    """The cubin of a source. The first call in a process also makes the precompiled headers.

    Raises:
        NvrtcError: NVRTC is not there, or does not compile it.
    """
    nvrtc = bindings()
    # The prelude has a name and no place, so that it does not keep headers of an earlier call from being used again.
    program = _checked(
        nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 1, [_PRELUDE.encode()], [_PRELUDE_NAME.encode()])
    )
    wanted = [*options(flags, cuda_home), "--pch", f"-include={_PRELUDE_NAME}"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(wanted), [option.encode() for option in wanted])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise NvrtcError(f"{status.name}: {log.decode(errors='replace').strip(chr(0)).strip()}")
        cubin: bytes = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise NvrtcError(status.name)
    return values[0] if values else None
