"""The one interface of a JIT library: what the monitor, bundles and everything else know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.machine import Environment
from sglang_warmstart.libraries.recipe import Recipe


class Library(ABC):
    """A library that compiles kernels at run time and keeps them in a cache.

    There is one object per library, in a file of its own, and :data:`.table.LIBRARIES` lists them. A library of which
    all that is said here is true needs nothing else: monitor and bundles are loops over that table.

    Attributes:
        name: in events, metrics and ``bundle pack --include``.
        distributions: the names under which pip may have it.
        left_out: what a bundle leaves out: patterns of paths below the root that are temporary, locks, or of no use
            elsewhere. A star stands for slashes too; what is below such a path is left out as well.
        in_files: whether a bundle carries the cache as files. Where not, the object says how it does.
        module: to be imported before ``watch``; empty where no hook in a module shows what is compiled.
        hooks: what ``watch`` changes, by full dotted name, and why there.
        remedy: what would have covered a compile while serving.
        ahead: the module that builds by recipe: ``prepare(form)`` once in a process that forks for each build,
            ``build(form, root, environment)`` in that, which returns ``Recipe.made`` where a list cannot know it; empty
            where there is none.
        variables: patterns of variables that decide what is compiled, and into which cache.
    """

    name: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    left_out: ClassVar[tuple[str, ...]] = ()
    in_files: ClassVar[bool] = True
    module: ClassVar[str] = ""
    hooks: ClassVar[Mapping[str, str]] = {}
    remedy: ClassVar[str]
    ahead: ClassVar[str] = ""
    variables: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def root(self, environment: Environment) -> Path | None:
        """Where the cache of a process with this environment lies; None if it has none. Raises nothing.

        A variable that is set and empty means here what it means to the library.
        """

    @abstractmethod
    def key(self, environment: Environment) -> dict[str, str]:
        """All that has to be the same for the cache to be found again. Imports none of the libraries."""

    def watch(self, hooks: Hooks, module: ModuleType) -> None:
        """From now on, record what it compiles (an event ``jit``) and, where that shows, what its cache has (``load``).

        What is to be refused is refused before it is compiled (:mod:`.monitor`).

        Args:
            module: the imported ``self.module``.

        Raises:
            StandsAsideError: it looks different.
        """
        raise TypeError(f"{self.name} has no module to be watched by")

    @property
    def has_recipes(self) -> bool:
        """Whether what it compiles can be written down, and built again."""
        return bool(self.ahead)

    @property
    def is_installed(self) -> bool:
        """Whether this Python has it."""
        return machine.version(*self.distributions) != machine.NOT_INSTALLED

    def versions(self, environment: Environment) -> dict[str, str]:
        """What has to be the same for a recipe to be of use. A wrong one costs a build that nobody looks for."""
        nvcc = machine.cuda_home(environment) / "bin" / "nvcc"
        return {
            self.name: machine.version(*self.distributions),
            "sglang": machine.version("sglang"),
            "torch": machine.version("torch"),
            "nvcc": machine.program_version(str(nvcc), environment),
        }

    def recipe(self, name: str, form: Mapping[str, Any], made: str = "", seconds: float = 0.0) -> Recipe:
        """A recipe of this library's."""
        return Recipe(self.name, name, dict(form), made, seconds)

    def is_made(self, recipe: Recipe, environment: Environment) -> bool:
        """Whether the cache has what a recipe builds. Nobody looks whether it is up to date: its library does."""
        root = self.root(environment)
        return bool(recipe.made) and root is not None and next(root.glob(recipe.made), None) is not None

    def mismatch(self, key: Mapping[str, str], environment: Environment) -> str | None:
        """Why files of a cache would not be found again here, in one line; None if they would.

        Args:
            key: what was the same where the cache was filled.
            environment: of the server that is to use it.
        """
        if not self.in_files:
            return "a bundle does not carry its cache as files"
        if not self.is_installed:
            return "it is not installed here"
        if self.root(environment) is None:
            return "it has no cache of its own here"
        here = self.key(environment)
        differences = [
            f"{name} was {key.get(name, 'not known')!r} and is {here.get(name, 'not known')!r} here"
            for name in dict.fromkeys((*here, *key))
            if here.get(name) != key.get(name)
        ]
        return "; ".join(differences) or None


def covered_by_forward_or_bundle(library: str) -> str:
    """The remedy of a library whose kernels any forward of the kind compiles."""
    return (
        f"a forward of this kind before the server is ready would have, or {library}'s cache out of a bundle "
        f"(bundle pack --include {library})"
    )
