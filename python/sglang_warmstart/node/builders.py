"""Processes that build recipes. One imports what a library needs, once, and forks for each build.

So a build costs no import, what goes wrong in one leaves the others alone, and one that hangs is ended with all that it
has started. None of them has a context on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import ModuleType
from typing import NamedTuple

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.processes import cpu_s_of
from sglang_warmstart.libraries import ptxas_threads
from sglang_warmstart.libraries.recipe import BuildError, Recipe
from sglang_warmstart.libraries.table import LIBRARIES

# Imports of torch and SGLang, on a slow disk.
PREPARE_LIMIT_S = 120.0
# For a build that does nothing: whoever waits for a library's lock waits for as long as this, and a little longer.
BUILD_LIMIT_S = 80.0
# One that works has three times as long. The longest modules take 90 s and more where other servers start beside, and
# 82 s on 4 cores (docs/results/benchmarks.md); whoever began again would need as long.
_WORKING = 3
# How often it is looked whether it works, and what share of a core that is.
_LOOK_S = 10.0
_WORKS = 0.1
# By which these processes are known.
NAME = "builder"
_NICE = 5
# A module with many sources has several compilers, and there are several modules at a time. What a user sets counts.
_JOBS = "2"
# One that takes this long is what a rank may come to wait for, while cores are idle.
LONG = 10.0  # seconds
_PR_SET_PDEATHSIG = 1
_ENDED = "the process that builds has ended"


class Outcome(NamedTuple):
    """What has become of an order.

    Args:
        reason: why it could not be done, in one line, or nothing.
        made: where it is, as ``Recipe.made``, if the library says.
    """

    reason: str = ""
    made: str = ""


class Builder:
    """The process that builds for one library. Used from one event loop.

    Args:
        library: its name in the table.
        threads: for ptxas, in a module that takes long.
    """

    def __init__(self, library: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        what = (theirs, library, os.getpid(), threads)
        self._process = context.Process(target=_serve, args=what, name=f"{NAME} {library}")
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        # It reads no orders while it imports, and the loop does not wait for it.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix=NAME)
        self._process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self._orders.fileno(), self._hear)

    async def prepare(self, recipe: Recipe) -> tuple[int, str]:
        """Import what a recipe needs. Returns its number, and why it cannot be built."""
        number = next(self._numbers)
        try:
            return number, (await asyncio.wait_for(self._order(number, recipe), PREPARE_LIMIT_S)).reason
        except asyncio.TimeoutError:
            self.close()
            return number, f"its imports take more than {PREPARE_LIMIT_S:g} s"

    async def build(self, number: int, limit_s: float = BUILD_LIMIT_S) -> Outcome:
        """Build what has been prepared."""
        return await self._order(number, limit_s)

    def close(self) -> None:
        """End it, and what it builds."""
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._orders.fileno())
            self._orders.close()
        self._process.terminate()
        self._sender.shutdown(wait=False, cancel_futures=True)
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            if not each.done():
                each.set_result(Outcome(_ENDED))

    async def _order(self, number: int, what: Recipe | float) -> Outcome:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._sender.submit(self._send, number, what)
        except RuntimeError:  # it is closed
            return Outcome(_ENDED)
        return await answer

    def _send(self, number: int, what: Recipe | float) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended, which is heard
            self._orders.send((number, what))

    def _hear(self) -> None:
        try:
            number, outcome = self._orders.recv()
        except (OSError, EOFError):
            self.close()
            return
        answer = self._waiting.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(outcome)


def end_those_left(limit_s: float) -> None:
    """End the builders that have not ended by themselves when the time is up: one may hang in an import."""
    end = time.monotonic() + limit_s
    for child in multiprocessing.active_children():
        if child.name.startswith(NAME):
            child.join(max(0.0, end - time.monotonic()))
            child.kill()


@dataclass
class _Build:
    """A build under way."""

    number: int
    pid: int
    answer: Connection
    limit_s: float
    begun: float = field(default_factory=time.monotonic)
    cpu_s: float = 0.0  # when it was looked at last
    too_long_s: float = 0.0  # after which it was ended

    def __post_init__(self) -> None:
        self.end = self.begun + self.limit_s

    def look(self) -> None:
        """When the time is up: give it more as long as it works, or end it."""
        now, cpu_s, last = time.monotonic(), cpu_s_of(self.pid), self.begun + _WORKING * self.limit_s
        if cpu_s - self.cpu_s >= _WORKS * _LOOK_S and now < last:
            self.cpu_s, self.end = cpu_s, min(now + _LOOK_S, last)
        else:
            self.too_long_s, self.end = now - self.begun, float("inf")  # the end of its pipe says that it has gone
            self.stop()

    def stop(self) -> None:
        # Not SIGKILL: ninja is in the group, and its compilers are not; told to end, it ends them.
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGTERM)


def _serve(orders: Connection, library: str, service: int, threads: int) -> None:
    """Fork for each build, until nobody is there to order one."""
    builds: dict[Connection, _Build] = {}
    prepared: dict[int, Recipe] = {}

    def end(*_: object) -> None:
        for left in builds.values():
            left.stop()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    _end_with_parent(service)
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # there is none
        os.dup2(2, 1)  # libraries say there what they do, and it may be for what a program reads
    # No context on a GPU, whatever a library does when it is imported.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("MAX_JOBS", _JOBS)
    try:
        while True:
            soonest = min((each.end for each in builds.values()), default=float("inf")) - time.monotonic()
            ready = connection.wait([orders, *builds], None if soonest == float("inf") else max(0.0, soonest))
            for each in ready:
                if each is not orders:
                    _end(builds.pop(each), orders)  # type: ignore[call-overload]
                    continue
                number, what = orders.recv()
                if isinstance(what, Recipe):
                    prepared[number] = what
                    orders.send((number, Outcome(_prepare(library, what))))
                else:
                    recipe = prepared.pop(number)
                    more = ptxas_threads.variables(threads if recipe.seconds >= LONG else 1, os.environ)
                    _begin(builds, orders, number, recipe, what, more)
            for late in [each for each in builds.values() if time.monotonic() > each.end]:
                late.look()
    except (EOFError, OSError):
        pass  # the service has gone
    finally:
        end()


def _prepare(library: str, recipe: Recipe) -> str:
    try:
        _ahead(library).prepare(recipe.form)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _ahead(library: str) -> ModuleType:
    return importlib.import_module(LIBRARIES[library].ahead)


def _begin(
    builds: dict[Connection, _Build],
    orders: Connection,
    number: int,
    recipe: Recipe,
    limit_s: float,
    variables: Mapping[str, str],
) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    builder = os.getpid()
    with _no_end():  # one that is not among the builds would not be ended
        try:
            pid = os.fork()
        except OSError as error:
            orders.send((number, Outcome(first_line(error))))
            return
        if pid:
            builds[ours] = _Build(number, pid, ours, limit_s)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if pid == 0:
        os.environ.update(variables)
        _build(recipe, theirs, builder, orders, limit_s)
    with contextlib.suppress(OSError):  # by both: whichever is first
        os.setpgid(pid, pid)
    theirs.close()


def _build(recipe: Recipe, answer: Connection, builder: int, orders: Connection, limit_s: float) -> None:
    """What a process does that has been forked for it."""
    os.setpgid(0, 0)
    _end_with_parent(builder)
    signal.alarm(int(_WORKING * limit_s) + 5)  # where nobody is left to end it
    orders.close()
    outcome = Outcome("it ended")
    try:
        made = _ahead(recipe.library).build(recipe.form, LIBRARIES[recipe.library].root(os.environ), os.environ)
        outcome = Outcome(made=made or "")
    except BuildError as error:
        outcome = Outcome(first_line(error))
    except BaseException as error:
        outcome = Outcome(f"{type(error).__name__}: {first_line(error)}")
    finally:
        with contextlib.suppress(OSError):
            answer.send(outcome)
        os._exit(0)


def _end(build: _Build, orders: Connection) -> None:
    try:
        outcome = build.answer.recv()
    except (EOFError, OSError):
        outcome = Outcome(f"it took more than {int(build.too_long_s)} s" if build.too_long_s else "")
    build.answer.close()
    _, status = os.waitpid(build.pid, 0)
    orders.send((build.number, outcome if outcome.reason or not status else Outcome(f"it ended with status {status}")))


@contextlib.contextmanager
def _no_end() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_with_parent(parent: int) -> None:
    """Have the kernel tell this process to end when its parent has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
