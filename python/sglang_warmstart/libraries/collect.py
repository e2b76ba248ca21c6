"""Collect the part of a library's cache that a bundle takes along."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sglang_warmstart.libraries.cached import CachedFile, LibraryCache, defect_of, is_staging
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.machine import Environment

_BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Collected:
    """What was found in a cache.

    Args:
        cache: as it is named in the manifest; without files if there are none, or the library is not installed.
        contents: where a file with each SHA-256 lies. It may have changed since: whoever copies it checks.
        notes: a line for each file that could not be taken along.
    """

    cache: LibraryCache
    contents: dict[str, Path]
    notes: tuple[str, ...]


def collect(library: Library, environment: Environment) -> Collected:
    """Look through a library's cache. Links are not followed; a file that vanishes meanwhile was not there.

    Args:
        library: which one.
        environment: of the server that has filled the cache.
    """
    files, contents, notes = list[CachedFile](), dict[str, Path](), list[str]()
    root = library.root(environment) if library.is_installed else None
    if root is None:
        return Collected(LibraryCache(library.name, library.key(environment), ()), {}, ())
    for path in _walk(root, "", library.left_out, notes):
        defect = defect_of(path)
        if defect is not None:
            notes.append(f"{library.name}: {path!r} is left out: {defect}")
            continue
        try:
            file = _read(root, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{library.name}: {path!r} is left out: {error.strerror or error}")
            continue
        files.append(file)
        contents.setdefault(file.sha256, root / path)
    cache = LibraryCache(library.name, library.key(environment), tuple(sorted(files)))
    return Collected(cache, contents, tuple(notes))


def _walk(root: Path, below: str, left_out: tuple[str, ...], notes: list[str]) -> Iterator[str]:
    try:
        with os.scandir(root / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{str(root / below)!r} is left out: {error.strerror or error}")
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if any(fnmatchcase(path, pattern) for pattern in left_out) or (not below and is_staging(entry.name)):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, left_out, notes)
        elif entry.is_file(follow_symlinks=False):
            yield path


def _read(root: Path, path: str) -> CachedFile:
    digest = hashlib.sha256()
    # It may have become something else since it was listed; a pipe would be waited for.
    descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise OSError("not a file")
        while block := file.read(_BLOCK):
            digest.update(block)
        after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("it is being written")
    if not 0 <= after.st_mtime_ns < 1 << 63:
        raise OSError(f"changed at {after.st_mtime_ns} ns")
    return CachedFile(path, digest.hexdigest(), after.st_mtime_ns)
