"""Entries of a cache for tests: what is to be published, and what is there afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sglang_warmstart.libraries.cached import CachedFile, is_staging

THEN = 1_700_000_000_123_456_789

Tree = dict[str, bytes]


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of syncs take long on a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def staged(place: Path, files: Mapping[str, bytes]) -> tuple[list[CachedFile], Path]:
    """Files of a cache, and the directory with their contents."""
    contents = place / "contents"
    contents.mkdir(exist_ok=True)
    made = []
    for number, (path, data) in enumerate(files.items()):
        sha256 = hashlib.sha256(data).hexdigest()
        (contents / sha256).write_bytes(data)
        made.append(CachedFile(path, sha256, THEN + number))
    return made, contents


def write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a root."""
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def tree_of(root: Path) -> Tree:
    """The files below a root."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def visible(root: Path) -> Tree:
    """The same without what is being published."""
    return {path: data for path, data in tree_of(root).items() if not is_staging(path.split("/")[0])}


def has_no_staging(root: Path) -> bool:
    """Whether nothing is left of publishing."""
    return not any(is_staging(path.name) for path in root.iterdir())
