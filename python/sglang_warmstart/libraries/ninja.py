"""FlashInfer's and tvm-ffi's compiles. Both have ninja build a library, and have no hook for that.

Both run ninja also where nothing is to be built, so what tells is whether the objects have changed. Neither function
is called again for a kernel that a process has loaded.

Source: ``JitSpec.build`` in FlashInfer's ``jit/core.py``; ``build_ninja`` in tvm-ffi's ``cpp/extension.py``, which
SGLang's own JIT kernels use (``sglang/jit_kernel``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import emit, now
from sglang_warmstart.base.hooks import Hooks, class_of

_REMEDY = (
    "a forward of this kind before the server is ready would have, or {0}'s cache out of a bundle "
    "(bundle pack --include {0})"
)


def watch_flashinfer(hooks: Hooks, core: ModuleType) -> None:
    """Record what FlashInfer compiles.

    Args:
        core: ``flashinfer.jit.core``.

    Raises:
        StandsAsideError: it looks different.
    """

    def build(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        with _building("flashinfer", str(self.name), Path(self.build_dir)):
            return original(self, *args, **kwargs)

    hooks.wrap(class_of(core, "JitSpec"), "build", build, "self, verbose", "self, verbose, need_lock")


def watch_tvm_ffi(hooks: Hooks, extension: ModuleType) -> None:
    """Record what tvm-ffi compiles.

    Args:
        extension: ``tvm_ffi.cpp.extension``.

    Raises:
        StandsAsideError: it looks different.
    """

    def build_ninja(original: Callable[..., Any], build_dir: str, *args: Any, **kwargs: Any) -> Any:
        # The directory is named after the module, with a hash of all that goes into it.
        with _building("tvm-ffi", Path(build_dir).name.rpartition("_")[0], Path(build_dir)):
            return original(build_dir, *args, **kwargs)

    hooks.wrap(extension, "build_ninja", build_ninja, "build_dir")


@contextmanager
def _building(library: str, name: str, directory: Path) -> Iterator[None]:
    at, before = now(), _built(directory)
    failure = ""
    try:
        yield
    except Exception as error:
        failure = first_line(error)
        raise
    finally:
        seconds = now() - at
        if failure or _built(directory) != before:
            emit("jit", name, at, seconds, library=library, error=failure, remedy=_REMEDY.format(library))
        else:
            emit("load", name, at, seconds, library=library, cached=True)


def _built(directory: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):  # another process builds there
        for path in directory.glob("*.o"):
            found[path.name] = path.stat().st_mtime_ns
    return found
