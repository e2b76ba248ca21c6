"""The directory of a run: made by the process that starts a server, found by all others through their environment."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from sglang_warmstart.kernels.events import READY

# Runs that are kept in a cache; the oldest go first.
KEPT_RUNS = 20

_RUN = re.compile(r"\d{8}-\d{6}-\d+")


def runs_of(cache: Path) -> Path:
    """Where the runs on a cache lie.

    Args:
        cache: the root of DeepGEMM's cache.
    """
    return cache / "warmstart" / "events"


def new_run(cache: Path) -> tuple[Path, str | None]:
    """A directory for the run that begins, and the oldest ones removed.

    Returns:
        The directory, and why it is not in the cache, if it is not: then it ends with this process.
    """
    place = runs_of(cache)
    directory = place / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        directory = Path(tempfile.mkdtemp(prefix="sglang-warmstart-events-"))
        atexit.register(_remove, directory, os.getpid())
        return directory, f"{place} cannot be written: {error.strerror or error}"
    for old in sorted(path for path in place.iterdir() if _RUN.fullmatch(path.name))[:-KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
    return directory, None


def say_ready(directory: Path) -> None:
    """From now on, what is compiled is compiled while serving."""
    # Where this cannot be written, events cannot be either, and their log has said so.
    with contextlib.suppress(OSError):
        (directory / READY).touch()


def _remove(directory: Path, owner: int) -> None:
    # A fork of the owner inherits this call.
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
