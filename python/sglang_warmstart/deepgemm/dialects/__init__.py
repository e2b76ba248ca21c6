"""What differs between the JITs that DeepGEMM has had: one object each, chosen by looking at the installed library."""

from __future__ import annotations

from pathlib import Path

from sglang_warmstart.deepgemm.dialects.deepjit import DeepJit
from sglang_warmstart.deepgemm.dialects.dialect import Dialect, UnknownJitError
from sglang_warmstart.deepgemm.dialects.first_jit import FirstJit

__all__ = [
    "DEEPJIT",
    "DIALECTS",
    "FIRST_JIT",
    "Dialect",
    "UnknownJitError",
    "dialect_of",
    "kernel_name",
    "named",
    "short_name",
]

FIRST_JIT, DEEPJIT = FirstJit(), DeepJit()
DIALECTS: tuple[Dialect, ...] = (FIRST_JIT, DEEPJIT)


def dialect_of(deep_gemm: Path) -> Dialect:
    """The dialect of an installed DeepGEMM.

    Args:
        deep_gemm: the directory of the package.

    Raises:
        UnknownJitError: it fits none; names what was looked at.
    """
    for dialect in DIALECTS:
        if dialect.is_of(deep_gemm):
            return dialect
    raise UnknownJitError(f"the JIT of the DeepGEMM in {deep_gemm} is not known to this version")


def named(name: str) -> Dialect:
    """The dialect that a marker or a plan names.

    Raises:
        UnknownJitError: there is none of that name.
    """
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    raise UnknownJitError(f"of a DeepGEMM whose JIT is not known to this version ({name!r})")


def kernel_name(directory: str) -> str:
    """The kernel's name in the name of an entry of any dialect: they are told apart by their form.

    Raises:
        ValueError: it is no entry's.
    """
    return _by_form(directory).kernel_name(directory)


def short_name(directory: str) -> str:
    """A kernel as a person is to read it.

    Raises:
        ValueError: ``directory`` is no entry's name.
    """
    return _by_form(directory).short_name(directory)


def _by_form(directory: str) -> Dialect:
    return DEEPJIT if directory.count(".") == 1 else FIRST_JIT
