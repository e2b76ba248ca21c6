"""The plan of a launch: what it has is built, and what the ranks compile goes into it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from sglang_warmstart.base import trust
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.gpus import capabilities
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan, Record
from sglang_warmstart.libraries.deep_gemm import DeepGemm
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node.builds import Builds
from sglang_warmstart.node.disk import Disk

logger = logging.getLogger("sglang.warmstart.service")


class Planned:
    """The plans of this service; one, mostly. It lives in one event loop.

    Args:
        builds: of the node.
        targets: warms those of DeepGEMM, by their recipes, which belong to the cache with this root.
        whole: returns when nobody restores the caches any more.
    """

    def __init__(
        self,
        builds: Builds,
        targets: Callable[[Sequence[Recipe], Path], Awaitable[None]],
        whole: Callable[[], Awaitable[None]],
    ) -> None:
        self._builds = builds
        self._targets = targets
        self._whole = whole
        self._record: Record | None = None
        self._disk: Disk | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._met: list[Recipe] = []  # before it was said where the plan is
        self._guessed: dict[tuple[str, str], list[Recipe]] = {}  # and built, by library and name
        self._found: set[tuple[str, str, str]] = set()

    def begin(self, plan: Path) -> None:
        """Build what a plan has, if anything; from now on what is compiled goes into it."""
        if self._record is not None and self._record.path == plan:
            return
        self._record, self._disk = Record(plan), Disk(plan.parent)
        for recipe in self._met:
            self._record.add(recipe)
        self._met.clear()

        def built(_: Recipe, reason: str) -> None:
            if reason:
                logger.warning("not built ahead: %s", reason)

        self._begin(plan, self._disk, built)

    def guess(self, plan: Path) -> None:
        """Build what a plan has, which stays as it is. What a rank finds of that goes into the launch's own."""

        def built(recipe: Recipe, reason: str) -> None:
            if reason:
                logger.debug("not built ahead: %s", reason)
                return
            recipe = self._builds.placed(recipe)
            if recipe.form and recipe.made:  # else each start would build it again
                self._guessed.setdefault((recipe.library, recipe.name), []).append(recipe)
                if self._found & {(recipe.library, recipe.name, made) for made in (recipe.made, "")}:
                    self.met(recipe)

        self._begin(plan, Disk(plan.parent), built)

    def _begin(self, plan: Path, disk: Disk, built: Callable[[Recipe, str], None]) -> None:
        task = asyncio.create_task(self._build(plan, disk, built))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def met(self, recipe: Recipe) -> None:
        """A rank has had this compiled, or has found it in a cache; without a form, see :func:`.recipe.found`."""
        if not recipe.form:
            if len(self._found) < build_plan.RECIPES_MAX:
                self._found.add((recipe.library, recipe.name, recipe.made))
            for each in self._guessed.get((recipe.library, recipe.name), ()):
                if recipe.made in (each.made, ""):
                    self.met(each)
            return
        recipe = self._builds.timed(recipe)
        if self._record is not None:
            self._record.add(recipe)
        elif len(self._met) < build_plan.RECIPES_MAX:
            self._met.append(recipe)

    async def keep(self) -> None:
        """Write the plan, if it has become another."""
        if self._record is None or self._disk is None:
            return
        try:
            await self._disk.publish(lambda record: record.keep(_capability(), os.environ), self._record)
        except Exception as error:
            # Whatever the cache is like, the service goes on.
            logger.warning("the plan of builds cannot be kept: %s", first_line(error))
            self._record = None

    async def rest(self) -> None:
        """Return when the plan is not being written."""
        if self._disk is not None:
            await self._disk.rest()

    async def _build(self, path: Path, disk: Disk, built: Callable[[Recipe, str], None]) -> None:
        """Build what a plan has.

        Args:
            built: as of :meth:`build`.
        """
        await self._whole()
        try:
            missing, there, refused = await disk.ask(_usable, path)
        except Exception as error:
            # A plan that is none, others that can write it, a disk that does not answer: the ranks compile.
            logger.warning("nothing is built ahead by a plan: %s", first_line(error))
            return
        for reason in refused:
            logger.info("not built ahead: %s", reason)
        for recipe in there:
            built(recipe, "")

        await self.build(missing, path.parent.parent.parent, built)

    async def build(self, recipes: Sequence[Recipe], root: Path, built: Callable[[Recipe, str], None]) -> None:
        """Build by recipes, all at once.

        Args:
            root: of DeepGEMM's cache.
            built: told of each that is not DeepGEMM's when it is done, and why it could not be built, if so.
        """

        async def one(recipe: Recipe) -> None:
            built(recipe, await self._builds.begin(recipe))

        targets = [recipe for recipe in recipes if recipe.library == DeepGemm.name]
        others = [recipe for recipe in recipes if recipe.library != DeepGemm.name]
        await asyncio.gather(self._targets(targets, root), *map(one, others))


def _usable(path: Path) -> tuple[list[Recipe], list[Recipe], list[str]]:
    """What a plan has and the caches have not, the longest first; what they have; why some does not hold here."""
    trust.check((path.parent.parent, path.parent), os.environ)
    plan = build_plan.load(path)
    if not plan.parts:
        return [], [], []
    recipes, refused = build_plan.usable(plan, _capability(), os.environ)
    return *_by_made(recipes, os.environ), refused


def missing_of(plan: BuildPlan, environment: Environment) -> tuple[list[Recipe], list[str]]:
    """What a plan has and the caches of an environment have not; and why some of it does not hold here."""
    recipes, refused = build_plan.usable(plan, _capability(), environment)
    return _by_made(recipes, environment)[0], refused


def _by_made(recipes: Sequence[Recipe], environment: Environment) -> tuple[list[Recipe], list[Recipe]]:
    """Those that the caches have not, the longest first, and those that they have."""
    missing: list[Recipe] = []
    there: list[Recipe] = []
    for recipe in recipes:
        (there if LIBRARIES[recipe.library].is_made(recipe, environment) else missing).append(recipe)
    return sorted(missing, key=lambda recipe: -recipe.seconds), there


def _capability() -> str:
    """Of this node's GPUs, as "9.0"; empty if they are of several kinds, or nobody says."""
    found = capabilities()
    return "{}.{}".format(*found.pop()) if len(found) == 1 else ""
