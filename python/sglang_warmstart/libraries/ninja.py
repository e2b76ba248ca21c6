"""What FlashInfer and tvm-ffi share: both let ninja build a library, and neither has a hook for that.

Both run ninja whenever they load a kernel, even if nothing has to be built. So a compile shows only by changed object
files. Neither is called again for a kernel that a process has loaded.

Neither cache can be moved. ninja compiles again what it finds out of date, even if the library is there. It finds it up
to date if the commands are the same, including all paths and flags; if ``.ninja_log``, ``.ninja_deps`` and the objects
are beside the library; if the objects have the modification times in ``.ninja_deps``; and if no source and no header is
newer. pip gives a header the time of its installation. The time of ``build.ninja`` does not matter.
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
