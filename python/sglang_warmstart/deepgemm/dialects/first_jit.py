"""The JIT of DeepGEMM 0.1.x.

Source: ``csrc/jit/compiler.hpp`` (command, layout and order of writing), ``csrc/jit/kernel_runtime.hpp`` (a directory
that lacks one of its two files makes DeepGEMM abort). For the digest: :mod:`sglang_warmstart.deepgemm.digest`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sglang_warmstart.deepgemm import digest
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN, SOURCE, Dialect, executable_in, executable_on_path


class FirstJit(Dialect):
    """Entries are ``kernel.NAME.DIGEST``. The digest covers the flags, and with them where DeepGEMM is installed."""

    name = "0.1"
    prefixes = ("DG",)
    files = (SOURCE, CUBIN)
    output = ("-cubin", "-o")
    compilers = ("nvcc", "nvrtc")
    is_relocatable = False

    def is_of(self, deep_gemm: Path) -> bool:
        """See :class:`Dialect`. Its JIT is within its library: it has headers for kernels alone."""
        include = deep_gemm / "include"
        return not (include / "deep_jit").exists() and (include / "deep_gemm").is_dir()

    def kernel_name(self, directory: str) -> str:
        """See :class:`Dialect`."""
        return digest.name_of(directory)

    def directory_of(self, directory: str, compiler: str, flags: str, source: str) -> str:
        """See :class:`Dialect`. The compiler counts by its release."""
        return digest.directory_of(digest.name_of(directory), digest.signature_of(compiler), flags, source)

    def entry(self, source: str, cubin: bytes, flags: str) -> Iterator[tuple[str, bytes]]:
        """See :class:`Dialect`."""
        yield SOURCE, source.encode()
        yield CUBIN, cubin

    def flags_of(self, entry: Path, compiler: str, known: Iterable[str]) -> str | None:
        """See :class:`Dialect`. The cache does not keep them: they are those that give the entry its name."""
        source = (entry / SOURCE).read_bytes().decode()
        return next(
            (flags for flags in known if self.directory_of(entry.name, compiler, flags, source) == entry.name), None
        )

    def compiler_path(self, environment: Mapping[str, str]) -> tuple[str | None, str]:
        """See :class:`Dialect`. Source: ``_find_cuda_home`` in ``deep_gemm/__init__.py``."""
        named = environment.get("DG_JIT_NVCC_COMPILER")
        home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
        if named:
            return shutil.which(named), f"DG_JIT_NVCC_COMPILER={named} is not there"
        if home:
            return executable_in(home), f"CUDA_HOME={home} has no bin/nvcc"
        path = executable_on_path(environment) or executable_in("/usr/local/cuda")
        return path, "no nvcc on the PATH, and CUDA_HOME is not set"

    def check_compiler(self, version: str) -> str:
        """See :class:`Dialect`. It takes any that says its release."""
        try:
            digest.signature_of(version)
        except ValueError as error:
            return str(error)
        return ""

    def takes_for_same(self, version: str, other: str) -> bool:
        """See :class:`Dialect`."""
        return digest.signature_of(version) == digest.signature_of(other)
