"""TileLang: watched where it makes a kernel that its cache does not have. Its cache can be moved."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.events import now
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.libraries import machine, tilelang_ahead
from sglang_warmstart.libraries import recipe as recipes
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.machine import NOT_INSTALLED, Environment
from sglang_warmstart.libraries.monitor import compiling
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.tilelang_ahead import described, entry_of, made_at


class TileLang(Library):
    """TileLang.

    An entry of the cache is a directory; ``params.pkl`` is written last, each file is renamed into place. The
    directory's name is a hash over the kernel, options, TileLang's version, and size and modification time in
    nanoseconds of ``libtilelang.so``, but not over the version of CUDA's compiler. There is no lock: the first to
    rename wins.
    """

    name = "tilelang"
    distributions = ("tilelang",)
    # Python sources that are written each time, and a library that torch builds.
    left_out = ("tmp", "py-cache", "sparse_compressor", "*.lock")
    module = "tilelang.jit.kernel"
    hooks: ClassVar[Mapping[str, str]] = {
        "tilelang.jit.kernel.JITKernel.__init__": "TileLang has no hook; it compiles here what its cache does not have"
    }
    remedy = (
        "mhc-prewarm would have if this is mHC's and its token count lies within a prefill chunk, or TileLang's cache "
        "out of a bundle (bundle pack --include tilelang)"
    )
    ahead = tilelang_ahead.__name__
    variables = ("TILELANG_*",)

    def root(self, environment: Environment) -> Path | None:
        """Source: ``Environment`` in ``tilelang/env.py``.

        With an empty variable, TileLang cannot be imported.
        """
        named = environment.get("TILELANG_CACHE_DIR")
        if named is not None:
            return machine.absolute(Path(named)) if named else None
        # Without a home, TileLang has a directory "~".
        return machine.absolute((machine.home(environment) or Path("~")) / ".tilelang" / "cache")

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``KernelCache`` in ``tilelang/cache/kernel_cache.py``; its kernels are called through tvm-ffi."""
        package, library = machine.package("tilelang"), NOT_INSTALLED
        if package is not None and (path := package / "lib" / "libtilelang.so").is_file():
            status = path.stat()
            library = f"{status.st_size} bytes of {status.st_mtime_ns} ns"
        return {
            "tilelang": machine.version(*self.distributions),
            "libtilelang.so": library,
            "tvm-ffi": machine.version("apache-tvm-ffi"),
            "CUDA": machine.cuda_version(machine.cuda_home(environment)),
            **machine.host(),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`.

        Source: ``JITKernel`` in TileLang's ``jit/kernel.py``: its constructor compiles, unless it is told that the
        kernel comes from the cache (``from_database``).
        """
        cls = class_of(module, "JITKernel")
        signature = inspect.signature(vars(cls)["__init__"])

        def __init__(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            name, shape, cached = "a kernel", "", False
            with contextlib.suppress(Exception):  # TileLang itself says what is wrong with what it is given
                given = signature.bind(*args, **kwargs).arguments
                function, cached = given.get("func"), bool(given.get("from_database"))
                name, shape = _name(function), _shape(function)
            if cached:
                original(*args, **kwargs)
                with contextlib.suppress(Exception):
                    recipes.found(self.name, name)
                return
            at = now()
            with compiling(self, name, shape):
                original(*args, **kwargs)
            if recipes.is_heard():
                with contextlib.suppress(Exception):  # the kernel is compiled
                    bound = signature.bind(*args, **kwargs)
                    bound.apply_defaults()
                    form = described(bound.arguments)
                    recipe = None if form is None else self.recipe_at(entry_of(bound.arguments), form, now() - at)
                    if recipe is not None and recipe.made:  # else each start would build it again
                        recipes.tell(recipe)

        hooks.wrap(cls, "__init__", __init__, "self, func")

    def recipe_at(self, entry: str, form: Mapping[str, Any], seconds: float) -> Recipe:
        """A recipe of what lies in a directory of the cache; empty where that is not known."""
        return self.recipe(form["name"], form, made_at(entry, self.root(os.environ)), seconds)


def _name(function: Any) -> str:
    attributes = getattr(function, "attrs", None)
    return str(attributes["global_symbol"]) if attributes and "global_symbol" in attributes else "a kernel"


def _shape(function: Any) -> str:
    """The shapes of a kernel's tensors; a name stands for a size that it is not specialised on."""
    buffers = getattr(function, "buffer_map", None) or {}
    return ", ".join(f"{buffer.name}: ({', '.join(map(str, buffer.shape))})" for buffer in buffers.values())
