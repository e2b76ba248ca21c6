"""Stand-ins for what needs a GPU: kernels that do nothing, and packages whose functions do nothing.

SGLang allocates the results of its kernels in Python. So a layer can be called without them, as long as nobody needs
what such a kernel returns. Where somebody does, the layer's call fails and names it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

# Always stood in for: their libraries do not load without a driver, and their kernels would not run. A GPU server has
# them, so SGLang is to find them.
GPU_PACKAGES = ("sgl_kernel", "deep_ep", "flashinfer", "flash_mla")
# As those, but what is called are decorators: what they return is a kernel.
_LANGUAGES = ("tilelang",)
# Stood in for only if they are not installed: SGLang imports them on every machine, or on one with a Blackwell GPU.
_COMMON_PACKAGES = ("torchvision",)
_COMMON_LANGUAGES = ("cuda", "cutlass")

# Where SGLang's own JIT is: in 0.5.12, in 0.5.18 and later, and in 0.5.17. The last is a package in later ones.
_JIT = ("sglang.jit_kernel.utils", "sglang.kernels.jit.utils.compile.loader", "sglang.kernels.jit.utils.compile")


class _Anything(type):
    """A class of which every attribute is another one. A call returns nothing, or in a language the class itself."""

    is_kernel = False

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(f"{cls.__name__}.{name}", is_kernel=cls.is_kernel)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.__dict__.get("stands_in"):
            return super().__call__(*args, **kwargs)  # a class that SGLang derives from it is its own
        return cls if cls.is_kernel else None

    def __getitem__(cls, _item: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())


def _anything(name: str, *, is_kernel: bool = False) -> Any:
    return _Anything(name, (), {"stands_in": True, "is_kernel": is_kernel})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for each module of some packages."""

    def __init__(self, packages: Iterable[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _StandIn(types.ModuleType):
    """A module that has every name. A version is high enough for whoever compares it."""

    __version__ = "99.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__.partition(".")[0]
        value = _anything(name, is_kernel=package in (*_LANGUAGES, *_COMMON_LANGUAGES))
        setattr(self, name, value)
        return value


def stand_in() -> None:
    """Make all of it importable. Before SGLang is imported."""
    missing = [name for name in (*_COMMON_PACKAGES, *_COMMON_LANGUAGES) if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _Finder((*GPU_PACKAGES, *_LANGUAGES, *missing)))
    import torch

    for name in GPU_PACKAGES:
        setattr(torch.ops, name, _anything(name))
    register_fake = torch.library.register_fake

    def register(op: Any, func: Any = None, /, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.partition("::")[0] in GPU_PACKAGES:
            return (lambda function: function) if func is None else func
        return register_fake(op, func, **kwargs)

    torch.library.register_fake = register


def silence_kernels() -> None:
    """Let kernels of Triton and of SGLang's own JIT do nothing. Before the modules that use them are imported."""
    from triton.runtime import jit

    def launch(*_args: Any, **_kwargs: Any) -> None: ...

    jit.KernelInterface.__getitem__ = lambda _self, _grid: launch
    for name in _JIT:
        try:
            loader = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        own = getattr(loader, "load_jit", None)
        if own is None:
            continue
        for module in list(sys.modules.values()):
            if getattr(module, "load_jit", None) is own:
                module.load_jit = lambda *_args, **_kwargs: _anything("jit")  # type: ignore[attr-defined]
    # As an operator of torch, a function would only say the shape of its result.
    from sglang.srt.utils import custom_op

    custom_op.CustomOpWrapper.real_impl = property(lambda wrapper: wrapper.op_func)
    custom_op.register_custom_op_from_extern = lambda fn, **_kwargs: fn
