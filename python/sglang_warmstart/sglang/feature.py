"""What a feature is: its name, its hooks, the upstream change that it follows, and the steps that install it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang.seams.source import defines


class State(Enum):
    """Where a feature stands in this process."""

    ACTIVE = "active"
    WAITING = "waiting for its module"  # SGLang has not imported what it hooks
    BUILT_IN = "built in"  # by SGLang's own release, or by a patch of the series
    STANDS_ASIDE = "stands aside"


@dataclass(frozen=True)
class Step:
    """A part of a feature, installed as soon as SGLang has imported all of ``modules``.

    ``install(hooks, *modules)`` makes its changes through ``hooks`` and raises StandsAsideError where SGLang does not
    look as expected.
    """

    modules: tuple[str, ...]
    install: Callable[..., None]
    # False for what only some models bring in: the feature counts as active without it.
    required: bool = True


@dataclass(frozen=True)
class Feature:
    """One thing that SGLang gains. The table of these is the plugin; the docs page of each is built from it."""

    name: str
    gains: str
    hooks: Mapping[str, str]  # everything in SGLang that it adds or changes, by full dotted name, and why there
    upstream: str
    drop_when: str
    # "module:name called in module" in SGLang's own source: it has the feature itself where one of them is defined or
    # imported, and somebody calls or reads it there. Without "called in" (a patch of ours), a definition is enough.
    built_in_as: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass
class Installation:
    """A feature in this process: its state, why, and the changes that it has made."""

    feature: Feature
    hooks: Hooks
    state: State = State.WAITING
    detail: str = ""
    steps: tuple[Step, ...] = ()  # those of the feature that this release has a place for
    missing: set[Step] = field(default_factory=set)


def find_built_in(feature: Feature, sglang_root: Path) -> str | None:
    """The first of ``feature.built_in_as`` that SGLang's source has and uses, found by reading: nothing is imported.

    Args:
        sglang_root: the directory of the package ``sglang``.
    """
    for place in feature.built_in_as:
        name, _, caller = place.partition(" called in ")
        if defines(sglang_root, name) and (not caller or _uses(sglang_root, caller, name.partition(":")[2])):
            return name.replace(":", ".")
    return None


def _uses(sglang_root: Path, module: str, name: str) -> bool:
    """Whether a module calls a name, or reads it as an attribute. Imports and definitions do not count."""
    path = sglang_root.joinpath(*module.split(".")[1:]).with_suffix(".py")
    used = re.compile(rf"(?!#|from |import ).*?(\.{name}\b|(?<!def )(?<!class )\b{name}\()")
    # Line by line: one search through a module of 5000 lines would take its time in every process.
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return any(used.match(line.lstrip()) for line in lines if name in line)
