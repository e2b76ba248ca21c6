"""The warm-start service: one per node. Ranks ask it for targets, and it has their kernels recorded and compiled.

Started beside the server by :mod:`.launch` as ``python -m sglang_warmstart.kernels.service``; it ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sglang_warmstart.kernels import compiler as compilers
from sglang_warmstart.kernels import limits, protocol, stub
from sglang_warmstart.kernels.cache import CacheError, KernelCache
from sglang_warmstart.kernels.compiler import Compiler, CompilerError
from sglang_warmstart.kernels.identity import identity_of
from sglang_warmstart.kernels.marker import MarkerError, Markers, TargetKernels
from sglang_warmstart.kernels.pool import CompilePool, KernelError
from sglang_warmstart.kernels.progress import Progress
from sglang_warmstart.kernels.protocol import Announce, Answer, Hello, Restore, Warm, Warmed, Welcome
from sglang_warmstart.kernels.recorder import RecordedKernel
from sglang_warmstart.kernels.recording import LIBRARY, RecordingOrder, RecordingProblem, record
from sglang_warmstart.kernels.targets import KernelUse, Target

# The largest of DeepGEMM's kernels takes nvcc 8 s where all cores compile at once.
COMPILE_LIMIT_S = 120.0
RECORD_LIMIT_S = 120.0
# What a recording child takes of the GPU's memory, mostly its context, and the share of the free memory for all.
CHILD_BYTES = 1 << 30
CHILDREN_MAX = 16
CHILDREN_SHARE = 0.5

_PARENT_CHECK_S = 0.25

logger = logging.getLogger("sglang.warmstart.service")


@dataclass
class Work:
    """A target that is being warmed, or has been."""

    task: asyncio.Task[Warmed]


@dataclass
class Workshop:
    """All that belongs to one cache with one identity: its compiler, its pool, its targets."""

    hello: Hello
    cache: KernelCache
    compiler: Compiler
    markers: Markers
    pool: CompilePool
    stub: asyncio.Task[Path]
    works: dict[Target, Work] = field(default_factory=dict)


class Service:
    """The service's state; all of it lives in one event loop.

    Args:
        directory: private to the service and its children.
        library: the module that calls DeepGEMM in recording children.
    """

    def __init__(self, directory: Path, library: str = LIBRARY) -> None:
        self._directory = directory
        self._library = library
        self._workshops: dict[tuple[str, str], Workshop] = {}
        self._executors: dict[str, Executor] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._children = ThreadPoolExecutor(CHILDREN_MAX, thread_name_prefix="record")
        self._stopped = threading.Event()
        self._room = asyncio.Condition()
        self._recording = 0

    def prepare(self) -> None:
        """Have the forkserver import DeepGEMM while ranks load their weights."""
        self._context.set_forkserver_preload([self._library])
        threading.Thread(target=self._start_forkserver, daemon=True).start()

    def _start_forkserver(self) -> None:
        with contextlib.suppress(OSError):
            process = self._context.Process(target=os.getpid)
            process.start()
            process.join()

    def stop(self) -> None:
        """End what runs: compilers and recording children."""
        self._stopped.set()
        compilers.end_all_runs()
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one rank until it goes."""
        try:
            shop: Workshop | None = None
            answer: Welcome | Answer
            async for message in _messages(reader):
                if isinstance(message, Hello):
                    shop, answer = await self._welcome(message)
                elif shop is None:
                    answer = Welcome(problem="say Hello first")
                elif isinstance(message, Announce):
                    for target in message.targets:
                        self._work(shop, target, message.free_bytes)
                    continue
                elif isinstance(message, Warm):
                    answer = await self._warm(shop, message)
                elif isinstance(message, Restore):
                    answer = await self._restore(shop)
                else:
                    raise protocol.ProtocolError(f"a {type(message).__name__} is no question")
                writer.write(protocol.encode(answer))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the rank has gone: what it asked for is of use to others, and to the next start
        except protocol.ProtocolError as error:
            logger.warning("a connection is closed: %s", error)
        finally:
            writer.close()

    async def _welcome(self, hello: Hello) -> tuple[Workshop | None, Welcome]:
        try:
            compiler = await asyncio.to_thread(compilers.find, hello.environment, hello.kind)
            identity = await asyncio.to_thread(
                identity_of, hello.gpu, compiler, Path(hello.deep_gemm), hello.environment
            )
        except (CompilerError, OSError) as error:
            return None, Welcome(problem=str(error))
        cache = KernelCache(Path(hello.cache))
        notes = await asyncio.to_thread(_mend, cache)
        key = (hello.cache, identity.digest)
        known = self._workshops.get(key)
        if known is None:
            workers = limits.compile_workers(hello.workers)
            executor = self._executor(hello.kind, workers)
            known = Workshop(
                hello=hello,
                cache=cache,
                compiler=compiler,
                markers=Markers(cache, identity),
                pool=CompilePool(executor, cache, compiler, Progress(workers), COMPILE_LIMIT_S),
                stub=asyncio.create_task(self._make_stub(compiler, hello.gpu.capability)),
            )
            self._workshops[key] = known
        shop = Workshop(
            hello, cache, compiler, known.markers, known.pool, known.stub, known.works
        )  # this rank's own GPU and launch, and everything else in common
        return shop, Welcome(notes=tuple(notes))

    def _executor(self, kind: str, workers: int) -> Executor:
        # One pool a node: the first rank's bound holds for all. NVRTC keeps its parsed headers in a process.
        if kind not in self._executors:
            self._executors[kind] = (
                ProcessPoolExecutor(
                    workers,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_end_with,
                    initargs=(os.getpid(),),
                )
                if kind == "nvrtc"
                else ThreadPoolExecutor(workers, thread_name_prefix="compile")
            )
        return self._executors[kind]

    async def _make_stub(self, compiler: Compiler, capability: tuple[int, int]) -> Path:
        # By nvcc in any case, and of the rank's architecture.
        job = compilers.CompileJob(
            stub.SOURCE,
            " ".join(stub.flags_for(capability)),
            Compiler(compiler.path, compiler.version),
            COMPILE_LIMIT_S,
        )
        data = await asyncio.to_thread(compilers.compile_kernel, job)
        path = self._directory / f"stub-{capability[0]}{capability[1]}.cubin"
        await asyncio.to_thread(path.write_bytes, data)
        return path

    async def _restore(self, shop: Workshop) -> Answer:
        try:
            marker = await asyncio.to_thread(shop.markers.load, shop.hello.launch)
        except (MarkerError, OSError) as error:
            return Answer((), notes=(f"the marker is not used: {error}",))
        if marker is None:
            return Answer(())
        return Answer(tuple(Warmed(each.target, each.kernels) for each in marker.targets))

    async def _warm(self, shop: Workshop, question: Warm) -> Answer:
        works = [self._work(shop, target, question.free_bytes) for target in question.targets]
        if works:
            await asyncio.wait([work.task for work in works], timeout=question.limit_s)
        answers = []
        for target, work in zip(question.targets, works, strict=True):
            if work.task.done():
                answers.append(work.task.result())
            else:
                answers.append(Warmed(target, error=f"not ready after {question.limit_s:g} s"))
        notes = []
        finished = [TargetKernels(each.target, each.kernels) for each in answers if not each.error]
        try:
            await asyncio.to_thread(shop.markers.add, shop.hello.launch, finished)
        except OSError as error:
            notes.append(f"no marker is left for the next start: {error}")
        return Answer(tuple(answers), shop.pool.compiled, tuple(notes))

    def _work(self, shop: Workshop, target: Target, free_bytes: int) -> Work:
        work = shop.works.get(target)
        if work is None or (work.task.done() and work.task.result().error):
            work = shop.works[target] = Work(asyncio.create_task(self._warm_target(shop, target, free_bytes)))
        return work

    async def _warm_target(self, shop: Workshop, target: Target, free_bytes: int) -> Warmed:
        known = await asyncio.to_thread(shop.markers.find, target)
        if known is not None:
            return Warmed(target, known)
        try:
            kernels, compiles = await self._record(shop, target, free_bytes)
            done = await asyncio.gather(*compiles, return_exceptions=True)
        except RecordingProblem as error:
            return Warmed(target, error=str(error), no_context=error.failed.no_context)
        except (CompilerError, OSError) as error:
            return Warmed(target, error=str(error))
        failed = [each for each in done if isinstance(each, BaseException)]
        for each in failed:
            if not isinstance(each, KernelError):
                raise each
        if failed:
            more = f" (and {len(failed) - 1} more kernels)" if len(failed) > 1 else ""
            return Warmed(target, error=f"{failed[0]}{more}")
        return Warmed(target, tuple(sorted(KernelUse(each.m, each.directory) for each in kernels)))

    async def _record(
        self, shop: Workshop, target: Target, free_bytes: int
    ) -> tuple[list[RecordedKernel], list[asyncio.Task[None]]]:
        loop = asyncio.get_running_loop()
        order = RecordingOrder(
            target=target,
            gpu=shop.hello.gpu,
            environment=shop.hello.environment,
            version=shop.compiler.version,
            stub=str(await asyncio.shield(shop.stub)),
            directory=str(self._directory),
            library=self._library,
        )
        kernels: list[RecordedKernel] = []
        compiles: list[asyncio.Task[None]] = []

        def found(kernel: RecordedKernel) -> None:
            kernels.append(kernel)
            # It compiles while the sweep goes on.
            compiles.append(asyncio.create_task(shop.pool.ensure(kernel)))

        def sweep() -> None:
            for kernel in record(self._context, order, RECORD_LIMIT_S, self._stopped.is_set):
                loop.call_soon_threadsafe(found, kernel)

        async with self._place(free_bytes):
            try:
                await loop.run_in_executor(self._children, sweep)
            except RecordingProblem:
                # What was found compiles on: it is of use to the next start.
                for each in compiles:
                    each.add_done_callback(asyncio.Task.exception)
                raise
        return kernels, compiles

    @contextlib.asynccontextmanager
    async def _place(self, free_bytes: int) -> AsyncIterator[None]:
        """A place for a recording child: no more of them than the GPU's free memory carries."""
        places = max(1, min(CHILDREN_MAX, int(free_bytes * CHILDREN_SHARE) // CHILD_BYTES))
        async with self._room:
            await self._room.wait_for(lambda: self._recording < places)
            self._recording += 1
        try:
            yield
        finally:
            async with self._room:
                self._recording -= 1
                self._room.notify_all()


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[protocol.Message]:
    while True:
        try:
            prefix = await reader.readexactly(protocol.LENGTH.size)
        except asyncio.IncompleteReadError:
            return
        yield protocol.decode(await reader.readexactly(protocol.length_of(prefix)))


def _end_with(parent: int) -> None:
    """Have this process of a pool end with the service, also where that had no time to say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _mend(cache: KernelCache) -> list[str]:
    """Move aside what would make DeepGEMM abort. Returns a line for each."""
    notes = []
    for directory in cache.broken():
        try:
            aside = cache.set_aside(directory)
        except CacheError as error:
            notes.append(f"{cache.path(directory)} lacks one of its two files, and DeepGEMM will abort: {error}")
        else:
            notes.append(f"{directory} lacked one of its two files and is set aside as {aside}")
    return notes


async def run(path: Path, parent: int, library: str) -> int:
    """Serve until the parent ends or a signal says so. Returns the exit status."""
    service = Service(path.parent, library)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # Ctrl-C is for the server; this ends when that does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = await asyncio.start_unix_server(service.serve, path)
    except OSError as error:
        print(f"warmstart service: {path} cannot be served: {error.strerror or error}", file=sys.stderr)
        return 1
    service.prepare()
    async with server:
        while not stop.is_set() and os.getppid() == parent:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), _PARENT_CHECK_S)
    service.stop()
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the service's process."""
    parser = argparse.ArgumentParser(prog="python -m sglang_warmstart.kernels.service", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="a path in a directory of the service alone")
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    parser.add_argument("--library", default=LIBRARY, help="the module that calls DeepGEMM in recording children")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="[%(asctime)s] warmstart service: %(message)s", level=logging.INFO)
    if options.socket.exists():
        print(f"warmstart service: {options.socket} is taken: name another --socket", file=sys.stderr)
        sys.exit(2)
    status = asyncio.run(run(options.socket, options.parent, options.library))
    shutil.rmtree(options.socket.parent, ignore_errors=True)
    # Threads may still wait for a child that hangs in the driver.
    os._exit(status)


if __name__ == "__main__":
    main()
