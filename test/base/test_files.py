"""Files and directories appear whole, or not at all; whoever was faster keeps the place."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from sglang_warmstart.base import files
from sglang_warmstart.base.files import publish, put, replacing, write_atomically, write_synced


def build(directory: Path) -> None:
    write_synced(directory / "a", b"ours")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_directory_is_built_aside_and_put_in_its_place(tmp_path: Path) -> None:
    place, scratch = tmp_path / "deep" / "place", tmp_path / "tmp"
    assert publish(place, build, scratch)
    assert tree(tmp_path) == {"deep/place/a": b"ours"}


def test_who_was_faster_keeps_the_place_and_nothing_is_left(tmp_path: Path) -> None:
    place, scratch = tmp_path / "place", tmp_path / "tmp"

    def slow(directory: Path) -> None:
        build(directory)
        place.mkdir()
        (place / "a").write_bytes(b"theirs")

    assert not publish(place, slow, scratch)
    assert tree(tmp_path) == {"place/a": b"theirs"}
    (tmp_path / "other").mkdir()
    assert not put(tmp_path / "other", place)
    (tmp_path / "empty").mkdir()
    assert put(tmp_path / "other", tmp_path / "empty"), "an empty one is in nobody's way"


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        build(directory)
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        publish(tmp_path / "place", fail, tmp_path / "tmp")
    assert tree(tmp_path) == {}
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert tree(tmp_path) == {"file": b"old"}
    write_atomically(path, b"new")
    assert tree(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_will_do(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert publish(tmp_path / "place", build, tmp_path / "tmp")
    write_atomically(tmp_path / "file", b"data")
    assert tree(tmp_path) == {"place/a": b"ours", "file": b"data"}


def test_a_disk_that_is_broken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path / "place", build, tmp_path / "tmp")
    assert tree(tmp_path) == {}
