"""Who can write a directory whose files decide what code runs: a cache of kernels, say (docs/security.md).

The owner, root and the group are trusted. Every other user is not, unless a switch says so.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from sglang_warmstart.base.errors import printable
from sglang_warmstart.base.switches import SHARED_CACHE

# Of a cache: where kernels lie, where they are built, and what is this package's own.
_PARTS = ("", "cache", "tmp", "warmstart", "warmstart/markers", "warmstart/ahead")


class UntrustedError(OSError):
    """A directory that somebody else could have filled, in one line: which, why, and what to do."""


def check(places: Iterable[Path], environment: Mapping[str, str]) -> None:
    """Refuse directories that others can write. What is not there yet is ours once we make it.

    Args:
        environment: has the switch that trusts them all the same.

    Raises:
        UntrustedError: another user owns one of them, or every user can write it.
    """
    if SHARED_CACHE.value(environment):
        return
    for place in places:
        try:
            found = place.stat()
        except (OSError, ValueError):  # it is not there, or its name is no path: then nothing is read from it either
            continue
        if found.st_uid not in (0, os.geteuid()) and not _is_ours(place, found.st_uid):
            who, remedy = f"belongs to user {found.st_uid}, this is user {os.geteuid()}", "name a directory of your own"
        elif found.st_mode & stat.S_IWOTH:
            who, remedy = f"can be written by every user (mode {stat.S_IMODE(found.st_mode):04o})", "chmod o-w it"
        else:
            continue
        raise UntrustedError(printable(f"{place} {who}, and kernels are code: {remedy}, or set {SHARED_CACHE.name}=1"))


def _is_ours(place: Path, owner: int) -> bool:
    """Whether the file system takes this user for the owner, as NFS does that maps root to another."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            return os.fstat(file.fileno()).st_uid == owner
    except OSError:
        return False


def check_caches(roots: Iterable[Path], environment: Mapping[str, str]) -> None:
    """The same of kernel caches: of all directories that decide what is loaded from them.

    Args:
        roots: of DeepGEMM's caches, those that are only read too.
        environment: see :func:`check`.

    Raises:
        UntrustedError: see :func:`check`.
    """
    for root in roots:
        # NVRTC's is a directory in that of nvcc: who can write there can put another in its place.
        for each in (root.parent, root) if root.name == "nvrtc" else (root,):
            check((each / part for part in _PARTS), environment)
