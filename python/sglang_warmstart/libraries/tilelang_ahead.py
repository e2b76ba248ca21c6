"""TileLang's kernels, built ahead of use: a call notes what it would compile, and other processes compile that.

TileLang takes 12 to 15 s for a kernel of mHC, most of it in passes of its own that run in the process that calls, on
one core. Tracing the kernel's Python, in contrast, takes a third of a second, and what comes of that goes into the key
of TileLang's cache. So the call is made up to there, and what it would compile is handed to a process that has no GPU.
The next call finds the kernel in the cache.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.switches import IMAGE
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import BuildError

_PLAIN = (bool, int, float, str)
_TIMED = re.compile(r"(?P<library>[^:]+:\d+):(?P<time_ns>\d+)")
_SECOND_NS = 10**9


class TileLangKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel as TileLang is about to compile it.

    Args:
        name: of the function.
        function: the traced function (``tvm.ir.save_json``).
        target, target_host: as text.
        execution_backend, out_idx, pass_configs, compile_flags: as ``JITKernel`` takes them.

    Source: ``JITKernel`` in TileLang's ``jit/kernel.py``.
    """

    name: str
    function: str
    target: str
    target_host: str | None
    execution_backend: str
    out_idx: list[int] | int | None
    pass_configs: dict[str, bool | int | float | str] | None
    compile_flags: list[str] | str | None


class _PostponedError(Exception):
    """A compile has been noted instead."""


@contextlib.contextmanager
def postponed(found: Callable[[dict[str, Any], str], None]) -> Iterator[None]:
    """What this thread would compile is handed to ``found``; the call writes nothing.

    Args:
        found: is given the form of a recipe, and what :func:`entry_of` says.

    A kernel that TileLang has in memory or on disk runs as it does outside. So does one that cannot be described.
    """
    from tilelang.jit import JITImpl
    from tilelang.jit.kernel import JITKernel

    thread, signature = threading.get_ident(), inspect.signature(JITKernel.__init__)
    compile_it, call = JITKernel.__init__, JITImpl.__call__

    def note(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        kernel = None
        if threading.get_ident() == thread and not given.arguments["from_database"]:
            kernel = described(given.arguments)
        if kernel is None:
            compile_it(*args, **kwargs)
            return
        entry = ""
        with contextlib.suppress(Exception):  # the form is enough
            entry = entry_of(given.arguments)
        found(kernel, entry)
        raise _PostponedError

    def go_on(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except _PostponedError:
            # In lazy mode a caller takes this for the kernel, and calls it.
            return _do_nothing

    JITKernel.__init__, JITImpl.__call__ = note, go_on
    try:
        yield
    finally:
        JITKernel.__init__, JITImpl.__call__ = compile_it, call


def prepare(_form: Mapping[str, Any]) -> None:
    """Import TileLang, which takes seconds."""
    # It brings tvm along, and says where that is.
    import tilelang.cache  # noqa: F401 (a process that forks later has it then)


def build(form: Mapping[str, Any], root: Path | None, environment: Environment) -> str:
    """Compile a kernel into TileLang's cache, without a GPU.

    Returns:
        Where it is, as ``Recipe.made``: a hash that TileLang's own library is part of. Empty if that is not known.

    Raises:
        BuildError: it cannot be.
    """
    try:
        kernel = msgspec.convert(form, TileLangKernel)
        from tilelang.cache import cached
        from tvm import ir, target

        def from_text(text: str) -> Any:
            made = target.Target(json.loads(text) if text.startswith("{") else text)
            if str(made) != text:
                raise BuildError(f'the target "{text}" is not understood')
            return made

        what = {
            "func": ir.load_json(kernel.function),
            "out_idx": kernel.out_idx,
            "target": from_text(kernel.target),
            "target_host": from_text(kernel.target_host) if kernel.target_host is not None else None,
            "execution_backend": kernel.execution_backend,
            "pass_configs": kernel.pass_configs,
            "compile_flags": kernel.compile_flags,
        }
        cached(**what, verbose=False)
        made = made_at(entry_of(what), root)
        if IMAGE in environment:
            _keep_for_layers(what)
        return made
    except BuildError:
        raise
    except Exception as error:
        # As text: what TileLang raises need not survive the way to another process.
        raise BuildError(f"{type(error).__name__}: {first_line(error)}") from None


def _keep_for_layers(what: Mapping[str, Any]) -> None:
    """Put a kernel also where it is looked for once this installation has become a layer of a container image.

    The key of TileLang 0.1.8 has the time of its library to the nanosecond, and a layer keeps whole seconds; that of
    0.1.12 has a hash of it. This changes TileLang in this process.

    Source: ``KernelCache`` in TileLang's ``cache/kernel_cache.py``.
    """
    from tilelang.cache.kernel_cache import KernelCache

    timed = _TIMED.fullmatch(str(getattr(KernelCache, "_get_tilelang_lib_stamp", str)()))
    if timed is None:
        return
    here = Path(entry_of(what))
    stamp = f"{timed['library']}:{int(timed['time_ns']) // _SECOND_NS * _SECOND_NS}"
    KernelCache._get_tilelang_lib_stamp = staticmethod(lambda: stamp)
    KernelCache._get_base_key.cache_clear()
    there = Path(entry_of(what))
    if not there.exists():
        with tempfile.TemporaryDirectory(dir=there.parent) as scratch:
            shutil.copytree(here, Path(scratch, there.name)).rename(there)


def described(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form of a recipe for what ``JITKernel`` is given; None if it has no form in JSON."""
    from tvm import ir

    configs, indices, flags = given["pass_configs"], given["out_idx"], given["compile_flags"]
    if not all(isinstance(value, _PLAIN) for value in (configs or {}).values()):
        return None
    function, host = given["func"], given["target_host"]
    kernel = TileLangKernel(
        name=_text(function.attrs["global_symbol"]),
        function=_text(ir.save_json(function)),
        target=_text(given["target"]),
        target_host=None if host is None else _text(host),
        execution_backend=_text(given["execution_backend"]),
        out_idx=list(indices) if isinstance(indices, (list, tuple)) else indices,
        pass_configs=None if configs is None else {_text(name): value for name, value in configs.items()},
        compile_flags=list(flags) if isinstance(flags, (list, tuple)) else flags,
    )
    return dict(msgspec.to_builtins(kernel))


def entry_of(given: Mapping[str, Any]) -> str:
    """A kernel's directory in TileLang's cache; empty where this TileLang does not say.

    Source: ``KernelCache.cached`` in ``tilelang/cache/kernel_cache.py``.
    """
    from tilelang import cache

    names = ("func", "out_idx", "execution_backend", "target", "target_host", "pass_configs", "compile_flags")
    keys = vars(cache).get("_dispatch_map", {}).get(_text(given["execution_backend"]))
    if keys is None:
        return ""
    return str(keys._get_cache_path(keys._generate_key(args=(), **{name: given[name] for name in names})))


def made_at(entry: str, root: Path | None) -> str:
    """``Recipe.made`` of an entry, as of :func:`entry_of`; empty where that is not known."""
    if entry and root is not None and Path(entry).is_relative_to(root):
        return f"{Path(entry).relative_to(root)}/params.pkl"
    return ""


def _text(value: Any) -> str:
    # TVM has a string type of its own, and TileLang enumerations whose members are strings.
    return str.__str__(str(getattr(value, "value", value)))


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    pass
