"""Private directories of processes: removed when the process ends or, if it was killed, at the next start."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sglang_warmstart.base.locks import NoLocksError, try_lock

PREFIX = "sglang-warmstart-"
# A Unix socket's path has room for 107 bytes, and the sockets of multiprocessing lie two levels deeper.
_PATH_LIMIT = 70
# Locked as long as the directory is in use. A process number would say nothing to those in another container.
ALIVE = "alive"


def make_directory() -> tuple[Path, BinaryIO]:
    """A directory whose path a shell takes as it is, and what keeps others from removing it while that is open.

    Raises:
        OSError: none can be made.
    """
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    # DeepGEMM quotes nothing in the command line of its compiler.
    if len(str(directory)) > _PATH_LIMIT or shlex.quote(str(directory)) != str(directory):
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    try:
        alive = (directory / "fresh").open("wb")
        with suppress(NoLocksError):  # then nobody takes it for abandoned
            try_lock(alive)
        (directory / "fresh").rename(directory / ALIVE)  # nobody is to find it without the lock
    except BaseException:
        remove_directory(directory)
        raise
    return directory, alive


def remove_directory(directory: Path) -> None:
    """Remove a directory of this kind, and never another one."""
    if directory.name.startswith(PREFIX):
        shutil.rmtree(directory, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove the directories of processes that were killed."""
    for place in {tempfile.gettempdir(), "/tmp"}:
        for directory in Path(place).glob(f"{PREFIX}*"):
            try:
                if directory.stat().st_uid == os.getuid():
                    with (directory / ALIVE).open("rb") as alive:
                        if try_lock(alive):
                            remove_directory(directory)
            except (OSError, NoLocksError):
                continue  # in use, or somebody else is removing it
