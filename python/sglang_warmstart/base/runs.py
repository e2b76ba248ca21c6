"""The directory of a run. The process that starts a server makes it; the others find it by their environment."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from sglang_warmstart.base import trust
from sglang_warmstart.base.answers import answered
from sglang_warmstart.base.events import READY
from sglang_warmstart.base.private_directory import make_directory, remove_abandoned, remove_directory

# Runs that are kept in a cache; the oldest of the others go first, ...
KEPT_RUNS = 20
# ... but none that began within these seconds: many nodes that start on one cache do not take each other's away.
KEPT_S = 3600

_RUN = re.compile(r"\d{8}-\d{6}-\d+(-\d+)?")


def runs_of(cache: Path) -> Path:
    """Where the runs on a cache lie.

    Args:
        cache: the root of DeepGEMM's cache.
    """
    return cache / "warmstart" / "events"


def new_run(cache: Path) -> tuple[Path, str | None]:
    """A directory for the run that begins, and the oldest ones removed.

    Returns:
        The directory, and why it is not in the cache, if it is not: then it ends with this process or, if that was
        killed, at the next start.
    """
    place = runs_of(cache)
    try:
        answered(lambda: trust.check_caches((cache,), os.environ))
        directory = answered(lambda: _made(place))
    except OSError as error:
        problem = str(error)
        if not isinstance(error, trust.UntrustedError):
            problem = f"{place} cannot be written: {error.strerror or error}"
        try:
            remove_abandoned()
            directory, alive = make_directory()
        except OSError:
            return place / "none", problem  # nothing can be recorded there, which is no reason not to start
        atexit.register(_remove, directory, alive, os.getpid())
        return directory, problem
    with contextlib.suppress(OSError):
        answered(lambda: _remove_old(place, directory))
    return directory, None


def _made(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    # Containers that begin in the same second have the same process numbers, and may share a cache.
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            directory = place / f"{name}{suffix}"
            directory.mkdir()
            return directory
    raise FileExistsError(f"{place / name} and all others of this name are there")


def _remove_old(place: Path, fresh: Path) -> None:
    # By the file system's own clock, which may be another host's.
    now = fresh.stat().st_mtime
    runs = sorted(path for path in place.iterdir() if _RUN.fullmatch(path.name))
    for old in runs[:-KEPT_RUNS]:
        with contextlib.suppress(OSError):  # another server removes it
            if now - old.stat().st_mtime > KEPT_S:
                shutil.rmtree(old, ignore_errors=True)


def say_ready(directory: Path) -> None:
    """From now on, what is compiled is compiled while serving.

    Raises:
        OSError: nobody can be told.
    """
    answered((directory / READY).touch)


def _remove(directory: Path, alive: BinaryIO, owner: int) -> None:
    # A fork of the owner inherits this call.
    if os.getpid() == owner:
        remove_directory(directory)
        alive.close()
