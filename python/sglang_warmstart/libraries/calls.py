"""A build by a call of what makes the module in its library, where there is no earlier one whose commands are known."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from sglang_warmstart.libraries.recipe import BuildError, why

# What may be called: FlashInfer's makers of modules, and those of SGLang's kernels that tvm-ffi builds.
_MODULES = ("flashinfer.", "sglang.jit_kernel.")


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of a library's own function.

    Args:
        call: the function, as "module:name".
        arguments: of it. One such as "torch.bfloat16" is torch's type.
        within: a context manager to do it in, and its arguments.
        variables: which make it ask no GPU.
        builds: whether the call itself builds. Else what it returns is FlashInfer's specification of a module.
    """

    call: str
    arguments: tuple[str | int | bool, ...] = ()
    within: tuple[str | int, ...] = ()
    variables: dict[str, str] = {}
    builds: bool = False


def is_call(form: Mapping[str, Any]) -> bool:
    """Whether a recipe's form is one."""
    return "call" in form


def prepare(form: Mapping[str, Any]) -> None:
    """Import what is called, and torch with it, which takes seconds. It changes the variables of this process."""
    what = msgspec.convert(form, Call)
    # FlashInfer reads them when it is imported, and would start CUDA here without.
    os.environ.update(what.variables)
    _function(what.call)


def build(form: Mapping[str, Any]) -> None:
    """Have the library build it, under its own lock, in a process that was prepared for it.

    Raises:
        BuildError: it cannot be.
    """
    try:
        what = msgspec.convert(form, Call)
        with _within(what):
            made = _function(what.call)(*map(_argument, what.arguments))
            # What a package has brought compiled is not built.
            if not what.builds and not made.is_aot:
                made.build(False, True)
    except Exception as error:
        # As text: what it raises need not survive the way to another process.
        raise BuildError(f"{type(error).__name__}: {why(str(error))}") from None


def _within(what: Call) -> AbstractContextManager[object]:
    if not what.within:
        return contextlib.nullcontext()
    name, *arguments = what.within
    manager: AbstractContextManager[object] = _function(str(name))(*arguments)
    return manager


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not module.startswith(_MODULES):
        raise BuildError(f"{name!r} is not called")
    return getattr(importlib.import_module(module), function)


def _argument(value: str | int | bool) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        import torch

        return getattr(torch, value.removeprefix("torch."))
    return value
