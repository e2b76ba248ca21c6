"""A package in which every name exists and nothing works.

What a GPU is needed for, and nothing else: SGLang imports these packages on every machine, but a forward on a CPU never
calls into them. A stand-in lets the import succeed; whatever is then really called fails at once, because a stand-in's
names are empty classes.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence


class _AnyMember(type):
    """A class whose every member is its own dotted name, so that reading an enum-like constant works at import."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _any_attribute(name: str) -> type:
    # Dunder names are the import system's own questions: an invented `__wrapped__` or `__file__` would mislead it.
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyMember(name, (), {})


def _answer_everything(module: types.ModuleType) -> None:
    module.__getattr__ = _any_attribute  # type: ignore[method-assign]
    module.__path__ = []


class _AnySubmodule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module for every name below one package."""

    def __init__(self, package: str) -> None:
        self._prefix = package + "."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        _answer_everything(module)


def stand_in(package: str) -> None:
    """Let the package of this name, which is being imported, answer every attribute and every submodule."""
    _answer_everything(sys.modules[package])
    sys.meta_path.append(_AnySubmodule(package))
