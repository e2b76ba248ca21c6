"""What FlashInfer and tvm-ffi share: both let ninja build a library, and neither has a hook for that.

Both run ninja whenever they load a kernel, even if nothing has to be built. So a compile shows only by changed object
files, and what ninja would build, by asking ninja. Neither is called again for a kernel that a process has loaded.

Neither cache can be moved. ninja compiles again what it finds out of date, even if the library is there. It finds it up
to date if the commands are the same, including all paths and flags; if ``.ninja_log``, ``.ninja_deps`` and the objects
are beside the library; if the objects have the modification times in ``.ninja_deps``; and if no source and no header is
newer. pip gives a header the time of its installation. The time of ``build.ninja`` does not matter.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import emit, now
from sglang_warmstart.libraries import recipe as recipes
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.monitor import is_refusing, refuse
from sglang_warmstart.libraries.ninja_ahead import described

_ASK_LIMIT_S = 60

LEFT_OUT = ("*.o.d", "*.recompact", "*.lock")


@contextmanager
def building(library: Library, name: str, directory: Path, file: Path, lock: Path) -> Iterator[None]:
    """Record whether ninja, run inside, builds something in a directory; refuse what is not to be built.

    Args:
        name: of the module that is built.
        file: ninja's, as it will be run.
        lock: that the library holds.

    Raises:
        JitWhileServingError: it was refused. Nothing was built.
    """
    if is_refusing() and _has_work(directory, file):
        refuse(library, name)
    at, before = now(), _built(directory)
    failure = ""
    form = _form(library, directory, file, lock)
    try:
        yield
    except Exception as error:
        failure = first_line(error)
        raise
    finally:
        seconds = now() - at
        if failure or _built(directory) != before:
            emit("jit", name, at, seconds, library=library.name, error=failure, remedy=library.remedy)
        else:
            emit("load", name, at, seconds, library=library.name, cached=True)
            seconds = 0.0
        if form and not failure:
            with contextlib.suppress(Exception):  # the module is built
                made = str(PurePosixPath(form["directory"], "*.so"))
                recipes.tell(library.recipe(name, form, made, seconds))


def _form(library: Library, directory: Path, file: Path, lock: Path) -> dict[str, Any] | None:
    """What would have it built again, written down before ninja runs; None if nobody asks, or it cannot be."""
    with contextlib.suppress(Exception):  # whatever a fork's FlashInfer looks like, it builds
        if recipes.is_heard() and (root := library.root(os.environ)) is not None:
            return described(root, directory, file, lock, os.environ)
    return None


def _has_work(directory: Path, file: Path) -> bool:
    """Whether ninja would build something. If it does not answer, no: what it builds then is refused afterwards."""
    command = ["ninja", "-n", "-C", str(directory), "-f", str(file.resolve())]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "ninja: no work to do." not in said


def _built(directory: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):  # another process builds there
        for path in directory.glob("*.o"):
            found[path.name] = path.stat().st_mtime_ns
    return found
