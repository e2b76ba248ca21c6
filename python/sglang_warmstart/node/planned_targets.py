"""The targets of DeepGEMM in the plan of a launch: warmed for each rank before it asks.

Beside them the plan has each rank's kernels of no target (:mod:`sglang_warmstart.deepgemm.further`), by their sources.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.deepgemm.marker import Launch, name_of
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries.deep_gemm import DeepGemm
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.node.known_kernels import Known
from sglang_warmstart.node.protocol import Hello

logger = logging.getLogger("sglang.warmstart.service")

# What the rank of this start is given by its process, and that of an earlier one was given by another.
_PLACES = ("CUDA_HOME", "CUDA_PATH", "PATH")
_CACHE = "DG_JIT_CACHE_DIR"


class _Form(msgspec.Struct, frozen=True):
    """What a recipe holds.

    Args:
        rank: its first words.
        target: None for the kernels of none.
        searched: this and the others of the rank are all that its launch has.
        known: the target's kernels, or those.
    """

    rank: Hello
    target: Target | None
    searched: bool
    known: Known | None = None


class Warmer(Protocol):
    """What the service does for a rank that has not come yet."""

    async def warm_planned(
        self, hello: Hello, targets: Mapping[Target, Known | None], searched: bool, further: Sequence[Known]
    ) -> None:
        """Record and compile targets, and compile kernels.

        Args:
            targets: and what is known of their kernels.
            searched: these are all that the launch has.
            further: kernels of no target.
        """


def recipe_of(hello: Hello, target: Target, searched: bool, known: Known | None = None) -> Recipe:
    """What is to be done at the next start, for a target that a rank has asked for. It has the same at each start.

    Args:
        searched, known: see :class:`_Form`.
    """
    # By all fields: the name of a target leaves some of them out.
    return _recipe(hello, str(target), target, _Form(_rank_of(hello), target, searched, known))


def recipe_of_further(hello: Hello, known: Known) -> Recipe:
    """What is to be done at the next start, for the kernels of no target that a rank has: all of them."""
    name = f"{len(known.kernels)} further kernel{'s' * (len(known.kernels) > 1)}"
    return _recipe(hello, name, "further", _Form(_rank_of(hello), None, False, known))


def _rank_of(hello: Hello) -> Hello:
    settings = {name: each for name, each in hello.environment.items() if name not in (*_PLACES, _CACHE)}
    gpu = msgspec.structs.replace(hello.gpu, ordinal=0, visible=None)
    return msgspec.structs.replace(hello, deep_gemm="", environment=settings, gpu=gpu)


def _recipe(hello: Hello, name: str, what: object, form: _Form) -> Recipe:
    digest = hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()[:16]
    # As it is read again: with lists, and no tuples.
    read = msgspec.json.decode(msgspec.json.encode(form))
    return Recipe(DeepGemm.name, name, read, f"{hello.kind} {name_of(hello.launch)} {digest}")


def wanted_by(recipe: Recipe) -> Target | Known | None:
    """The target of such a recipe, or its kernels of no target; None if its form is none."""
    try:
        form = msgspec.convert(recipe.form, _Form)
    except ValueError:
        return None
    return form.target or form.known


class PlannedTargets:
    """Those of one service. It lives in one event loop.

    Args:
        warmer: does the work.
    """

    def __init__(self, warmer: Warmer) -> None:
        self._warmer = warmer
        self._works: dict[tuple[int, str], tuple[asyncio.Task[None], Sequence[Target]]] = {}

    async def begin(self, recipes: Iterable[Recipe], root: Path) -> None:
        """Warm what recipes say; returns when that is done.

        Args:
            root: of DeepGEMM's cache here.
        """
        ranks: dict[bytes, list[_Form]] = {}
        for recipe in recipes:
            try:
                form = msgspec.convert(recipe.form, _Form)
            except ValueError as error:
                logger.info("not warmed by a plan: %s: %s", recipe.name, first_line(error))
                continue
            ranks.setdefault(msgspec.json.encode(form.rank), []).append(form)
        found = importlib.util.find_spec("deep_gemm")
        if found is None or found.origin is None:
            return
        package = Path(found.origin).parent
        works = [
            self._warmer.warm_planned(
                _here(forms[0].rank, root, package),
                {form.target: form.known for form in forms if form.target is not None},
                # Those that were asked for before the search, or met after it, are among them.
                any(form.searched for form in forms),
                [form.known for form in forms if form.target is None and form.known is not None],
            )
            for forms in ranks.values()
        ]
        ended = await asyncio.gather(*works, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception) and not isinstance(failure, ConnectionError):
                # Whatever it is, the rank asks.
                logger.warning("targets are not warmed by a plan: %s", first_line(failure))

    async def enter(
        self, shop: object, launch: Launch, targets: Sequence[Target], work: Coroutine[None, None, None]
    ) -> None:
        """Do the work for targets of a launch, for which its rank may wait."""
        task = asyncio.create_task(work)
        self._works[id(shop), name_of(launch)] = task, targets
        await task

    def of(self, shop: object, launch: Launch) -> Sequence[Target]:
        """The targets of a launch for which there is work, or was."""
        _, targets = self._works.get((id(shop), name_of(launch)), (None, ()))
        return targets

    async def wait_for(self, shop: object, launch: Launch, limit_s: float) -> None:
        """Return when the work for a launch is done, if there is any, or the time is up."""
        work, _ = self._works.get((id(shop), name_of(launch)), (None, ()))
        if work is not None:
            await asyncio.wait({work}, timeout=limit_s)


def _here(hello: Hello, root: Path, package: Path) -> Hello:
    """What the rank would say on this machine.

    Args:
        root: of DeepGEMM's cache.
        package: DeepGEMM's directory.
    """
    # It may name several roots, of which the first is written.
    own_root = root / "nvrtc" if hello.kind == "nvrtc" else root
    cache = hello.cache if Path(hello.cache.split(":")[0]).is_relative_to(root) else str(own_root)
    own = {name: each for name, each in os.environ.items() if name in _PLACES or name.startswith(("DG_", "DJ_"))}
    environment = {**hello.environment, **own, _CACHE: cache}
    return msgspec.structs.replace(hello, cache=cache, deep_gemm=str(package), environment=environment)
