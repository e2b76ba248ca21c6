"""TileLang's compiles, where it makes a kernel that its cache does not have. It has no hook for that.

Source: ``JITKernel`` in TileLang's ``jit/kernel.py``: its constructor compiles, unless it is told that the kernel comes
from the cache (``from_database``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.base.events import timed
from sglang_warmstart.base.hooks import Hooks, class_of

REMEDY = (
    "mhc-prewarm would have if this is mHC's and its token count lies within a prefill chunk, or TileLang's cache out "
    "of a bundle (bundle pack --include tilelang)"
)


def watch(hooks: Hooks, kernel: ModuleType) -> None:
    """Record what TileLang compiles.

    Args:
        kernel: ``tilelang.jit.kernel``.

    Raises:
        StandsAsideError: it looks different.
    """
    cls = class_of(kernel, "JITKernel")
    signature = inspect.signature(vars(cls)["__init__"])

    def __init__(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        name, shape, cached = "a kernel", "", False
        with contextlib.suppress(Exception):  # what it is given is TileLang's and TVM's; it says itself what is wrong
            given = signature.bind(*args, **kwargs).arguments
            function, cached = given.get("func"), bool(given.get("from_database"))
            name, shape = _name(function), _shape(function)
        if cached:
            original(*args, **kwargs)
            return
        with timed("jit", name, library="tilelang", shape=shape, remedy=REMEDY):
            original(*args, **kwargs)

    hooks.wrap(cls, "__init__", __init__, "self, func")


def _name(function: Any) -> str:
    attributes = getattr(function, "attrs", None)
    return str(attributes["global_symbol"]) if attributes and "global_symbol" in attributes else "a kernel"


def _shape(function: Any) -> str:
    """The shapes of a kernel's tensors; a name stands for a size that it is not specialised on."""
    buffers = getattr(function, "buffer_map", None) or {}
    return ", ".join(f"{buffer.name}: ({', '.join(map(str, buffer.shape))})" for buffer in buffers.values())
