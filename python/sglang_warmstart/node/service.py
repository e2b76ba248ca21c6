"""The service, one per node. Ranks ask it for targets, and it records and compiles their kernels.

:mod:`.launch` starts it beside the server. It ends with the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from sglang_warmstart.base import trust
from sglang_warmstart.base.answers import ANSWER_S
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import Lanes, emit, expect_log, log_of_process, now, open_log, timed
from sglang_warmstart.base.private_directory import remove_directory
from sglang_warmstart.base.processes import end_with
from sglang_warmstart.base.switches import COMPILER, WORKERS
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import further, stub
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import Compiler, CompilerError
from sglang_warmstart.deepgemm.dialects import UnknownJitError, dialect_of
from sglang_warmstart.deepgemm.identity import identity_of
from sglang_warmstart.deepgemm.ledger import Entry, Ledger
from sglang_warmstart.deepgemm.marker import Marker, MarkerError, Markers, name_of, targets_kernels
from sglang_warmstart.deepgemm.nogpu.host import PLACE
from sglang_warmstart.deepgemm.record.child import RecordingOrder, RecordingProblem, record
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.record.way import ON_GPU, Way, way_for
from sglang_warmstart.deepgemm.sinks import LaunchMarker, RankPlan, Sink
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.node import builders, limits, planned_targets, protocol
from sglang_warmstart.node.builds import Builds
from sglang_warmstart.node.disk import Disk, NoAnswerError
from sglang_warmstart.node.known_kernels import Known, kernels_here, known_of
from sglang_warmstart.node.planned import Planned
from sglang_warmstart.node.planned_targets import PlannedTargets
from sglang_warmstart.node.pool import CompilePool, KernelError, Places, RenewedExecutor
from sglang_warmstart.node.progress import Progress
from sglang_warmstart.node.protocol import (
    Announce,
    Answer,
    AwaitBuilds,
    Build,
    BuildPlanned,
    Built,
    CannotDescribe,
    Compiled,
    Expect,
    Hello,
    Restore,
    Warm,
    Warmed,
    Welcome,
)
from sglang_warmstart.node.restoring import wait_until_unlocked

# The largest of DeepGEMM's kernels takes nvcc 8 s where all cores compile at once.
COMPILE_LIMIT_S = 120.0
RECORD_LIMIT_S = 120.0
# Whoever restores kernels has a limit of its own, which is lower.
RESTORE_LIMIT_S = 150.0
# At the end, for the cache to take what is being published, and what the ranks have compiled themselves. Whoever stops
# the service waits a little longer (STOP_S).
END_S = 8.0
# What a recording child takes of the GPU's memory, mostly its context, and the share of the free memory for all.
CHILD_BYTES = 1 << 30
CHILDREN_MAX = 16
CHILDREN_SHARE = 0.5
# mHC's kernels are alike, and take a core each: a few that are left for a second round would double the time.
_PER_CORE = 1.25
# One that was started before the server ends if that does not come to its ranks: it has none on this node.
UNCALLED_S = 600.0
# For builders to end what they have started, and themselves.
_BUILDERS_S = 1.0

_PARENT_CHECK_S = 0.25
# How often the cache is looked through for kernels that ranks have compiled themselves.
_LOOK_S = 15.0
# How often the plan is written, if it has become another.
_LOOK_PLAN_S = 3.0

logger = logging.getLogger("sglang.warmstart.service")


@dataclass
class Workshop:
    """All that belongs to one cache with one identity: its compiler, its pool, its targets."""

    compiler: Compiler
    markers: Markers
    pool: CompilePool
    progress: Progress
    disk: Disk
    stub: asyncio.Task[Path] | None = None
    way: asyncio.Future[Way] | None = None
    ledger: Ledger[Target] = field(default_factory=Ledger)
    known: dict[Target, Known] = field(default_factory=dict)  # kernels, by a plan
    begun_ahead: set[Target] = field(default_factory=set)  # by no rank
    under_way: dict[Target, asyncio.Task[Entry]] = field(default_factory=dict)
    askers: list[Asker] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # entries of the cache
    further: dict[str, RecordedKernel] = field(default_factory=dict)  # kernels of no target, by directory


@dataclass(frozen=True)
class Asker:
    """A rank that asks: its own GPU and launch, where its targets are kept, and the workshop that it shares."""

    hello: Hello
    shop: Workshop
    sink: Sink
    notes: list[str] = field(default_factory=list)  # what its log is to say when it asks
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # its marker
    told: set[str] = field(default_factory=set)  # further kernels that the sink has
    planned: set[str] = field(default_factory=set)  # and that the plan of builds has
    is_ahead: bool = False  # it has not come yet: a plan asks for it


class Service:
    """The service's state; all of it lives in one event loop.

    Args:
        directory: private to the service and its children.
        library: the module that calls DeepGEMM in recording children; ``way_for`` says if none is named.
        restoring: a file that is locked as long as somebody restores kernels into the cache.
        plans: where the plans of ranks go; then nothing is compiled.
        early: it was started before the server, which may come to no ranks.
    """

    def __init__(
        self,
        directory: Path,
        library: str | None = None,
        restoring: Path | None = None,
        plans: Path | None = None,
        early: bool = False,
    ) -> None:
        self._directory = directory
        self._library = library
        self._restoring = restoring
        self._plans = plans
        self._under_way: set[asyncio.Task[None]] = set()
        self._workshops: dict[tuple[str, str], Workshop] = {}
        self._executors: dict[str, Executor] = {}
        self._forkserver = multiprocessing.get_context("forkserver")
        self._prepared: tuple[str, str] | None = None  # the library and the DeepGEMM that the forkserver has imported
        self._children = ThreadPoolExecutor(CHILDREN_MAX, thread_name_prefix="record")
        self._stopped = threading.Event()
        self._room = asyncio.Condition()
        self._recording: Counter[str] = Counter()  # children, by GPU
        self._lanes = Lanes()
        # One bound a node, for all that compiles.
        workers = WORKERS.value(os.environ) or math.ceil(_PER_CORE * limits.container_cores(limits.own_groups()))
        self._places = Places(limits.compile_workers(workers))
        self._builds = Builds(self._places)
        self.outcomes: dict[Target | Known, str] = {}  # what plans have, and why it could not be had
        self._planned_targets = PlannedTargets(self)
        self._planned = Planned(self._builds, self._planned_targets.begin, self._wait_for_restoring)
        self._was_told_run = False
        self._wants_all = False
        self._finder: asyncio.subprocess.Process | None = None
        self._uncalled_until = now() + UNCALLED_S if early else math.inf

    @property
    def is_forgotten(self) -> bool:
        """Whether nobody has said anything since it was started, and nobody will."""
        return now() > self._uncalled_until

    def prepare(self, way: Way, deep_gemm: str) -> None:
        """Have the forkserver import DeepGEMM: it takes seconds, and is of no use where a marker answers all."""
        if self._prepared is None:
            self._prepared = _imported(way, deep_gemm)
            os.environ[PLACE] = deep_gemm
            self._forkserver.set_forkserver_preload([way.library, record.__module__])
            threading.Thread(target=self._start_forkserver, daemon=True).start()

    def _start_forkserver(self) -> None:
        with contextlib.suppress(OSError, EOFError):  # a recording will say so
            process = self._forkserver.Process(target=os.getpid)
            process.start()
            process.join()

    def _context(self, way: Way, deep_gemm: str) -> ForkServerContext | SpawnContext:
        """Where children of a way start. Beside the stand-ins none gets a CUDA context, so a process has one way."""
        self.prepare(way, deep_gemm)
        if self._prepared == _imported(way, deep_gemm):
            return self._forkserver
        return multiprocessing.get_context("spawn")

    def stop(self) -> None:
        """End what runs: compilers and recording children."""
        self._stopped.set()
        compilers.end_all_runs()
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        self._builds.stop()
        self._end_finder()
        for child in multiprocessing.active_children():
            if not child.name.startswith(builders.NAME):
                child.kill()

    def build_planned(self, plan: Path) -> None:
        """Build what a plan has of other libraries than DeepGEMM."""
        self._planned.begin(plan)

    def build_guessed(self, plan: Path) -> None:
        """Build what a plan has that is not this launch's own."""
        self._planned.guess(plan)

    def find_targets(self, finder: Sequence[str], socket: Path) -> None:
        """Run who finds out which targets the ranks will have, and tells it at the socket; see :mod:`.launch`."""
        self._in_background(self._find_targets(finder, socket))

    async def _find_targets(self, finder: Sequence[str], socket: Path) -> None:
        module, *words = finder
        # By the path of the server, as all processes of ours.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
        command = [sys.executable, "-W", "ignore", "-c", code, str(os.getpid()), str(socket), *words]
        # In a group of its own: it has children.
        self._finder = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, start_new_session=True)
        if self._stopped.is_set():
            self._end_finder()
        await self._finder.wait()
        self._finder = None

    def _end_finder(self) -> None:
        if self._finder is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._finder.pid, signal.SIGKILL)

    async def build(self, recipes: Sequence[Recipe], root: Path, built: Callable[[Recipe, str], None]) -> None:
        """Build by recipes, also what an earlier start could not have; see :meth:`.planned.Planned.build`."""
        self._wants_all = True
        await self._planned.build(recipes, root, built)

    async def _begin_run(self, environment: Mapping[str, str]) -> None:
        if environment and not self._was_told_run:
            # It may have been started before the server: where caches and events are, that says.
            self._was_told_run = True
            os.environ.update(environment)
            if log_of_process() is None:
                await asyncio.to_thread(open_log, "service", os.environ)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one rank until it goes."""
        try:
            rank: Asker | None = None
            wanted: set[asyncio.Task[str]] = set()
            answer: Welcome | Answer | Built
            async for message in _messages(reader):
                if isinstance(message, Expect):
                    self._in_background(self._expect(message))
                    continue
                self._uncalled_until = math.inf
                if isinstance(message, Build):
                    wanted.add(self._builds.begin(message.recipe))
                    if message.recipe.made:  # else each start would build it again
                        self._planned.met(message.recipe)
                    continue
                if isinstance(message, BuildPlanned):
                    await self._begin_run(message.environment)
                    if message.plan:
                        self.build_planned(Path(message.plan))
                    continue
                if isinstance(message, Compiled):
                    self._planned.met(message.recipe)
                    continue
                if isinstance(message, (Announce, CannotDescribe)):
                    await self._told(rank, message)
                    continue
                if isinstance(message, Hello):
                    rank, answer = await self._welcome(message)
                    if rank is not None:
                        self._get_ready(rank)
                elif isinstance(message, AwaitBuilds):
                    self._builds.hurry(wanted)
                    answer = await _built(wanted, message.limit_s)
                    self._go_on()
                elif rank is None:
                    answer = Welcome(problem="say Hello first")
                elif isinstance(message, Warm):
                    answer = await self._warm(rank, message)
                elif isinstance(message, Restore):
                    answer = await self._restore(rank)
                else:
                    raise protocol.ProtocolError(f"a {type(message).__name__} is no question")
                writer.write(protocol.encode(answer))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the rank has gone: what it asked for is of use to others, and to the next start; or the service has
        except protocol.ProtocolError as error:
            logger.warning("a connection was closed: %s", error)
        finally:
            writer.close()

    def _go_on(self) -> None:
        """Called before an answer that took time.

        Raises:
            ConnectionAbortedError: this service has ended the work itself: nothing is to be said of it, or kept.
        """
        if self._stopped.is_set():
            raise ConnectionAbortedError("the service ends")

    async def _welcome(self, hello: Hello) -> tuple[Asker | None, Welcome]:
        rank = await self._asker(hello)
        if isinstance(rank, Welcome):
            return None, rank
        rank.shop.askers.append(rank)
        return rank, Welcome(only_plans=not rank.sink.compiles)

    async def _asker(self, hello: Hello) -> Asker | Welcome:
        """A rank and its workshop, or what problem it has."""
        try:
            dialect = dialect_of(Path(hello.deep_gemm))
            # Whoever says hello waits for a short time only.
            await Disk(Path(hello.cache), ANSWER_S).ask(trust.check_caches, dialect.roots(hello.cache), os.environ)
            if hello.kind not in dialect.compilers:
                return Welcome(problem=f"the JIT of this DeepGEMM cannot use {hello.kind}: leave {COMPILER.name} out")
            compiler = await asyncio.to_thread(compilers.find, hello.environment, hello.kind, dialect)
            identity = await asyncio.to_thread(
                identity_of, hello.gpu, compiler, Path(hello.deep_gemm), hello.environment
            )
        except (CompilerError, UnknownJitError, OSError) as error:
            return Welcome(problem=str(error))
        cache = KernelCache.of(hello.cache, dialect)
        key = (hello.cache, identity.digest)
        shop = self._workshops.get(key)
        if shop is None:
            workers = limits.compile_workers(hello.workers)
            progress = Progress(workers)
            executor = self._executor(hello.kind, workers)
            disk = Disk(cache.root)
            pool = CompilePool(executor, cache, compiler, progress, COMPILE_LIMIT_S, self._places, disk)
            shop = self._workshops[key] = Workshop(compiler, Markers(cache, identity), pool, progress, disk)
        sink: Sink = LaunchMarker(shop.markers, hello.launch)
        if self._plans is not None:
            name = f"{identity.digest}-{name_of(hello.launch)}.json"
            sink = RankPlan(self._plans / name, identity, hello.launch)
        return Asker(hello, shop, sink)

    async def warm_planned(
        self, hello: Hello, targets: Mapping[Target, Known | None], searched: bool, further: Sequence[Known]
    ) -> None:
        """Record and compile what a rank of an earlier start had, before the rank of this one asks.

        Not on the GPU: the rank itself may not have come to it. What has become of each is in ``outcomes``.
        """
        rank = await self._asker(hello)
        if isinstance(rank, Welcome):
            logger.info("no targets are warmed by a plan: %s", rank.problem)
            self.outcomes.update(dict.fromkeys((*targets, *further), rank.problem))
        elif rank.sink.compiles:
            digest = rank.shop.markers.identity.digest
            rank.shop.known |= {target: each for target, each in targets.items() if each and each.identity == digest}
            work = self._warm_planned(replace(rank, is_ahead=True), list(targets), searched)
            # No rank waits for the further ones.
            others = (self._compile_further(rank, known) for known in further)
            await asyncio.gather(self._planned_targets.enter(rank.shop, hello.launch, list(targets), work), *others)

    async def _warm_planned(self, rank: Asker, targets: Sequence[Target], searched: bool) -> None:
        earlier = await self._earlier(rank)
        there = set() if earlier is None else {each.target for each in earlier.targets}
        self.outcomes.update(dict.fromkeys(there, ""))
        targets = [target for target in targets if target not in there]
        # What a whole marker lacks could not be had, at an earlier start of a server.
        if (_is_whole(earlier) and not self._wants_all) or not (targets or searched):
            return
        for target in targets:
            for kernel in kernels_here(rank.shop.known.get(target), rank.hello, rank.shop.markers.identity):
                self._in_background(self._compile_known(rank, kernel, target))
        if (way := await self._way(rank)).library == ON_GPU:
            self.outcomes.update(dict.fromkeys(targets, f"it can be recorded on the GPU alone: {way.reason}"))
            return
        entries = await asyncio.gather(*(self._work(rank, target, 0) for target in targets))
        self._go_on()
        rank.shop.progress.rest()
        for target, entry in zip(targets, entries, strict=True):
            self.outcomes[target] = "" if entry.kernels is not None else entry.reason
        finished = [entry for entry in entries if entry.kernels is not None]
        # What one of them lacks the rank asks for when it has searched itself.
        complete = searched and len(finished) == len(entries)
        for note in await self._keep(rank, finished, {}, complete) if finished or complete else ():
            logger.warning("%s", note)

    async def _expect(self, said: Expect) -> None:
        """Record and compile what ranks will ask for. There is nobody yet to tell what becomes of it."""
        rank = await self._asker(said.hello)
        if isinstance(rank, Welcome) or not rank.sink.compiles:
            return
        rank = replace(rank, is_ahead=True)
        if (await self._way(rank)).library == ON_GPU:
            return  # the rank itself may not have come to it
        await asyncio.gather(*(self._work(rank, target, 0) for target in said.targets))
        rank.shop.progress.rest()

    async def _compile_known(self, rank: Asker, kernel: RecordedKernel, target: Target) -> None:
        with contextlib.suppress(KernelError, RuntimeError):  # whoever records the target says so; the service ends
            await rank.shop.pool.ensure(kernel, str(target))

    async def _compile_further(self, rank: Asker, known: Known) -> None:
        kernels = kernels_here(known, rank.hello, rank.shop.markers.identity)
        # No rank compiles them now, but they are to be in the marker and in the next plan all the same.
        rank.shop.further |= {kernel.directory: kernel for kernel in kernels}
        reason = "" if len(kernels) == len(known.kernels) else "of another DeepGEMM, compiler or GPU"
        for kernel in kernels:
            try:
                await rank.shop.pool.ensure(kernel)
            except Exception as error:  # whatever a plan has: the rank compiles what it calls
                reason = first_line(error)
        self.outcomes[known] = reason

    def _get_ready(self, rank: Asker) -> None:
        self._in_background(self._prepare_to_record(rank))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._stopped.is_set():
            # Nobody waits for it: a rank asks, and hears of what has failed for it.
            logger.warning("%s", first_line(error))

    async def _prepare_to_record(self, rank: Asker) -> None:
        """Where there is no marker there is work ahead, and the rank is about to find out which."""
        await self._wait_for_restoring()
        if not _is_whole(await self._earlier(rank)):
            way = await self._way(rank)
            self._stub(rank)
            self.prepare(way, rank.hello.deep_gemm)

    async def look_for_further(self, service: Path) -> None:
        """From time to time keep the plan, and the kernels that the ranks of this service have compiled themselves."""
        looked = now()
        while True:
            # SGLang kills its children when it ends.
            await asyncio.sleep(_LOOK_PLAN_S)
            await self._planned.keep()
            if now() - looked >= _LOOK_S:
                await self.keep_further(service)
                looked = now()

    async def keep_further(self, service: Path) -> None:
        """Keep them now: in the markers of all ranks that share the cache, whichever has called them first."""
        await self._planned.keep()
        for shop in list(self._workshops.values()):
            with contextlib.suppress(NoAnswerError):  # the ranks have been told
                await shop.disk.ask(_keep_further, shop, service)
                self._plan_further(shop)
        await self._planned.keep()

    def _plan_further(self, shop: Workshop) -> None:
        """Have further kernels in the plan of this launch: all of them for each rank, whichever has called them."""
        for rank in shop.askers:
            if not rank.sink.compiles or shop.further.keys() == rank.planned:
                continue
            rank.planned.update(shop.further)
            if known := known_of(list(shop.further.values()), rank.hello, shop.markers.identity):
                self._planned.met(planned_targets.recipe_of_further(rank.hello, known))

    async def end(self, service: Path) -> None:
        """After :meth:`stop`: leave the caches whole, with all that is known, and nothing half made beside them."""
        await asyncio.gather(
            self.keep_further(service),
            self._planned.rest(),
            asyncio.to_thread(builders.end_those_left, _BUILDERS_S),
            *(shop.disk.rest() for shop in list(self._workshops.values())),
        )

    async def _wait_for_restoring(self) -> None:
        if self._restoring is not None:
            done = await wait_until_unlocked(self._restoring, RESTORE_LIMIT_S)
            if not done:
                logger.warning("restoring kernels takes more than %g s: the ranks go on without it", RESTORE_LIMIT_S)
            self._restoring = None

    def _executor(self, kind: str, workers: int) -> Executor:
        # One pool a node: the first rank's bound holds for all. NVRTC keeps its parsed headers in a process.
        if kind not in self._executors:
            self._executors[kind] = (
                RenewedExecutor(functools.partial(_processes, workers))
                if kind == "nvrtc"
                else ThreadPoolExecutor(workers, thread_name_prefix="compile")
            )
        return self._executors[kind]

    def _way(self, rank: Asker) -> asyncio.Future[Way]:
        if rank.shop.way is None:
            rank.shop.way = asyncio.create_task(self._find_way(rank.hello))
        return rank.shop.way

    async def _find_way(self, hello: Hello) -> Way:
        if self._library is not None:
            return Way(self._library, "it was asked for")
        try:
            way = await asyncio.to_thread(way_for, Path(hello.deep_gemm), hello.gpu, os.environ)
        except Exception as error:
            # Whatever a fork's torch or DeepGEMM looks like, it was recorded on the GPU before.
            way = Way(ON_GPU, f"{type(error).__name__}: {error}")
        logger.info("targets are recorded %s", f"on the GPU: {way.reason}" if way.takes_gpu else "without the GPU")
        return way

    def _stub(self, rank: Asker) -> asyncio.Task[Path]:
        """What makes the stub, begun by whoever needs it first, and again after a failure."""
        shop = rank.shop
        if shop.stub is None or (shop.stub.done() and shop.stub.exception() is not None):
            shop.stub = asyncio.create_task(self._make_stub(shop, rank.hello.gpu.capability))
        return shop.stub

    async def _make_stub(self, shop: Workshop, capability: tuple[int, int]) -> Path:
        data = stub.MARK  # where nothing loads it
        if shop.way is None or (await shop.way).takes_gpu:
            # By nvcc in any case, and of the rank's architecture.
            compiler = Compiler(shop.compiler.path, shop.compiler.version)
            job = compilers.CompileJob(stub.SOURCE, " ".join(stub.flags_for(capability)), compiler, COMPILE_LIMIT_S)
            with timed("compile", "the stub", library="deep-gemm", lane="stub"):
                data = await asyncio.to_thread(compilers.compile_kernel, job)
        path = self._directory / f"stub-{shop.markers.identity.digest}.cubin"
        await asyncio.to_thread(path.write_bytes, data)
        return path

    async def _restore(self, rank: Asker) -> Answer:
        begin = now()
        await self._wait_for_restoring()
        # Before it searches for targets itself, which takes it longer.
        left_s = max(0.0, RESTORE_LIMIT_S - (now() - begin))
        for target in self._planned_targets.of(rank.shop, rank.hello.launch):
            rank.shop.pool.hurry(str(target))
        await self._planned_targets.wait_for(rank.shop, rank.hello.launch, left_s)
        self._go_on()
        marker = await self._earlier(rank)
        targets = () if marker is None else marker.targets
        if targets:
            names = {use.directory for each in targets for use in each.kernels}
            emit("restore", "by the marker", now(), library="deep-gemm", kernels=len(names), cached=True)
        self._remember(rank, (each.target for each in targets), _is_whole(marker))
        if marker is not None and marker.further:
            with contextlib.suppress(NoAnswerError):
                found = await rank.shop.disk.ask(further.in_marker, rank.shop.markers.cache, marker.further)
                rank.shop.further |= {kernel.directory: kernel for kernel in found}
        notes, rank.notes[:] = tuple(rank.notes), []
        warmed = tuple(Warmed(each.target, each.kernels) for each in targets)
        return Answer(warmed, notes=notes, known=_is_whole(marker))

    def _remember(self, rank: Asker, targets: Iterable[Target], searched: bool) -> None:
        """Have targets in the plan of this launch."""
        if rank.sink.compiles:
            shop = rank.shop
            for target in targets:
                if recorded := shop.ledger[target].recorded:
                    known = known_of(recorded, rank.hello, shop.markers.identity)
                else:
                    known = shop.known.get(target)
                self._planned.met(planned_targets.recipe_of(rank.hello, target, searched, known))

    async def _earlier(self, rank: Asker) -> Marker | None:
        try:
            # When a rank has said hello, and when it asks. One that is damaged is set aside by the first of them, and
            # is not there for the other.
            async with rank.reading:
                return await rank.shop.disk.ask(rank.sink.earlier)
        except (MarkerError, OSError) as error:
            note = f"the marker is not used: {error}"
            if note not in rank.notes:  # it has been read before, when the rank said hello
                rank.notes.append(note)
            return None

    async def _told(self, rank: Asker | None, message: Announce | CannotDescribe) -> None:
        if rank is None:
            return
        if isinstance(message, Announce):
            for target in message.targets:
                self._work(rank, target, message.free_bytes)
        else:
            rank.notes.extend(await self._keep(rank, (), {message.target: message.reason}))

    async def _warm(self, rank: Asker, question: Warm) -> Answer:
        for target in question.targets:
            rank.shop.pool.hurry(str(target))
        works = await self._worked(rank, question, question.limit_s)
        self._go_on()
        rank.shop.progress.rest()
        answers = []
        finished: list[Entry] = []
        left: dict[str, str] = {}
        for target, work in zip(question.targets, works, strict=True):
            if not work.done():
                answers.append(Warmed(target, error=f"not ready after {question.limit_s:g} s", not_ready=True))
            elif (entry := work.result()).kernels is None:
                answers.append(Warmed(target, error=entry.reason, no_context=entry.no_context))
            else:
                answers.append(Warmed(target, entry.kernels.kernels))
                finished.append(entry)
        left = {str(each.target): each.error for each in answers if each.error}
        # A launch without targets is known too: its next start need not search for any.
        searched = question.searched and not any(each.not_ready for each in answers)
        notes = await self._keep(rank, finished, left, searched) if finished or left or not answers else []
        # Of those that failed, or take too long, a marker of all targets would say that they need not be tried again.
        kept = [each.target for each in answers if question.searched or not each.error]
        self._remember(rank, kept, question.searched)
        return Answer(tuple(answers), rank.shop.pool.compiled, tuple(notes))

    async def _worked(self, rank: Asker, question: Warm, limit_s: float) -> list[asyncio.Task[Entry]]:
        """The work on the targets of a question, when it is done or the time is up."""
        begin, ahead = now(), rank.shop.begun_ahead.intersection(question.targets)
        works = {target: self._work(rank, target, question.free_bytes) for target in question.targets}
        if works:
            await asyncio.wait(works.values(), timeout=limit_s)
        for target in ahead:
            if works[target].done() and target in rank.shop.begun_ahead:
                # What could not be had before there was a rank may be had on its GPU.
                works[target] = self._work(rank, target, question.free_bytes)
        if ahead:
            await asyncio.wait(works.values(), timeout=max(0.0, limit_s - (now() - begin)))
        return [works[target] for target in question.targets]

    async def _keep(
        self, rank: Asker, finished: Sequence[Entry], left: Mapping[str, str], searched: bool = False
    ) -> list[str]:
        """Keep what has become of targets. Returns what the rank's log is to say."""

        def keep() -> None:
            for target, reason in left.items():
                rank.sink.leave(target, reason)
            if finished or searched or not left:
                # A marker with nothing in it says that there is nothing, and not that all has failed.
                rank.sink.keep(finished, searched, if_there=bool(left) and not finished)

        try:
            await rank.shop.disk.ask(keep)
        except OSError as error:
            return [f"{rank.sink.complaint}: {error}"]
        return []

    def _work(self, rank: Asker, target: Target, free_bytes: int) -> asyncio.Task[Entry]:
        work = rank.shop.under_way.get(target)
        if work is None or (work.done() and work.result().state == "left"):
            work = rank.shop.under_way[target] = asyncio.create_task(self._warm_target(rank, target, free_bytes))
            rank.shop.begun_ahead.discard(target)
            if rank.is_ahead:
                rank.shop.begun_ahead.add(target)
        return work

    async def _warm_target(self, rank: Asker, target: Target, free_bytes: int) -> Entry:
        ledger = rank.shop.ledger
        try:
            await self._wait_for_restoring()
            kernels = await rank.shop.disk.ask(rank.sink.find, target)
            if kernels is None:
                await self._new_target(rank, target, free_bytes)
            else:
                ledger[target].kernels = kernels
        except RecordingProblem as error:
            return ledger.leave(target, str(error), no_context=error.failed.no_context)
        except (CompilerError, KernelError, OSError) as error:
            return ledger.leave(target, str(error))
        except Exception as error:
            # It is this target's, and neither the service's nor that of a rank that asks for others too.
            logger.exception("%s", target)
            return ledger.leave(target, f"{type(error).__name__}: {error}")
        ledger[target].state = "compiled" if rank.sink.compiles else "recorded"
        return ledger[target]

    async def _new_target(self, rank: Asker, target: Target, free_bytes: int) -> None:
        """Record a target, and have its kernels compiled if they are to be."""
        recorded, compiles = await self._record(rank, target, free_bytes)
        entry = rank.shop.ledger[target]
        entry.recorded, entry.state = tuple(recorded), "recorded"
        ended = await asyncio.gather(*compiles, return_exceptions=True)
        failures = [each for each in ended if each is not None]
        for each in failures:
            if not isinstance(each, KernelError):
                raise each
        if failures:
            more = f" (and {len(failures) - 1} more kernels)" if len(failures) > 1 else ""
            raise KernelError(f"{failures[0]}{more}")
        entry.kernels = targets_kernels(target, recorded)

    async def _record(
        self, rank: Asker, target: Target, free_bytes: int
    ) -> tuple[list[RecordedKernel], list[asyncio.Task[None]]]:
        way = await self._way(rank)
        try:
            return await self._record_by(way, rank, target, free_bytes)
        except RecordingProblem as problem:
            if way.takes_gpu or rank.is_ahead or not problem.failed.no_library:
                raise
            if rank.shop.way is not None and rank.shop.way.result() == way:
                logger.warning("targets are recorded on the GPU: %s", problem)
                rank.shop.way, rank.shop.stub = asyncio.get_running_loop().create_future(), None
                rank.shop.way.set_result(Way(ON_GPU, str(problem)))
            return await self._record_by(await self._way(rank), rank, target, free_bytes)

    async def _record_by(
        self, way: Way, rank: Asker, target: Target, free_bytes: int
    ) -> tuple[list[RecordedKernel], list[asyncio.Task[None]]]:
        loop = asyncio.get_running_loop()
        hello = rank.hello
        order = RecordingOrder(
            target=target,
            gpu=hello.gpu,
            environment={**hello.environment, PLACE: hello.deep_gemm},
            version=rank.shop.compiler.version,
            stub=str(await asyncio.shield(self._stub(rank))),
            directory=str(self._directory),
            library=way.library,
            jit=rank.shop.markers.identity.jit,
        )
        context = self._context(way, hello.deep_gemm)
        kernels: list[RecordedKernel] = []
        compiles: list[asyncio.Task[None]] = []

        def found(kernel: RecordedKernel) -> None:
            kernels.append(kernel)
            if rank.sink.compiles:
                # It compiles while the sweep goes on.
                compiles.append(asyncio.create_task(rank.shop.pool.ensure(kernel, str(target))))

        def sweep() -> None:
            for kernel in record(context, order, RECORD_LIMIT_S, self._stopped.is_set):
                loop.call_soon_threadsafe(found, kernel)

        # Without a context, they take cores and no more.
        places = int(free_bytes * CHILDREN_SHARE) // CHILD_BYTES if way.takes_gpu else limits.compile_workers(None)
        async with self._place(rank.hello.gpu.device, places) as lane:
            with timed("record", str(target), library="deep-gemm", lane=lane, kernels=0) as details:
                try:
                    await loop.run_in_executor(self._children, sweep)
                except RecordingProblem:
                    # What was found compiles on: it is of use to the next start.
                    for each in compiles:
                        each.add_done_callback(asyncio.Task.exception)
                    raise
                finally:
                    details["kernels"] = len(kernels)
        return kernels, compiles

    @contextlib.asynccontextmanager
    async def _place(self, device: str, places: int) -> AsyncIterator[str]:
        """A place for a recording child of a GPU, and its name: one of so many, as far as there are threads."""
        places = max(1, min(CHILDREN_MAX, places))
        async with self._room:
            await self._room.wait_for(lambda: self._recording[device] < places)
            self._recording[device] += 1
        lane = self._lanes.take()
        try:
            yield f"recorder {lane}"
        finally:
            self._lanes.give_back(lane)
            async with self._room:
                self._recording[device] -= 1
                self._room.notify_all()


