"""What other libraries than DeepGEMM compile, built by processes of the service: each once on a node, all at once."""

from __future__ import annotations

import asyncio
import functools
import math
import multiprocessing
import os
import signal
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import Lanes, emit, now
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.base.switches import WORKERS
from sglang_warmstart.libraries.tilelang_ahead import TileLangKernel, build
from sglang_warmstart.node import limits
from sglang_warmstart.node.pool import RenewedExecutor

# They are alike, and take a core each: a few that are left for a second round would double the time.
_PER_CORE = 1.25
_NICE = 5


class Builds:
    """All of them live in one event loop. They are bounded as the node's compiles are, by cores and free memory."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[str]] = {}
        # Where a library's cache is, it reads when it is imported.
        self._rooms: dict[frozenset[tuple[str, str]], _Room] = {}
        workers = WORKERS.value(os.environ) or math.ceil(_PER_CORE * limits.container_cores(limits.own_groups()))
        self._workers = limits.compile_workers(workers)
        self._places = asyncio.Semaphore(self._workers)
        self._lanes = Lanes()

    def begin(self, kernel: TileLangKernel) -> asyncio.Task[str]:
        """Build a kernel, if nobody has asked for it yet. Returns what ends with the reason why it could not be."""
        digest = kernel.digest
        if digest not in self._tasks:
            self._tasks[digest] = asyncio.create_task(self._build(kernel))
        return self._tasks[digest]

    def stop(self) -> None:
        """End what runs. Its processes end with this one."""
        for room in self._rooms.values():
            room.executor.shutdown(wait=False, cancel_futures=True)

    async def _build(self, kernel: TileLangKernel) -> str:
        key, reason = frozenset(kernel.environment.items()), ""
        if key not in self._rooms:
            make = functools.partial(_processes, self._workers, kernel.environment)
            self._rooms[key] = _Room(RenewedExecutor(make))
        room = self._rooms[key]
        room.wanted += 1
        try:
            async with self._places:
                at, lane = now(), self._lanes.take()
                try:
                    await asyncio.wrap_future(room.executor.submit(build, kernel))
                except Exception as error:
                    # Whatever it is, the rank compiles it.
                    reason = f"{kernel.name}: {first_line(error)}"
                finally:
                    self._lanes.give_back(lane)
                lane_name = f"builder {lane}"
                emit("compile", kernel.name, at, now() - at, library="tilelang", lane=lane_name, error=reason)
        finally:
            room.wanted -= 1
            if room.wanted == 0:
                # Each of its processes holds half a gigabyte.
                del self._rooms[key]
                room.executor.shutdown(wait=False)
        return reason


@dataclass
class _Room:
    """Processes that have imported a library with the same variables."""

    executor: Executor
    wanted: int = 0


def _processes(workers: int, environment: dict[str, str]) -> Executor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), environment),
    )


def _begin(parent: int, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    os.nice(_NICE)
    # No context on a GPU, whatever a library does when it is imported.
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
