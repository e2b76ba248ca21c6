"""Waiting for whoever restores kernels: as long as its lock is held, and no longer."""

from __future__ import annotations

import asyncio
import fcntl
import time
from pathlib import Path

import pytest
from sglang_warmstart.node.restoring import wait_until_unlocked


def wait(path: Path, limit_s: float = 5.0) -> tuple[bool, float]:
    start = time.monotonic()
    done = asyncio.run(wait_until_unlocked(path, limit_s))
    return done, time.monotonic() - start


@pytest.mark.parametrize("name", ["file", "is not there", "directory/below"])
def test_what_nobody_holds_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done, seconds = wait(tmp_path / name)
    assert done and seconds < 1


def test_a_lock_that_is_not_given_up_is_waited_for_up_to_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done, seconds = wait(tmp_path / "file", 0.3)
    assert not done and seconds >= 0.3


def test_a_lock_is_waited_for_until_it_is_given_up_or_its_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "file"

    async def both(end: object) -> bool:
        waiting = asyncio.create_task(wait_until_unlocked(path, 5))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        end()  # type: ignore[operator]
        return await waiting

    for _ in range(2):
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert asyncio.run(both(path.unlink))
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert asyncio.run(both(lambda held=file: fcntl.flock(held, fcntl.LOCK_UN)))
