"""Processes that build recipes. One imports what a library needs, once, and forks for each build.

So a build costs no import, what goes wrong in one leaves the others alone, and one that hangs is killed with all that
it has started. None of them has a context on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.libraries.recipe import BuildError, Recipe
from sglang_warmstart.libraries.table import LIBRARIES

# The longest module of SGLang 0.5.23 takes 34 s. Whoever waits for a library's lock waits for as long as this.
BUILD_LIMIT_S = 300.0
_NICE = 5
# By which these processes are known. They end by themselves, with all that they have started.
NAME = "builder"


class Builder:
    """The process that builds for one library, with one set of variables. Used from one event loop.

    Args:
        library: its name in the table.
        environment: of the builds, on top of our own.
    """

    def __init__(self, library: str, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (theirs, library, dict(environment))
        self._process = context.Process(target=_serve, args=arguments, name=f"{NAME} {library}")
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self._orders.fileno(), self._hear)

    async def build(self, recipe: Recipe, limit_s: float = BUILD_LIMIT_S) -> str:
        """Build it. Returns why it could not be, in one line, or nothing."""
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._orders.send((number, recipe, limit_s))
        except OSError:
            self._lost()
        return str(await answer)

    def close(self) -> None:
        """End it, and what it builds."""
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._orders.fileno())
            self._orders.close()
        self._process.terminate()
        self._lost()

    def _hear(self) -> None:
        try:
            number, reason = self._orders.recv()
        except (OSError, EOFError):
            self.close()
        else:
            self._waiting.pop(number).set_result(reason)

    def _lost(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            if not each.done():
                each.set_result("the process that builds has ended")


@dataclass
class _Build:
    """A build under way."""

    number: int
    pid: int
    answer: Connection
    end: float
    limit_s: float

    def kill(self) -> None:
        # Not SIGKILL: ninja is in the group, and its compilers are not; told to end, it ends them.
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGTERM)


def _serve(orders: Connection, library: str, environment: dict[str, str]) -> None:
    """Fork for each order, until nobody is there to give one."""
    builds: dict[Connection, _Build] = {}

    def end(*_: object) -> None:
        for left in builds.values():
            left.kill()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    os.nice(_NICE)
    # No context on a GPU, whatever a library does when it is imported.
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    try:
        while True:
            soonest = min((each.end for each in builds.values()), default=float("inf")) - time.monotonic()
            ready = connection.wait([orders, *builds], None if soonest == float("inf") else max(0.0, soonest))
            for each in ready:
                if each is orders:
                    number, recipe, limit_s = orders.recv()
                    _begin(builds, orders, number, recipe, limit_s)
                else:
                    _end(builds.pop(each), orders)  # type: ignore[call-overload]
            for late in [each for each in builds.values() if time.monotonic() > each.end]:
                late.kill()
                late.end = float("inf")  # the end of its pipe says that it has gone
    except (EOFError, OSError):
        pass  # the service has gone
    finally:
        end()


def _begin(builds: dict[Connection, _Build], orders: Connection, number: int, recipe: Recipe, limit_s: float) -> None:
    library = LIBRARIES[recipe.library]
    try:
        ahead = importlib.import_module(library.ahead)
        ahead.prepare(recipe.form)
    except Exception as error:
        orders.send((number, f"{type(error).__name__}: {first_line(error)}"))
        return
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        reason = "it ended"
        try:
            ahead.build(recipe.form, library.root(os.environ), os.environ)
            reason = ""
        except BuildError as error:
            reason = first_line(error)
        except BaseException as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
        finally:
            with contextlib.suppress(OSError):
                theirs.send(reason)
            os._exit(0)
    with contextlib.suppress(OSError):  # by both: whichever is first
        os.setpgid(pid, pid)
    theirs.close()
    builds[ours] = _Build(number, pid, ours, time.monotonic() + limit_s, limit_s)


def _end(build: _Build, orders: Connection) -> None:
    try:
        reason = build.answer.recv()
    except (EOFError, OSError):
        reason = f"it took more than {build.limit_s:g} s" if build.end == float("inf") else ""
    build.answer.close()
    _, status = os.waitpid(build.pid, 0)
    orders.send((build.number, reason if reason or not status else f"it ended with status {status}"))
