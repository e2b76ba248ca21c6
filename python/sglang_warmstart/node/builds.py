"""What other libraries than DeepGEMM compile, built ahead of need: each once on a node, longest first, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import Lanes, emit, now
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node.builders import Builder
from sglang_warmstart.node.disk import Disk, NoAnswerError
from sglang_warmstart.node.pool import Places


class Builds:
    """All of them live in one event loop.

    Args:
        places: of the node's compilers, DeepGEMM's among them.
    """

    def __init__(self, places: Places) -> None:
        self._tasks: dict[str, asyncio.Task[str]] = {}
        # Where a library's cache is, it reads when it is imported.
        self._builders: dict[tuple[str, frozenset[tuple[str, str]]], _Shared] = {}
        self._places = places
        self._lanes = Lanes()
        self._disks: dict[str, Disk] = {}
        self._over = False

    def begin(self, recipe: Recipe) -> asyncio.Task[str]:
        """Build by a recipe, if nobody has asked for it yet. Returns what ends with the reason why it could not be."""
        digest = recipe.digest
        if digest not in self._tasks:
            self._tasks[digest] = asyncio.create_task(self._build(recipe))
        return self._tasks[digest]

    def stop(self) -> None:
        """End what runs."""
        self._over = True
        for each in self._builders.values():
            each.builder.close()

    async def _build(self, recipe: Recipe) -> str:
        library = LIBRARIES.get(recipe.library)
        if library is None or not library.ahead:
            return f"{recipe.name}: nothing builds for {recipe.library}"
        try:
            if await self._is_made(library, recipe):
                return ""
        except NoAnswerError as error:
            return f"{recipe.name}: {error}"
        try:
            with self._shared(recipe) as builder:
                async with self._places.one_for(recipe.seconds):
                    return "" if self._over else await self._build_by(builder, recipe)
        except OSError as error:
            # Whatever it is, the rank compiles it.
            return f"{recipe.name}: {first_line(error)}"

    async def _build_by(self, builder: Builder, recipe: Recipe) -> str:
        at, lane = now(), self._lanes.take()
        try:
            reason = await builder.build(recipe)
        finally:
            self._lanes.give_back(lane)
        reason = f"{recipe.name}: {reason}" if reason else ""
        emit("compile", recipe.name, at, now() - at, library=recipe.library, lane=f"builder {lane}", error=reason)
        return reason

    async def _is_made(self, library: Library, recipe: Recipe) -> bool:
        environment = {**os.environ, **recipe.environment}
        root = library.root(environment)
        if root is None or not recipe.made:
            return False
        disk = self._disks.setdefault(str(root), Disk(root))
        return await disk.ask(library.is_made, recipe, environment)

    @contextlib.contextmanager
    def _shared(self, recipe: Recipe) -> Iterator[Builder]:
        """The builder for a recipe; begun with the first that wants it, so that it imports while they wait."""
        key = (recipe.library, frozenset(recipe.environment.items()))
        shared = self._builders.get(key)
        if shared is None:
            shared = self._builders[key] = _Shared(Builder(recipe.library, recipe.environment))
        shared.wanted += 1
        try:
            yield shared.builder
        finally:
            shared.wanted -= 1
            if shared.wanted == 0:
                # It holds half a gigabyte, of torch.
                del self._builders[key]
                shared.builder.close()


class _Shared:
    """A builder, and how many builds it has."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.wanted = 0
