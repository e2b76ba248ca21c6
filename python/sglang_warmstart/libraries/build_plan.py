"""The plan of all that a launch compiles: recipes, kept for its next start."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglang_warmstart.base.errors import first_line, printable
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES

FORMAT = 1
# Below the root of DeepGEMM's cache.
PLANS = Path("warmstart", "ahead")
NAME = re.compile(r"(words|launch)-[0-9a-f]{16,64}\.json")
# A start compiles some dozens of modules and some hundreds of kernels.
RECIPES_MAX = 4096
BYTES_MAX = 64 << 20


class BuildPlanError(Exception):
    """A plan cannot be read; says why in one line."""


class Part(msgspec.Struct, frozen=True):
    """What belongs to one library.

    Args:
        versions: with which it was compiled, as far as that matters.
        capability: of the GPU, as "9.0".
        recipes: in the order in which the start came to them.
    """

    versions: dict[str, str]
    capability: str
    recipes: tuple[Recipe, ...]


class BuildPlan(msgspec.Struct, frozen=True):
    """What a launch compiles, by the name of the library."""

    parts: dict[str, Part] = {}
    format: int = FORMAT


def load(path: Path) -> BuildPlan:
    """Read a plan. One that is not there has nothing in it.

    Raises:
        BuildPlanError: it is no plan.
        OSError: it cannot be read.
    """
    try:
        return decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        return BuildPlan()


def encode(plan: BuildPlan) -> bytes:
    """A plan as it is kept."""
    return msgspec.json.encode(plan)


def decode(data: bytes, path: str) -> BuildPlan:
    """The plan that was kept.

    Args:
        path: where; for the error.

    Raises:
        BuildPlanError: it is no plan.
    """
    if len(data) > BYTES_MAX:
        raise BuildPlanError(f"{path} is larger than any plan")
    try:
        plan = msgspec.json.decode(data, type=BuildPlan)
    except (ValueError, RecursionError) as error:
        raise BuildPlanError(f"{path} is no plan of builds: {printable(first_line(error))}") from error
    if plan.format != FORMAT:
        raise BuildPlanError(f"{path} has format {plan.format}, and this is of format {FORMAT}")
    return plan


def usable(plan: BuildPlan, capability: str, environment: Environment) -> tuple[list[Recipe], list[str]]:
    """The recipes that hold here, and for each library whose recipes do not, one line that says why.

    Args:
        capability: of this node's GPUs; empty if that is not known.
    """
    recipes: list[Recipe] = []
    refused = []
    for name, part in plan.parts.items():
        library = LIBRARIES.get(name)
        if library is None or not library.has_recipes:
            refused.append(printable(f"{name} is no library that builds ahead"))
            continue
        if reason := _difference(part, library.versions(environment), capability):
            refused.append(printable(f"{name}: {reason}"))
        else:
            recipes += [recipe for recipe in part.recipes if recipe.library == name]
    return recipes, refused


def _difference(part: Part, versions: Mapping[str, str], capability: str) -> str:
    if capability and part.capability and capability != part.capability:
        return f"it was compiled for capability {part.capability}, this GPU has {capability}"
    for name, version in part.versions.items():
        if versions.get(name) != version:
            return f"{name} was {version} and is {versions.get(name, 'not known')} here"
    return ""


class Record:
    """What a start has compiled so far, together with what its plan had. Used from several threads.

    Args:
        path: of the plan.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._met: dict[str, Recipe] = {}
        self._is_new = False  # something that is not written
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def add(self, recipe: Recipe) -> None:
        """One that was compiled, or found in a cache. The newest counts, and the longest time."""
        with self._lock:
            known = self._met.get(recipe.key)
            self._is_new |= known is None or _newer(known, recipe) != known
            if known is not None:
                self._met[recipe.key] = _newer(known, recipe)
            elif len(self._met) < RECIPES_MAX:
                self._met[recipe.key] = recipe

    def keep(self, capability: str, environment: Environment) -> bool:
        """Write the plan, if it has become another. What it had for other versions goes.

        Returns:
            Whether it was written.

        Raises:
            OSError: it cannot be.
        """
        # One after another: that which is over last has the newest.
        with self._writing:
            return self._keep(capability, environment)

    def _keep(self, capability: str, environment: Environment) -> bool:
        with self._lock:
            if not self._is_new:
                return False
            met, self._is_new = dict(self._met), False
        try:
            plan = load(self.path)
        except BuildPlanError:
            plan = BuildPlan()  # it is replaced
        parts = dict(plan.parts)
        for name in {recipe.library for recipe in met.values()} & set(LIBRARIES):
            versions = LIBRARIES[name].versions(environment)
            part = parts.get(name)
            is_of_others = part is None or _difference(part, versions, capability)
            before = () if part is None or is_of_others else part.recipes
            kept = {recipe.key: recipe for recipe in before}
            for key, recipe in met.items():
                if recipe.library == name:
                    kept[key] = _newer(kept[key], recipe) if key in kept else recipe
            recipes = tuple(list(kept.values())[:RECIPES_MAX])
            parts[name] = Part(versions, capability, recipes)
        if parts == plan.parts:
            return False
        write_atomically(self.path, encode(BuildPlan(parts)))
        return True


def _newer(known: Recipe, recipe: Recipe) -> Recipe:
    """One that was found in a cache took no time."""
    return msgspec.structs.replace(recipe, seconds=max(known.seconds, recipe.seconds))
