"""What other libraries than DeepGEMM compile, built by processes of the service: each once on a node, all at once."""

from __future__ import annotations

import asyncio
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor

from sglang_warmstart.base.events import Lanes, emit, now
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.libraries.tilelang_ahead import BuildError, TileLangKernel, build
from sglang_warmstart.node import limits
from sglang_warmstart.node.pool import RenewedExecutor

# They are alike, and take a core each: a few that are left for a second round would double the time.
_PER_CORE = 1.25
_NICE = 5


class Builds:
    """All of them live in one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[str]] = {}
        # Where a library's cache is, it reads when it is imported.
        self._executors: dict[frozenset[tuple[str, str]], Executor] = {}
        self._lanes = Lanes()

    def begin(self, kernel: TileLangKernel) -> asyncio.Task[str]:
        """Build a kernel, if nobody has asked for it yet. Returns what ends with the reason why it could not be."""
        digest = kernel.digest
        if digest not in self._tasks:
            self._tasks[digest] = asyncio.create_task(self._build(kernel))
        return self._tasks[digest]

    def stop(self) -> None:
        """End what runs. Its processes end with this one."""
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)

    async def _build(self, kernel: TileLangKernel) -> str:
        executor = self._executor(kernel.environment)
        at, lane, reason = now(), self._lanes.take(), ""
        try:
            await asyncio.wrap_future(executor.submit(build, kernel))
        except (BuildError, BrokenExecutor, OSError) as error:
            reason = f"{kernel.name}: {error}"
        finally:
            self._lanes.give_back(lane)
        emit("compile", kernel.name, at, now() - at, library="tilelang", lane=f"builder {lane}", error=reason)
        return reason

    def _executor(self, environment: Mapping[str, str]) -> Executor:
        key = frozenset(environment.items())
        if key not in self._executors:
            self._executors[key] = RenewedExecutor(functools.partial(_processes, dict(environment)))
        return self._executors[key]


def _processes(environment: dict[str, str]) -> Executor:
    workers = limits.compile_workers(math.ceil(_PER_CORE * limits.container_cores(limits.own_groups())))
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