def _keep_further(shop: Workshop, service: Path) -> None:
    cache = shop.markers.cache
    new = {name for name in further.names_in(cache) - shop.seen if cache.has(name)}
    shop.seen |= new
    shop.further |= {kernel.directory: kernel for kernel in further.compiled_in(cache, new, service)}
    there = [kernel for kernel in list(shop.further.values()) if cache.has(kernel.directory)]
    for rank in list(shop.askers):
        if untold := [each for each in there if each.directory not in rank.told]:
            try:
                if rank.sink.further(untold):
                    rank.told.update(each.directory for each in untold)
            except Exception as error:
                # Whatever the cache is like: the kernels are in it, and the service goes on.
                logger.warning("%s: %s", rank.sink.complaint, first_line(error))


async def _built(wanted: set[asyncio.Task[str]], limit_s: float) -> Built:
    done = (await asyncio.wait(wanted, timeout=limit_s))[0] if wanted else set()
    failed = tuple(sorted(reason for reason in (each.result() for each in done) if reason))
    return Built(len(done) - len(failed), failed, len(wanted) - len(done))


def _is_whole(marker: Marker | None) -> bool:
    """Whether nobody need search for targets."""
    return marker is not None and marker.searched


def _imported(way: Way, deep_gemm: str) -> tuple[str, str]:
    """What a forkserver has imported for a way; on the GPU it is the DeepGEMM that is installed."""
    return (way.library, "" if way.takes_gpu else deep_gemm)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[protocol.Message]:
    while True:
        try:
            prefix = await reader.readexactly(protocol.LENGTH.size)
        except asyncio.IncompleteReadError:
            return
        yield protocol.decode(await reader.readexactly(protocol.length_of(prefix)))


