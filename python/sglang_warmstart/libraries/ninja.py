"""What FlashInfer and tvm-ffi have in common: both have ninja build a library, and have no hook for that.

Both run ninja whenever they load a kernel, also where nothing is to be built, so what tells is whether the objects have
changed. Neither is called again for a kernel that a process has loaded.

Neither cache can be moved, and what ninja finds out of date is compiled again although the library is there. It is up
to date if the commands are the same, and so all paths and flags in them; ``.ninja_log``, ``.ninja_deps`` and the
objects are there beside the library; the objects have the modification times that are in ``.ninja_deps``; and no source
and no header is newer than they are. pip gives a header the time of its installation. The time of ``build.ninja`` does
not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import emit, now
from sglang_warmstart.libraries.library import Library

LEFT_OUT = ("*.o.d", "*.recompact", "*.lock")


@contextmanager
def building(library: Library, name: str, directory: Path) -> Iterator[None]:
    """Record whether what happens inside builds something in a directory.

    Args:
        name: of the module that is built.
    """
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
            emit("jit", name, at, seconds, library=library.name, error=failure, remedy=library.remedy)
        else:
            emit("load", name, at, seconds, library=library.name, cached=True)


def _built(directory: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):  # another process builds there
        for path in directory.glob("*.o"):
            found[path.name] = path.stat().st_mtime_ns
    return found
