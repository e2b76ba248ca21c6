"""The interface of a dialect."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SOURCE, CUBIN = "kernel.cu", "kernel.cubin"


class UnknownJitError(Exception):
    """A DeepGEMM that fits no dialect, in one line. Its kernels are left to it."""


class Dialect(ABC):
    """One JIT.

    Args:
        name: as markers and plans have it.
        prefixes: of its environment variables; one with an earlier prefix wins.
        files: of a whole entry in its cache, in the order in which they are written.
        output: the two options with which it tells its compiler where to write, after the source.
        compilers: kinds of compilers that can make its kernels.
        is_relocatable: whether a kernel has the same name wherever DeepGEMM is installed.
    """

    name: str
    prefixes: tuple[str, ...]
    files: tuple[str, ...]
    output: tuple[str, str]
    compilers: tuple[str, ...]
    is_relocatable: bool

    @abstractmethod
    def is_of(self, deep_gemm: Path) -> bool:
        """Whether an installed DeepGEMM (the directory of its package) has this JIT."""

    @abstractmethod
    def kernel_name(self, directory: str) -> str:
        """The kernel's name in the name of an entry.

        Raises:
            ValueError: it is no entry's.
        """

    @abstractmethod
    def directory_of(self, directory: str, compiler: str, flags: str, source: str) -> str:
        """The name of an entry, ``directory``, where the same source is compiled with these flags.

        Args:
            compiler: what it prints for ``--version``.
            flags: with the path of DeepGEMM's headers there.

        Raises:
            ValueError: the compiler's text has no release, or ``directory`` is no entry's.
        """

    @abstractmethod
    def entry(self, source: str, cubin: bytes, flags: str) -> Iterator[tuple[str, bytes]]:
        """The files of an entry, in the order in which they are written."""

    @abstractmethod
    def flags_of(self, entry: Path, compiler: str, known: Iterable[str]) -> str | None:
        """The flags with which an entry was compiled, or None if nobody can tell.

        Args:
            entry: in a cache.
            compiler: what it prints for ``--version``.
            known: the flags of this entry and of others, as a marker keeps them.

        Raises:
            OSError, ValueError: the entry cannot be read.
        """

    @abstractmethod
    def compiler_path(self, environment: Mapping[str, str]) -> tuple[str | None, str]:
        """Where its compiler is; None and a reason where it is not there."""

    @abstractmethod
    def check_compiler(self, version: str) -> str:
        """Why it would not take a compiler, by what that prints for ``--version``; empty if it would."""

    @abstractmethod
    def takes_for_same(self, version: str, other: str) -> bool:
        """Whether kernels of one compiler are found where the other is, by what both print for ``--version``."""

    def roots(self, value: str) -> tuple[Path, ...]:
        """The cache roots that the value of the cache's variable names: the one that is written first."""
        return (Path(value),)

    def is_whole(self, entry: Path) -> bool:
        """Whether all files of an entry are there. One that cannot be looked at is not: this raises nothing."""
        return all(os.path.isfile(entry / name) for name in self.files)  # noqa: PTH113  (Path.is_file does raise)

    def variables(self, suffix: str) -> tuple[str, ...]:
        """The names of a variable, such as ``DG_JIT_CACHE_DIR``; the first that is set counts."""
        return tuple(f"{prefix}_{suffix}" for prefix in self.prefixes)

    def value(self, environment: Mapping[str, str], suffix: str) -> str | None:
        """The value of a variable, None if none of its names is set."""
        return next((environment[name] for name in self.variables(suffix) if name in environment), None)

    def settings(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Its variables, but those that only say where things are: which compiler it is, its version says."""
        places = {name for suffix in ("JIT_CACHE_DIR", "JIT_NVCC_COMPILER") for name in self.variables(suffix)}
        begins = tuple(f"{prefix}_" for prefix in self.prefixes)
        return {
            name: environment[name] for name in sorted(environment) if name.startswith(begins) and name not in places
        }

    def short_name(self, directory: str) -> str:
        """A kernel as a person is to read it: its name, and enough of its digest to tell it from others."""
        return f"{self.kernel_name(directory)}.{directory.rpartition('.')[2][:8]}"


def executable_in(home: str) -> str | None:
    """nvcc of a toolkit."""
    return shutil.which("nvcc", path=str(Path(home, "bin")))


def executable_on_path(environment: Mapping[str, str]) -> str | None:
    """nvcc of the PATH."""
    return shutil.which("nvcc", path=environment.get("PATH", os.defpath))
