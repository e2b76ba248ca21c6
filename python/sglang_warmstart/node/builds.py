"""What other libraries than DeepGEMM compile, built ahead of need: each once on a node, longest first, all at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

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
        self._prepared = asyncio.Condition()
        self._admitted = 0  # that have no place yet

    def begin(self, recipe: Recipe) -> asyncio.Task[str]:
        """Build by a recipe, if nobody has asked for it yet. Returns what ends with the reason why it could not be."""
        names = recipe.key, recipe.digest
        task = next((self._tasks[name] for name in names if name in self._tasks), None)
        if task is None:
            task = asyncio.create_task(self._build(recipe))
            self._seconds |= dict.fromkeys(names, recipe.seconds)
        self._tasks |= dict.fromkeys(names, task)
        return task

    def completed(self, recipe: Recipe) -> Recipe:
        """With what is known since it was built here: where it is, and the seconds that it takes."""
        seconds = max(recipe.seconds, *(self._seconds.get(name, 0.0) for name in (recipe.key, recipe.digest)))
        return msgspec.structs.replace(recipe, made=self._made.get(recipe.digest, recipe.made), seconds=seconds)

    def stop(self) -> None:
        """End what runs."""
        self._over = True
        for each in list(self._builders.values()):
            each.builder.close()

    async def _build(self, recipe: Recipe) -> str:
        library = LIBRARIES.get(recipe.library)
        if library is None or not library.ahead:
            return f"{recipe.name}: nothing builds for {recipe.library}"
        try:
            with self._shared(recipe) as builder:
                async with self._preparing(recipe.seconds):
                    number, reason = await builder.prepare(recipe)
                if not reason:
                    await self._leave_room_for_longer(recipe.seconds)
                    # Not before: what imports takes nobody's place.
                    async with self._places.one_for(recipe.seconds):
                        self._admitted -= 1
                        reason = "" if self._over else await self._build_by(builder, number, recipe)
        except Exception as error:
            # Whatever it is, the rank compiles it.
            reason = first_line(error)
        return f"{recipe.name}: {reason}" if reason else ""

    @contextlib.asynccontextmanager
    async def _preparing(self, seconds: float) -> AsyncIterator[None]:
        self._in_preparation[seconds] += 1
        try:
            yield
        finally:
            self._in_preparation[seconds] -= 1
            async with self._prepared:
                self._prepared.notify_all()

    async def _leave_room_for_longer(self, seconds: float) -> None:
        """Wait a while, if else there would be no place for what takes longer and has something to import yet."""

        def is_admitted() -> bool:
            longer = sum(count for each, count in self._in_preparation.items() if each > seconds)
            if longer and self._places.free - self._admitted <= longer:
                return False
            self._admitted += 1
            return True

        async with self._prepared:
            try:
                await asyncio.wait_for(self._prepared.wait_for(is_admitted), IMPORT_WAIT_S)
            except asyncio.TimeoutError:
                self._admitted += 1

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
            self._seconds |= dict.fromkeys((recipe.key, recipe.digest), seconds)
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


class _Shared:
    """A builder, and how many builds it has."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.wanted = 0
