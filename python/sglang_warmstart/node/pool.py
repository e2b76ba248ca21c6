"""Compile each kernel once: in this process, on this node, and among all that share the cache."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import Lanes, emit, now
from sglang_warmstart.base.locks import Held
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache
from sglang_warmstart.deepgemm.compiler import CompileJob, Compiler, CompilerError, compile_kernel
from sglang_warmstart.deepgemm.dialects import kernel_name, short_name
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.node.disk import Disk

# For the holder of a kernel's lock. Publishing is atomic: after this the kernel is compiled a second time.
LOCK_S = 10.0
# How often somebody else's lock is tried again.
_TRY_AGAIN_S = 0.1
# The largest of DeepGEMM's kernels, where all cores compile.
_LARGEST_SECONDS = 8.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class KernelError(Exception):
    """A kernel could not be compiled or published; names it and says why."""


class Watcher(Protocol):
    """Who shows the progress."""

    def planned(self) -> None:
        """A kernel is wanted that was not before."""

    def started(self) -> None:
        """A compiler has started on a kernel."""

    def ended(self) -> None:
        """That compiler has ended, one way or another."""

    def finished(self) -> None:
        """A kernel is done: compiled here, or published by somebody else, or failed."""


class CompilePool:
    """Kernels of one cache.

    Args:
        executor: runs ``compile_kernel``; it bounds how many run at once.
        limit_s: seconds for a compile.
        places: at the node's compilers. Only so many locks are held at once: a kernel that waits here for a core is
            left to other processes that have one free.
        disk: what the cache is asked by.
    """

    def __init__(
        self,
        executor: Executor,
        cache: KernelCache,
        compiler: Compiler,
        watcher: Watcher,
        limit_s: float,
        places: Places | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.compiled = 0
        self._executor = executor
        self._cache = cache
        self._compiler = compiler
        self._watcher = watcher
        self._limit_s = limit_s
        self._places = places or Places(sys.maxsize)
        self._disk = disk or Disk(cache.root)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._targets: dict[str, set[str]] = {}  # by kernel
        self._awaited: set[str] = set()
        self._own: set[str] = set()  # that were compiled here
        self._lanes = Lanes()

    def hurry(self, target: str) -> None:
        """A rank waits for the kernels of a target, also for those that are asked for later: they go first."""
        self._awaited.add(target)

    async def ensure(self, kernel: RecordedKernel, target: str = "") -> None:
        """Return when the kernel is in the cache.

        Args:
            target: that it is for; the kernel's event names it.

        Raises:
            KernelError: it could not be compiled or published.
        """
        self._targets.setdefault(kernel.directory, set()).add(target)
        task = self._under_way.get(kernel.directory)
        if task is None:
            task = asyncio.create_task(self._ensure(kernel, target))
            self._under_way[kernel.directory] = task
            task.add_done_callback(lambda _: self._under_way.pop(kernel.directory, None))
        # One that waits may give up: the work goes on for the others.
        await asyncio.shield(task)

    async def _ensure(self, kernel: RecordedKernel, target: str) -> None:
        try:
            if await self._has(kernel):
                if kernel.directory not in self._own:
                    _say_found(kernel, target)
                return
        except OSError as error:
            raise KernelError(f"{kernel.directory}: {error}") from error
        self._watcher.planned()
        try:
            while not await self._has(kernel):
                async with self._place(kernel):
                    if (held := await self._take(kernel)) is not None:
                        with held:
                            await self._compile(kernel, target)
                        return
                if not await self._wait_for_other(kernel):
                    # Its holder is slow, or hangs.
                    async with self._place(kernel):
                        await self._compile(kernel, target)
                    return
            _say_found(kernel, target)
        except (CompilerError, CacheError, OSError, BrokenExecutor) as error:
            raise KernelError(f"{kernel.directory}: {error}") from error
        finally:
            self._watcher.finished()

    def _place(self, kernel: RecordedKernel) -> contextlib.AbstractAsyncContextManager[None]:
        targets = self._targets[kernel.directory]
        return self._places.one_for(seconds_of(kernel.source), lambda: not targets.isdisjoint(self._awaited))

    async def _has(self, kernel: RecordedKernel) -> bool:
        return await self._disk.ask(self._cache.has, kernel.directory)

    async def _take(self, kernel: RecordedKernel) -> Held | None:
        return await self._disk.ask(self._cache.take_lock, kernel.directory)

    async def _wait_for_other(self, kernel: RecordedKernel) -> bool:
        """Return when the lock's holder has published the kernel, or has let the lock go; False if the time was up."""
        end = time.monotonic() + LOCK_S
        while not await self._has(kernel):
            if (held := await self._take(kernel)) is not None:
                held.release()
                return True
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_TRY_AGAIN_S)
        return True

    async def _compile(self, kernel: RecordedKernel, target: str) -> None:
        # Its last holder may have published it since we looked.
        if await self._has(kernel):
            _say_found(kernel, target)
            return
        job = CompileJob(kernel.source, kernel.flags, self._compiler, self._limit_s)
        future = self._executor.submit(_compile_named, kernel_name(kernel.directory), job)
        self._watcher.started()
        at, lane, failure = now(), self._lanes.take(), ""
        try:
            data = await asyncio.wrap_future(future)
        except Exception as error:
            failure = first_line(error)
            raise
        finally:
            self._watcher.ended()
            self._lanes.give_back(lane)
            emit(
                "compile",
                short_name(kernel.directory),
                at,
                now() - at,
                library="deep-gemm",
                lane=f"worker {lane}",
                target=target,
                error=failure,
            )
        await self._disk.publish(self._cache.publish, kernel.directory, kernel.source, data, kernel.flags)
        self.compiled += 1
        self._own.add(kernel.directory)


