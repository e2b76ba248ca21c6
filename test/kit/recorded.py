"""Kernels that DeepGEMM asked for on an H200: sources, flags and names as it gave them, per target."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
from sglang_warmstart.deepgemm import digest
from sglang_warmstart.deepgemm.compiler import CompileJob, compile_kernel
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import KernelUse, Target

from kit.toolchain import toolchain

RECORDING = Path(__file__).parents[1] / "deepgemm" / "recorded.json"


class KernelText(msgspec.Struct, frozen=True):
    """What DeepGEMM gave to the compiler.

    Args:
        source: CUDA source.
        flags: in one line; "{include}" stands for the directory of DeepGEMM's headers.
    """

    source: str
    flags: str

    def flags_for(self, include: Path) -> str:
        """The flags where DeepGEMM's headers are in `include`."""
        return self.flags.replace("{include}", str(include))


class RecordedTarget(msgspec.Struct, frozen=True):
    """A target and all its kernels, by ascending M."""

    target: Target
    kernels: tuple[KernelUse, ...]


class Recording(msgspec.Struct, frozen=True):
    """All that was recorded.

    Args:
        gpu, deep_gemm: where, and of which build.
        compiler: what nvcc printed for `--version`.
        installed_in: the directory of the package `deep_gemm` there.
        targets: with the names that DeepGEMM gave to their kernels.
        kernels: by those names.
    """

    gpu: str
    deep_gemm: str
    compiler: str
    installed_in: str
    targets: tuple[RecordedTarget, ...]
    kernels: dict[str, KernelText]

    def relocated(self, directory: str, include: Path, m: int = 1) -> RecordedKernel:
        """A kernel as DeepGEMM would ask for it if its headers were in `include`: under another name, then."""
        text = self.kernels[directory]
        flags = text.flags_for(include)
        name, signature = digest.name_of(directory), digest.signature_of(self.compiler)
        return RecordedKernel(digest.directory_of(name, signature, flags, text.source), text.source, flags, m)

    def named(self, name: str, include: Path) -> list[RecordedKernel]:
        """The kernels with this name, such as `transpose_fp32`, in the order of the recording."""
        return [self.relocated(directory, include) for directory in self.kernels if digest.name_of(directory) == name]

    def of_target(self, kernel_type: str, n: int, k: int, include: Path) -> tuple[Target, list[RecordedKernel]]:
        """The first target of this shape, and its kernels."""
        found = next(
            each
            for each in self.targets
            if (each.target.kernel_type, each.target.n, each.target.k) == (kernel_type, n, k)
        )
        return found.target, [self.relocated(use.directory, include, use.m) for use in found.kernels]


@cache
def recording() -> Recording:
    """The recording beside the tests."""
    return msgspec.json.decode(RECORDING.read_bytes(), type=Recording)


@cache
def real_cubin() -> bytes:
    """The smallest recorded kernel, compiled by the toolchain's nvcc. Takes a second, once."""
    found = toolchain()
    (kernel,) = recording().named("transpose_fp32", found.include)
    return compile_kernel(CompileJob(kernel.source, kernel.flags, found.compiler(), limit_s=120))
