"""Triton's compiles, by its own hook: ``triton.knobs.compilation.listener``.

Source: ``CompilationListener`` in Triton's ``knobs.py`` (3.4 and later), called by ``compile`` in ``compiler.py`` after
each kernel that was not in the process's memory, with the times that it took, and whether Triton's cache had it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.events import emit, now
from sglang_warmstart.base.guard import guarded

REMEDY = (
    "a forward of this shape before the server is ready would have (SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP runs larger "
    "ones), or Triton's cache out of a bundle (bundle pack --include triton)"
)


def watch(triton: ModuleType) -> Callable[[], None]:
    """Record what Triton compiles from now on, and what it finds in its cache. Returns what ends that.

    Raises:
        StandsAsideError: this Triton has no such hook.
    """
    compilation: Any = getattr(getattr(triton, "knobs", None), "compilation", None)
    if not hasattr(compilation, "listener"):
        raise StandsAsideError("triton.knobs.compilation.listener", "not there")
    before = compilation.listener

    def listen(
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
            emit("load", name, now() - seconds, seconds, library="triton", shape=shape, cached=True)
        else:
            emit("jit", name, now() - seconds, seconds, library="triton", shape=shape, remedy=REMEDY)

    listener = guarded("jit-monitor: triton.knobs.compilation.listener", listen, before or _hear_nothing)
    compilation.listener = listener

    def end() -> None:
        if compilation.listener is listener:
            compilation.listener = before

    return end


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