def _processes(workers: int) -> Executor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    )


def _begin_worker(parent: int) -> None:
    """Have this process of a pool end with the service, also where that had no time to say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)


async def run(service: Service, path: Path, parent: int) -> int:
    """Serve until the parent ends or a signal says so. Returns the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        server = await asyncio.start_unix_server(service.serve, path)
    except OSError as error:
        print(f"warmstart service: {path} cannot be served: {error.strerror or error}", file=sys.stderr)
        return 1
    looking = asyncio.create_task(service.look_for_further(path))
    while not (stop.is_set() or service.is_forgotten) and os.getppid() == parent:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), _PARENT_CHECK_S)
    # Not to wait for its connections: a rank that waits for an answer keeps its own open.
    server.close()
    looking.cancel()
    service.stop()
    try:
        await asyncio.wait_for(service.end(path), END_S)
    except asyncio.TimeoutError:
        logger.warning("the cache takes longer than %g s at the end: a later start removes what is half made", END_S)
    return 0


async def serve(options: argparse.Namespace) -> int:
    """The service of these options. Returns the exit status."""
    service = Service(options.socket.parent, options.library, options.restoring, options.plans, options.early)
    if options.build_plan is not None:
        service.build_planned(options.build_plan)
    if options.guesses is not None:
        service.build_guessed(options.guesses)
    if options.finder:
        service.find_targets(options.finder, options.socket)
    return await run(service, options.socket, options.parent)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the service's process."""
    parser = argparse.ArgumentParser(prog="python -m sglang_warmstart.node.service", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="a path in a directory of the service alone")
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    parser.add_argument("--library", help="the module that calls DeepGEMM in recording children, if not the usual one")
    parser.add_argument("--restoring", type=Path, help="a file that is locked while somebody restores kernels")
    parser.add_argument("--plans", type=Path, help="record plans into this directory, and compile nothing")
    parser.add_argument("--build-plan", type=Path, help="what other libraries compile: it is built at once")
    parser.add_argument("--guesses", type=Path, help="what they may compile: it is built at once, and not kept")
    parser.add_argument("--finder", type=json.loads, help="a module and its words: it says which targets there will be")
    parser.add_argument("--early", action="store_true", help="end after a while if no server comes")
    options = parser.parse_args(arguments)
    # Ctrl-C is for the server; this ends when that does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="[%(asctime)s] warmstart service: %(message)s", level=logging.INFO)
    if open_log("service", os.environ) is None:
        expect_log()
    if options.socket.exists():
        print(f"warmstart service: {options.socket} is taken: name another --socket", file=sys.stderr)
        sys.exit(2)
    # Not asyncio.run, which ends its threads first: one may still wait for a child that hangs in the driver.
    status = asyncio.new_event_loop().run_until_complete(serve(options))
    remove_directory(options.socket.parent)
    os._exit(status)


if __name__ == "__main__":
    main()
