"""The part of a library's cache that a bundle takes along: files by path, and the key for restoring them."""

from __future__ import annotations

import re

import msgspec

_PATH_LIMIT, _NAME_LIMIT = 1024, 255  # bytes, as file systems have them
_STAGING = re.compile(r"\.warmstart-[0-9a-f]{32}")


class CachedFile(msgspec.Struct, frozen=True, order=True):
    """A file of another library's cache.

    Args:
        path: below the cache's root, with slashes.
        sha256: of its contents.
        mtime_ns: when it was last changed, in nanoseconds since 1970.
    """

    path: str
    sha256: str
    mtime_ns: int


class LibraryCache(msgspec.Struct, frozen=True):
    """What was taken along of another library's cache.

    Args:
        library: its name, such as ``triton``.
        key: all that has to be the same where it is unpacked.
        files: by path.
    """

    library: str
    key: dict[str, str]
    files: tuple[CachedFile, ...]


def defect_of(path: str) -> str | None:
    """Why a path cannot be that of a file in a cache, or None."""
    if not path or len(path.encode(errors="surrogatepass")) > _PATH_LIMIT:
        return "empty, or too long"
    if any(not character.isprintable() for character in path):
        return "not printable"
    if path.startswith("/"):
        return "an absolute path"
    for name in path.split("/"):
        if name in ("", ".", ".."):
            return "not a plain relative path"
        if len(name.encode()) > _NAME_LIMIT:
            return "a name too long"
    return None


def is_staging(name: str) -> bool:
    """Whether something right below a root is what `publish` builds in, or has left behind."""
    return _STAGING.fullmatch(name) is not None