class RenewedExecutor(Executor):
    """An executor in whose place a new one comes after it has broken: a worker that dies takes its whole pool along.

    What the pool had at that time fails. It is used from one thread.

    Args:
        make: makes the executors.
    """

    def __init__(self, make: Callable[[], Executor]) -> None:
        self._make = make
        self._executor = make()
        self._is_over = False

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """As of any executor."""
        try:
            return self._executor.submit(fn, *args, **kwargs)
        except BrokenExecutor:
            if self._is_over:
                raise
            self._executor.shutdown(wait=False)
            self._executor = self._make()
            return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of any executor."""
        self._is_over = True
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


@dataclass(eq=False)
class _Turn:
    """Somebody who waits for a place."""

    seconds: float
    is_awaited: Callable[[], bool]
    come: asyncio.Future[None]


class Places:
    """The places at a node's compilers.

    The next is what a rank waits for; and of all that wait, what takes longest: else it would end last.
    """

    def __init__(self, count: int) -> None:
        self.count = self._free = count
        self._waiting: list[_Turn] = []  # in the order of their arrival
        self._when_free: list[Callable[[], object]] = []

    def when_free(self, call: Callable[[], object]) -> None:
        """Have this called when a place has been given back that nobody waits for."""
        self._when_free.append(call)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._free

    @contextlib.asynccontextmanager
    async def one_for(self, seconds: float, is_awaited: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
        """A place for work that takes so long.

        Args:
            is_awaited: says whether a rank waits for the work by now.
        """
        if self._free > 0:
            self._free -= 1
        else:
            turn = _Turn(seconds, is_awaited, asyncio.get_running_loop().create_future())
            self._waiting.append(turn)
            await turn.come
        try:
            yield
        finally:
            self._free += 1
            while self._waiting and self._free > 0:
                turn = max(self._waiting, key=lambda each: (each.is_awaited(), each.seconds))
                self._waiting.remove(turn)
                if not turn.come.cancelled():
                    self._free -= 1
                    turn.come.set_result(None)
            if self._free > 0:
                for call in self._when_free:
                    call()


def size_of(source: str) -> int:
    """A guess at how long a kernel takes to compile, of use for the order alone: the product of its template arguments.

    Those are tile sizes, stages and threads, mostly: the larger they are, the more there is to unroll.
    """
    _, _, instantiation = source.partition("__instantiate_kernel")
    return math.prod(int(number) or 1 for number in re.findall(r"(?<![\w:])\d{1,9}(?=[,\s])", instantiation))


def seconds_of(source: str) -> float:
    """The same guess in seconds, for the order beside what is not DeepGEMM's."""
    return _LARGEST_SECONDS * (1 - 1 / (1 + math.log(size_of(source))))


def _compile_named(name: str, job: CompileJob) -> bytes:
    try:
        return compile_kernel(job)
    except CompilerError as error:
        raise CompilerError(f"{name}: {error}") from None


def _say_found(kernel: RecordedKernel, target: str) -> None:
    emit("compile", short_name(kernel.directory), now(), library="deep-gemm", target=target, cached=True)
