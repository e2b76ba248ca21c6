"""Put files into another library's cache, so that an entry is there as a whole or not at all.

An entry is all files of one directory. The libraries write the files of an entry one after the other. Later they take
the files that they find as whole (Triton, TileLang) or as up to date (ninja). So they would not always notice half an
entry.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.base.files import hint, put, sync
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.libraries.cached import CachedFile, defect_of, is_staging

_LEFT_AFTER_S = 3600  # by then nobody builds in it any more
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 1 << 20  # bytes copied at once

_Parts = tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What has become of the files.

    Args:
        new: how many were written.
        kept: how many were not, because their entry was there before.
    """

    new: int
    kept: int


def publish(root: Path, files: Sequence[CachedFile], contents: Path) -> Published:
    """Put files into a cache. Whatever is in an entry that is there stays as it is, and nothing is added to it.

    An entry that is not there, or is an empty directory, appears at once with all its files. The root, and a directory
    below which there are others of the files, are no entries: they get each file that they lack, whole.

    Any number of processes may do so with one root at the same time. One that is killed leaves a ``.warmstart-*``
    directory, which a later one removes.

    Args:
        root: of the cache; it is made if it is not there, and may be a link.
        files: with their modification times, which are restored.
        contents: a directory that holds what is in them, by SHA-256.

    Raises:
        BundleError: a path of theirs goes through a link or a file below the root: nothing was written. Or the root
            cannot be written: entries that are there by then stay.
    """
    for file in files:
        defect = defect_of(file.path)
        if defect is not None:
            raise BundleError(f"{file.path!r} is not put into the cache {root}: {defect}")
        if not (contents / file.sha256).is_file():
            raise BundleError(f"{file.path!r} is not put into the cache {root}: there is no content for it")
    if not files:
        return Published(0, 0)
    entries = _by_directory(files)
    above = {parts[:length] for parts in entries for length in range(len(parts))}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _opened(root) as top:
            for parts in entries:
                with _found(root, top, parts):
                    pass  # nothing is written if there is a link in the way of any of them
            _remove_left_behind(root, top)
            with _building(root, top, contents) as building:
                new = 0
                for parts, entry in entries.items():
                    new += building.add(parts, entry) if not parts or parts in above else building.put(parts, entry)
    except OSError as error:
        raise BundleError(_unwritable(root, error)) from error
    return Published(new, len(files) - new)


@dataclass(frozen=True)
class _Building:
    """A directory below the root in which entries are built.

    Args:
        root: of the cache.
        top: its descriptor.
        staging: the descriptor of the directory.
        contents: where the contents are.
    """

    root: Path
    top: int
    staging: int
    contents: Path

    def put(self, parts: _Parts, files: Sequence[CachedFile]) -> int:
        """Put an entry in its place. Returns how many files were written."""
        with _found(self.root, self.top, parts) as there:
            if there is not None and _names(there):
                return 0
        name = self._build(files)
        with _made(self.root, self.top, parts[:-1]) as parent:
            if not put(name, parts[-1], src_dir_fd=self.staging, dst_dir_fd=parent):
                return 0  # another was faster
            sync(parent)
        return len(files)

    def add(self, parts: _Parts, files: Sequence[CachedFile]) -> int:
        """Put the files that it lacks into a directory. Returns how many were written."""
        new = 0
        with _made(self.root, self.top, parts) as directory:
            there = _names(directory)
            lacking = [file for file in files if _name(file) not in there]
            if lacking:
                with _opened(self._build(lacking), self.staging) as built:
                    for file in lacking:
                        with contextlib.suppress(FileExistsError):
                            os.link(_name(file), _name(file), src_dir_fd=built, dst_dir_fd=directory)
                            new += 1
                sync(directory)
        return new

    def _build(self, files: Sequence[CachedFile]) -> str:
        name = uuid.uuid4().hex
        os.mkdir(name, dir_fd=self.staging)
        with _opened(name, self.staging) as directory:
            for file in files:
                descriptor = os.open(_name(file), _CREATE, 0o666, dir_fd=directory)
                with os.fdopen(descriptor, "wb") as target, (self.contents / file.sha256).open("rb") as source:
                    shutil.copyfileobj(source, target, _BLOCK)
                    target.flush()
                    os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
                    sync(descriptor)
            sync(directory)
        return name


@contextlib.contextmanager
def _building(root: Path, top: int, contents: Path) -> Iterator[_Building]:
    name = f".warmstart-{uuid.uuid4().hex}"
    try:
        os.mkdir(name, dir_fd=top)
        with _opened(name, top) as staging:
            yield _Building(root, top, staging, contents)
    finally:
        shutil.rmtree(root / name, ignore_errors=True)


def _remove_left_behind(root: Path, top: int) -> None:
    for name in filter(is_staging, _names(top)):
        try:
            changed = os.stat(name, dir_fd=top, follow_symlinks=False).st_mtime
        except FileNotFoundError:
            continue  # its owner has just removed it
        if time.time() - changed > _LEFT_AFTER_S:
            # It takes no link for a directory.
            shutil.rmtree(root / name, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: str | Path, top: int | None = None) -> Iterator[int]:
    # Only the root itself may be a link.
    descriptor = os.open(path, _OPEN if top is not None else _OPEN & ~os.O_NOFOLLOW, dir_fd=top)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _found(root: Path, top: int, parts: _Parts) -> Iterator[int | None]:
    try:
        descriptor = _descend(root, top, parts, make=False)
    except FileNotFoundError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _made(root: Path, top: int, parts: _Parts) -> Iterator[int]:
    descriptor = _descend(root, top, parts, make=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _descend(root: Path, top: int, parts: _Parts, *, make: bool) -> int:
    """The descriptor of a directory below the root. No link is followed on the way, whoever makes one meanwhile."""
    directory = os.dup(top)
    for number, name in enumerate(parts, 1):
        above = directory
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=above)
            directory = os.open(name, _OPEN, dir_fd=above)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            way = "/".join(parts[:number])
            raise BundleError(
                f"{way!r} in the cache {root} is a link or a file, and no directory: remove it"
            ) from error
        finally:
            os.close(above)
    return directory


def _names(directory: int) -> set[str]:
    with os.scandir(directory) as found:
        return {entry.name for entry in found}


def _by_directory(files: Sequence[CachedFile]) -> dict[_Parts, list[CachedFile]]:
    entries = dict[_Parts, list[CachedFile]]()
    for file in sorted(files):
        entries.setdefault(tuple(file.path.split("/")[:-1]), []).append(file)
    return entries


def _name(file: CachedFile) -> str:
    return file.path.rpartition("/")[2]


def _unwritable(root: Path, error: OSError) -> str:
    return f"the cache {root} cannot be written ({error.strerror or error}): {hint(error)}"
