"""Triton: watched by its own hook, ``triton.knobs.compilation.listener``. Its cache cannot be moved.

Source: ``CompilationListener`` and ``cache_knobs`` in Triton's ``knobs.py`` (3.4 and later). ``compile`` in
``compiler.py`` calls the listener after each kernel that was not in the process's memory. It passes the times, and
whether Triton's cache had the kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.events import emit, now
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.libraries import machine, recipe, triton_ahead
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.monitor import is_refusing, refuse

_LISTENER = "triton.knobs.compilation.listener"


class Triton(Library):
    """Triton.

    An entry of the cache is a directory; its ``__grp__`` file, written last, holds the absolute paths of the others,
    each of which is renamed into place. The directory's name is a hash over Triton's own files, the kernel's source,
    options and the version of ptxas, but over no path.

    Building ahead: ``triton.compile(ASTSource(...), GPUTarget(...))`` needs no GPU and gives the same names
    (:mod:`.triton_ahead`). There is no lock: the last to rename wins, and all are equal.
    """

    name = "triton"
    distributions = ("triton", "pytorch-triton")  # the second comes with nightly builds of torch
    left_out = ("*/tmp.pid_*", "*.tmp.pid_*", "*/lock", "*.lock")
    module = "triton"
    hooks: ClassVar[Mapping[str, str]] = {
        _LISTENER: "Triton's own hook, called after each compile",
        "triton.compiler.compiler.ASTSource.make_ir": "the first step of a compile that Triton's cache does not spare: "
        "here it is refused, and a recipe gets its options",
    }
    ahead = triton_ahead.__name__
    # Source: Triton's ``knobs.py``, and the list ``CACHE_INVALIDATING_ENV_VARS`` in its ``getenv.hpp``.
    variables = (
        "TRITON_*",
        "DISABLE_LLVM_OPT",
        "DISABLE_MMA_V3",
        "DISABLE_MMA_V5",
        "DISABLE_PTXAS_OPT",
        "NVPTX_ENABLE_DUMP",
        "LLVM_EXTRACT_DI_LOCAL_VARIABLES",
        "LLVM_IR_ENABLE_DUMP",
        "LLVM_PASS_PLUGIN_PATH",
        "MLIR_ENABLE_DIAGNOSTICS",
        "MLIR_ENABLE_DUMP",
        "USE_IR_LOC",
    )
    remedy = (
        "a forward of this shape before the server is ready would have (SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP runs larger "
        "ones), or Triton's cache out of a bundle (bundle pack --include triton)"
    )

    def __init__(self) -> None:
        self._begun = threading.local()  # the source that this thread compiles, and its options

    def root(self, environment: Environment) -> Path | None:
        """See :class:`Library`. With an empty ``TRITON_CACHE_DIR``, Triton refuses to compile."""
        named = environment.get("TRITON_CACHE_DIR")
        if named is not None:
            return machine.absolute(Path(named)) if named else None
        above = environment.get("TRITON_HOME")
        # Without a home, Triton has a directory "~".
        base = Path(above) if above is not None else machine.home(environment) or Path("~")
        return machine.absolute(base / ".triton" / "cache")

    def key(self, environment: Environment) -> dict[str, str]:
        """Source: ``triton/runtime/cache.py``, and ``build.py`` beside it for the launchers, which are Python."""
        return {
            "triton": machine.version(*self.distributions),
            "cache": str(self.root(environment)),
            **machine.host(),
        }

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """See :class:`Library`."""
        compilation: Any = getattr(getattr(module, "knobs", None), "compilation", None)
        if not hasattr(compilation, "listener"):
            raise StandsAsideError(_LISTENER, "not there")
        before = compilation.listener
        listener = hooks.guarded(_LISTENER, self._listen, before or _hear_nothing)
        compilation.listener = listener

        def undo() -> None:
            if compilation.listener is listener:
                compilation.listener = before

        hooks.made(_LISTENER, undo)
        try:
            self._see_it_begin(hooks)
        except StandsAsideError as error:
            hooks.notes.append(
                f"the JIT monitor refuses {self.name}'s kernels only once they are compiled, and none is built ahead: "
                f"{error}"
            )

    def _see_it_begin(self, hooks: Hooks) -> None:
        """Refuse a kernel before it is compiled: what the listener hears of is compiled by then.

        And keep its options: the compile may change those that the listener is told.
        """
        source = class_of(importlib.import_module("triton.compiler.compiler"), "ASTSource")
        signature = inspect.signature(vars(source)["make_ir"])

        def make_ir(original: Callable[..., Any], src: Any, *args: Any, **kwargs: Any) -> Any:
            options: Any = None
            with contextlib.suppress(Exception):  # what it is told differs between releases
                options = signature.bind(src, *args, **kwargs).arguments["options"]
            if is_refusing():
                name, shape = "a kernel", ""
                with contextlib.suppress(Exception):
                    name = str(src.name)
                    shape = shape_of(src, vars(options))
                refuse(self, name, shape)
            self._begun.source, self._begun.options = src, options
            return original(src, *args, **kwargs)

        others = "options, codegen_fns, module_map, context"
        hooks.wrap(source, "make_ir", make_ir, f"self, target, {others}", f"self, {others}")

    def _listen(
        self,
        original: Callable[..., None],
        *,
        src: Any,
        metadata: dict[str, Any],
        metadata_group: dict[str, str],
        times: Any,
        cache_hit: bool,
    ) -> None:
        original(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)
        name, seconds, shape = "a kernel", 0.0, ""
        with contextlib.suppress(Exception):  # what it is told differs between releases; the kernel is fine
            name = str(src.name)
            seconds = times.total / 1e6  # Triton counts microseconds
            shape = shape_of(src, metadata)
        if cache_hit:
            emit("load", name, now() - seconds, seconds, library=self.name, shape=shape, cached=True)
            with contextlib.suppress(Exception):
                recipe.found(self.name, name, triton_ahead.entry_of(metadata_group))
        else:
            emit("jit", name, now() - seconds, seconds, library=self.name, shape=shape, remedy=self.remedy)
            if recipe.is_heard():
                self._tell(src, metadata, metadata_group, seconds)

    def _tell(self, src: Any, metadata: Mapping[str, Any], metadata_group: Mapping[str, str], seconds: float) -> None:
        """Tell how the kernel was compiled, if another process can do it too."""
        begun = vars(self._begun)
        source: Any = begun.pop("source", None)
        options = begun.pop("options", None)
        if source is not src or options is None:
            return
        form = None
        with contextlib.suppress(Exception):  # as above: no kernel is worse for having no recipe
            form = triton_ahead.described(src, options, metadata["target"])
        if form is not None:
            recipe.tell(self.recipe(src.name, form, triton_ahead.entry_of(metadata_group), seconds))


def _hear_nothing(**_: Any) -> None:
    pass


def shape_of(src: Any, metadata: Mapping[str, Any]) -> str:
    """The tensors of a kernel and what it is specialised on, in one line: what Triton knows of the call.

    Numbers that it is not specialised on are left out: there are dozens of strides.
    """
    names = list(getattr(getattr(src, "fn", None), "arg_names", ()))
    signature: Mapping[Any, Any] = getattr(src, "signature", {})
    constants = {
        _name(names, path): value
        for path, value in getattr(src, "constants", {}).items()
        if isinstance(value, (bool, int, float, str))
    }
    arguments = [f"{name}: {kind}" for name, kind in signature.items() if str(kind).startswith("*")]
    chosen = {name: metadata.get(name) for name in ("num_warps", "num_stages")}
    return "; ".join(
        filter(
            None, (", ".join(arguments), ", ".join(f"{name}={value}" for name, value in (constants | chosen).items()))
        )
    )


def _name(names: list[str], path: Any) -> str:
    # A path into the arguments: the place of one, and places within it if it is a tuple.
    place, *within = path if isinstance(path, tuple) else (path,)
    name = names[place] if isinstance(place, int) and place < len(names) else str(place)
    return name + "".join(f"[{each}]" for each in within)
