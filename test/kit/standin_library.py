"""A stand-in for DeepGEMM in recording children: it picks kernels by M, in steps, and builds them as DeepGEMM does.

The service takes it for its ``library``. It has no heuristics and no GPU, but what the recorder sees of DeepGEMM is as
in the original: the compiler is looked for when the first kernel is built, runs through a shell, and leaves its files
in a temporary directory that is renamed to the kernel's own.

Source: ``csrc/jit/compiler.hpp`` and ``csrc/jit/kernel_runtime.hpp`` of DeepGEMM 0.1.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sglang_warmstart.deepgemm.digest import directory_of, signature_of
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import KernelUse, Target

# What its compiler prints for --version, and its own short name for that.
VERSION = "Cuda compilation tools, release 13.0, V13.0.88\n"
SIGNATURE = "NVCC13.0"
FLAGS = (
    "-std=c++20 --diag-suppress=39,161 --ptxas-options=--register-usage-level=10 "
    "--gpu-architecture=sm_90a --compiler-options=-fPIC,-O3,-Wno-abi -O3 --expt-relaxed-constexpr"
)
LINE_INFO = " -Xcompiler -rdynamic -lineinfo"

# The name of a GPU that gives no context: in exclusive-process mode, say, the rank has the only one.
TAKEN_GPU = "a GPU in exclusive-process mode"

_BLOCKS_M = (16, 32, 64, 128)

# How a target's kernel type says what is to go wrong, as in "a GEMM that hangs at 33".
_MISHAP = re.compile(r"(raises|exits|is killed|hangs) at (\d+)")


class Kernel(NamedTuple):
    """What DeepGEMM gives to its compiler."""

    name: str
    source: str

    @property
    def directory(self) -> str:
        """Where DeepGEMM looks for it in its cache."""
        return directory_of(self.name, SIGNATURE, FLAGS, self.source)


def kernels_of(target: Target, m: int) -> list[Kernel]:
    """The kernels of a call. N and K select one, but are not in it: targets share kernels."""
    # The prenorm GEMM has one kernel for every M.
    is_prenorm = "hc_prenorm" in target.kernel_type.lower()
    block_m = 64 if is_prenorm else next((block for block in _BLOCKS_M if m <= block), 256)
    block_n = 64 if target.n < 1024 else 128
    stages = 4 if target.k < 4096 else 8
    name = "standin.gemm" if "with a dot in its name" in target.kernel_type else "standin_gemm"
    parts = [Kernel(name, _source(name, f"{block_m}x{block_n}, {stages} stages, {target.num_sms} SMs"))]
    if target.lhs_scale == "k":
        # First of all the scales are transposed, for every M by the same kernel.
        parts.insert(0, Kernel("standin_transpose", _source("standin_transpose", f"{stages} stages")))
    return parts


def definition(target: Target) -> tuple[KernelUse, ...]:
    """The kernels of a target and the smallest M of each, by trying every M."""
    smallest: dict[str, int] = {}
    for m in target.m_values:
        for kernel in kernels_of(target, m):
            smallest.setdefault(kernel.directory, m)
    return tuple(sorted(KernelUse(m, directory) for directory, m in smallest.items()))


def _source(name: str, what: str) -> str:
    # All that a careless copy would change, and no end of line at the end.
    text = f'// {name}: {what}\n#define S "\\t\\\\$HOME `id` %s\'"\t// \u00b5m \r\n'
    return text + f'extern "C" __global__ void {name}() {{}}'


class Jit:
    """DeepGEMM's JIT compiler and its cache.

    Args:
        environment: read when the first kernel is built.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._loaded: set[Kernel] = set()

    def build(self, kernel: Kernel) -> None:
        """Have a kernel in this process's memory.

        Raises:
            RuntimeError: in DeepGEMM's words.
        """
        if kernel in self._loaded:
            return
        directory = self._root / "cache" / directory_of(kernel.name, self._signature, self._flags, kernel.source)
        if not self._is_whole(directory):
            temporary = self._root / "tmp" / str(uuid.uuid4())
            temporary.mkdir(parents=True)
            self._compile(kernel.source, temporary)
            directory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                temporary.rename(directory)
            if not self._is_whole(directory):
                raise RuntimeError("Assertion error (csrc/jit/compiler.hpp:151): runtime != nullptr")
        self._loaded.add(kernel)

    @cached_property
    def _root(self) -> Path:
        return Path(self._environment["DG_JIT_CACHE_DIR"])

    @cached_property
    def _compiler(self) -> str:
        return self._environment["DG_JIT_NVCC_COMPILER"]

    @cached_property
    def _flags(self) -> str:
        return FLAGS + (LINE_INFO if self._environment.get("DG_JIT_WITH_LINEINFO", "0") != "0" else "")

    @cached_property
    def _signature(self) -> str:
        status, said = _run(f"{self._compiler} --version")
        if status != 0:
            raise RuntimeError("Assertion error (csrc/jit/compiler.hpp:184): return_code == 0")
        return signature_of(said)

    def _compile(self, source: str, directory: Path) -> None:
        code, cubin = directory / "kernel.cu", directory / "kernel.cubin"
        code.write_bytes(source.encode())
        # Nothing is quoted, as in the original.
        status, said = _run(f"cd {directory} && {self._compiler} {code} -cubin -o {cubin} {self._flags}")
        if status != 0:
            print(f"NVCC compilation failed: {said}", flush=True)
            raise RuntimeError(
                'Assertion error (csrc/jit/compiler.hpp:234): false and "NVCC compilation failed"\n(no more is known)'
            )

    @staticmethod
    def _is_whole(directory: Path) -> bool:
        if not directory.exists():
            return False
        if not ((directory / "kernel.cu").exists() and (directory / "kernel.cubin").exists()):
            raise RuntimeError('Assertion error (csrc/jit/kernel_runtime.hpp:96): false and "Corrupted JIT cache"')
        return True


def _run(command: str) -> tuple[int, str]:
    ended = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return ended.returncode, ended.stdout.decode(errors="replace")


def open_device(gpu: Gpu) -> None:
    """Get a CUDA context on the rank's GPU."""
    if gpu.name == TAKEN_GPU:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nFor debugging, consider ...")


def prepare(target: Target, m_max: int) -> Callable[[int], None]:
    """A function that has the kernels of an M built."""
    if "cannot be called" in target.kernel_type:
        raise ValueError(f"the installed DeepGEMM has no {target.kernel_type}")
    if "names its modules" in target.kernel_type:
        raise ValueError(" ".join(sorted(name for name in sys.modules if name.startswith("sglang_warmstart."))))
    jit, mishap = Jit(), _MISHAP.search(target.kernel_type)

    def call(m: int) -> None:
        if mishap is not None and m == int(mishap[2]):
            _MISHAPS[mishap[1]]()
        for kernel in kernels_of(target, m):
            jit.build(kernel)

    return call


def _raise() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`")


def _hang() -> None:
    # As in the driver: in C, with the GIL held, so that no other thread of Python runs either.
    ctypes.PyDLL(None).pause()


_MISHAPS: Mapping[str, Callable[[], None]] = {
    "raises": _raise,
    "exits": lambda: os._exit(7),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": _hang,
}
