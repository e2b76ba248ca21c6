"""Locks that are held, let go, refused, or never answered."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sglang_warmstart.base import locks
from sglang_warmstart.base.locks import Locks, NoLocksError, try_lock

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def hang(*_: object) -> None:
    time.sleep(60)


def refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_lock_is_one_processs_at_a_time_and_ends_with_it(tmp_path: Path) -> None:
    ours = Locks(tmp_path / "locks")
    held = ours.take("a")
    assert held is not None and ours.take("a") is None and ours.take("b") is not None
    held.release()
    path = tmp_path / "locks" / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert ours.take("a") is None
    holder.kill()
    holder.communicate()
    assert ours.take("a") is not None


def test_holding_is_waited_for_with_a_bound(tmp_path: Path) -> None:
    ours = Locks(tmp_path)
    first = ours.take("a")
    assert first is not None
    start = time.monotonic()
    with ours.held("a", 0.2):
        assert 0.2 <= time.monotonic() - start < 5
    first.release()
    with ours.held("a", 5):
        assert ours.take("a") is None


@pytest.mark.parametrize("lock", [hang, refuse])
def test_a_file_system_without_locks_is_said_once_and_done_without(
    lock: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", lock)
    ours = Locks(tmp_path, answer_s=0.2)
    start = time.monotonic()
    assert ours.take("a") is not None and ours.take("a") is not None, "publishing is atomic: both may do the work"
    assert time.monotonic() - start < 5
    (line,) = caplog.messages
    assert str(tmp_path) in line and "the same work twice" in line
    with (tmp_path / "file").open("wb") as file, pytest.raises(NoLocksError):
        try_lock(file, answer_s=0.2)


def test_a_shared_lock_lets_others_share_and_keeps_writers_out(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as one, path.open("rb") as another, path.open("ab") as writer:
        assert try_lock(one, "shared") and try_lock(another, "shared")
        assert not try_lock(writer)


def test_an_answer_is_waited_for_a_moment() -> None:
    assert 1 <= locks.ANSWER_S <= 10
