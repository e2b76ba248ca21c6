"""What other libraries than DeepGEMM compile, built ahead of need: each once on a node, longest first, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Collection, Iterator

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import Lanes, emit, now
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node.builders import Builder
from sglang_warmstart.node.pool import Places

# SGLang and torch take as long to import where other processes import them too.
IMPORT_WAIT_S = 20.0
# Each kernel has one of them, and other builds run beside.
_THREADS_MAX = 8


class Builds:
    """All of them live in one event loop.

    Args:
        places: of the node's compilers, DeepGEMM's among them.
    """

    def __init__(self, places: Places) -> None:
        self._tasks: dict[str, asyncio.Task[str]] = {}  # each by where it will be, and by how it is made
        self._builders: dict[str, _Shared] = {}
        self._places = places
        self._lanes = Lanes()
        self._seconds: dict[str, float] = {}  # that each takes
        self._made: dict[str, str] = {}  # where what was built is
        self._over = False
        self._in_preparation: Counter[float] = Counter()  # by how long they take
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # for room
        self._arrivals = itertools.count()
        self._admitted = 0  # that have no place yet
        self._awaited: set[asyncio.Task[str]] = set()
        self._turns: dict[asyncio.Task[str] | None, asyncio.Future[None]] = {}  # of those that wait for room
        places.when_free(self._admit)

    def begin(self, recipe: Recipe) -> asyncio.Task[str]:
        """Build by a recipe, if nobody has asked for it yet. Returns what ends with the reason why it could not be."""
        names = recipe.key, recipe.digest
        task = next((self._tasks[name] for name in names if name in self._tasks), None)
        if task is None:
            task = asyncio.create_task(self._build(recipe))
        self._tasks |= dict.fromkeys(names, task)
        self._takes(recipe, recipe.seconds)
        return task

    def hurry(self, builds: Collection[asyncio.Task[str]]) -> None:
        """A rank waits for these: they go first."""
        self._awaited.update(builds)
        for turn in (self._turns.get(build) for build in builds):
            if turn is not None and not turn.done():
                self._admitted += 1
                turn.set_result(None)

    def timed(self, recipe: Recipe) -> Recipe:
        """With the seconds that it takes to build. A rank that found it, since it was built here, does not know."""
        *exactly, by_name = (self._seconds.get(name, 0.0) for name in _names(recipe))
        return msgspec.structs.replace(recipe, seconds=max(recipe.seconds, *exactly) or by_name)

    def placed(self, recipe: Recipe) -> Recipe:
        """With the place where it was built."""
        return msgspec.structs.replace(recipe, made=self._made.get(recipe.digest, recipe.made))

    def _takes(self, recipe: Recipe, seconds: float) -> None:
        self._seconds |= {name: max(seconds, self._seconds.get(name, 0.0)) for name in _names(recipe)}

    def stop(self) -> None:
        """End what runs."""
        self._over = True
        for each in list(self._builders.values()):
            each.builder.close()

    async def _build(self, recipe: Recipe) -> str:
        library = LIBRARIES.get(recipe.library)
        own = asyncio.current_task()
        if library is None or not library.ahead:
            return f"{recipe.name}: nothing builds for {recipe.library}"
        try:
            with self._shared(recipe) as builder:
                with self._preparing(recipe.seconds):
                    number, reason = await builder.prepare(recipe)
                if not reason:
                    await self._leave_room_for_longer(recipe.seconds)
                    # Not before: what imports takes nobody's place.
                    async with self._places.one_for(recipe.seconds, lambda: own in self._awaited):
                        self._admitted -= 1
                        reason = "the service ends" if self._over else await self._build_by(builder, number, recipe)
        except Exception as error:
            # Whatever it is, the rank compiles it.
            reason = first_line(error)
        finally:
            self._admit()  # those who would have waited for it
        return f"{recipe.name}: {reason}" if reason else ""

    @contextlib.contextmanager
    def _preparing(self, seconds: float) -> Iterator[None]:
        self._in_preparation[seconds] += 1
        try:
            yield
        finally:
            self._in_preparation[seconds] -= 1

    async def _leave_room_for_longer(self, seconds: float) -> None:
        """Wait a while, if else there would be no place for what takes longer and has something to import yet."""
        own = asyncio.current_task()
        if own in self._awaited:
            self._admitted += 1
            return
        turn = self._turns[own] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-seconds, next(self._arrivals), turn))
        self._admit()
        try:
            if not turn.done():  # else it is first at the place
                await asyncio.wait_for(turn, IMPORT_WAIT_S)
        except asyncio.TimeoutError:
            self._admitted += 1
        finally:
            del self._turns[own]

    def _admit(self) -> None:
        """Let go on who need not wait, the longest first. Half of the places are for whoever has imported."""
        while self._waiting:
            negative, _, turn = self._waiting[0]
            longer = sum(count for each, count in self._in_preparation.items() if each > -negative)
            longer = min(longer, max(1, self._places.count // 2))
            if longer and self._places.free - self._admitted <= longer:
                return
            heapq.heappop(self._waiting)
            if not turn.done():  # else it has waited for long enough
                self._admitted += 1
                turn.set_result(None)

    async def _build_by(self, builder: Builder, number: int, recipe: Recipe) -> str:
        at, lane = now(), self._lanes.take()
        try:
            reason, made = await builder.build(number)
        finally:
            self._lanes.give_back(lane)
        seconds = now() - at
        emit("compile", recipe.name, at, seconds, library=recipe.library, lane=f"builder {lane}", error=reason)
        if made:
            self._made[recipe.digest] = made
        if not reason and not recipe.seconds:
            self._takes(recipe, seconds)
        return reason

    @property
    def _threads(self) -> int:
        return min(_THREADS_MAX, self._places.count // 2)

    @contextlib.contextmanager
    def _shared(self, recipe: Recipe) -> Iterator[Builder]:
        """The builder for a recipe; begun with the first that wants it."""
        shared = self._builders.get(recipe.library)
        if shared is None:
            shared = self._builders[recipe.library] = _Shared(Builder(recipe.library, self._threads))
        shared.wanted += 1
        try:
            yield shared.builder
        finally:
            shared.wanted -= 1
            if shared.wanted == 0:
                # It holds half a gigabyte, of torch.
                del self._builders[recipe.library]
                shared.builder.close()


def _names(recipe: Recipe) -> tuple[str, ...]:
    """By which its seconds are known; the last where a list has another form, and a pattern for the place."""
    return recipe.key, recipe.digest, f"{recipe.library} {recipe.name}"


class _Shared:
    """A builder, and how many builds it has."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.wanted = 0
