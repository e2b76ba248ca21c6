"""Publish files and directories: each appears in its place whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# What a file system says that cannot sync a directory, or opens none.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES}
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
# No process takes as long as that to publish something.
LEFT_BEHIND_S = 3600.0
_GONE = (errno.ESTALE, errno.EIO, errno.ENOENT)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def publish(place: Path, build: Callable[[Path], object], scratch: Path) -> bool:
    """Build a directory out of sight and put it in its place. One that is there stays.

    Args:
        place: where it is to be; an empty directory there is replaced.
        build: writes the files into the directory that it is given, by :func:`write_synced`.
        scratch: a directory of the same file system.

    Returns:
        Whether it is ours: another process may have been faster.

    Raises:
        OSError: it cannot be written.
    """
    temporary = scratch / f"warmstart-{uuid.uuid4()}"
    try:
        temporary.mkdir(parents=True)
        build(temporary)
        sync(temporary)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not put(temporary, place):
            return False
        _settle(place.parent)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_behind(scratch: Path, fresh: Path) -> None:
    """Remove what processes that were killed have left in a scratch directory, as far as that can be.

    Args:
        scratch: see :func:`publish`.
        fresh: was just written there. Times are compared with its own: the file system's clock may be another host's.
    """
    with suppress(OSError):
        now = fresh.stat().st_mtime
        for left in scratch.glob("warmstart-*"):
            with suppress(OSError):  # another process removes it
                if now - left.stat().st_mtime > LEFT_BEHIND_S:
                    shutil.rmtree(left, ignore_errors=True)


def put(
    directory: str | Path, place: str | Path, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
) -> bool:
    """Rename a directory to its place: atomic on local file systems and on shared ones.

    Args:
        src_dir_fd, dst_dir_fd: see ``os.rename``.

    Returns:
        False if there is one already. It need not be visible yet: NFS remembers for a while that it was not there.
    """
    try:
        os.rename(directory, place, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of ``path`` when the block ends without an exception.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _settle(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole, or leave what is there. Its directory is made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that nobody sees yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())


def _settle(directory: Path) -> None:
    # What was renamed is in its place and whole: nobody is told that it is not, whatever the file system says now.
    with suppress(OSError):
        sync(directory)


def sync(what: int | Path) -> None:
    """Have a file (by its descriptor) or a directory on disk before what follows, where the file system can."""
    try:
        if isinstance(what, int):
            os.fsync(what)
            return
        descriptor = os.open(what, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def hint(error: OSError) -> str:
    """What to do about a place that cannot be used."""
    if error.errno in _GONE:
        return "check its mount"
    return "make room" if error.errno in _FULL else "make it writable"
