"""A cache whose file system does not answer keeps a caller waiting once, and nobody else at all."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from sglang_warmstart.base.mounts import mount_of
from sglang_warmstart.node import disk as disks
from sglang_warmstart.node.disk import Disk, NoAnswerError


def test_what_a_call_returns_or_raises_is_handed_on(tmp_path: Path) -> None:
    async def ask() -> None:
        disk = Disk(tmp_path)
        assert await disk.ask(int, "12", base=8) == 10
        with pytest.raises(FileNotFoundError):
            await disk.ask(os.stat, tmp_path / "missing")
        assert await disk.ask(os.listdir, tmp_path) == []

    asyncio.run(ask())


def test_after_a_call_that_does_not_return_none_is_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def ask() -> tuple[int, str]:
        disk, turns = Disk(tmp_path, answer_s=0.3), 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)

        counting = asyncio.create_task(count())
        with pytest.raises(NoAnswerError) as first:
            await disk.ask(fifo.open)  # nobody ever writes into it
        counting.cancel()
        start = time.monotonic()
        with pytest.raises(NoAnswerError, match=str(tmp_path)):
            await disk.ask(os.listdir, tmp_path)
        assert time.monotonic() - start < 0.1
        assert isinstance(first.value, OSError)
        return turns, str(first.value)

    turns, message = asyncio.run(ask())
    assert turns > 10, "the loop goes on meanwhile"
    assert message == f"{tmp_path}: no answer in 0.3 s from its file system ({mount_of(tmp_path)})"
    os.close(os.open(fifo, os.O_RDWR))  # lets the thread go


def test_calls_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def ask() -> float:
        disk, start = Disk(tmp_path), time.monotonic()
        await asyncio.gather(*(disk.ask(time.sleep, 0.2) for _ in range(100)))
        return time.monotonic() - start

    assert asyncio.run(ask()) < 5


def test_a_slow_disk_is_not_a_dead_one() -> None:
    assert 10 <= disks.ANSWER_S <= 60


def test_it_rests_when_nothing_is_being_published_nor_waits_for_what_hangs(tmp_path: Path) -> None:
    async def ask() -> tuple[bool, float]:
        disk, begun = Disk(tmp_path), asyncio.Event()
        loop = asyncio.get_running_loop()

        def publish() -> None:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.3)
            (tmp_path / "kernel").touch()

        asking = asyncio.create_task(disk.publish(publish))
        await begun.wait()
        asking.cancel()  # whoever asked may have gone
        await disk.rest()
        there = (tmp_path / "kernel").exists()
        await disk.rest()
        gone, start = Disk(tmp_path, answer_s=0.1), time.monotonic()
        with pytest.raises(NoAnswerError):
            await gone.publish(time.sleep, 2)
        await gone.rest()
        return there, time.monotonic() - start

    there, seconds = asyncio.run(ask())
    assert there
    assert seconds < 1.5
