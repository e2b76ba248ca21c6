"""A recipe: what a library has compiled, written down so that it can be built again in a process without a GPU.

Whoever watches a library makes one when it compiles something, and :func:`tell` hands it to whoever keeps them. To
build it is the business of the library's module ``ahead`` (:class:`.library.Library`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one module or kernel is built.

    Args:
        library: its name in the table of libraries.
        name: of the kernel, for people.
        form: what the library's builder understands; values that JSON has. None of them: see :func:`found`.
        made: a pattern below the library's root; what matches is there once it is built. Empty if that cannot be told.
        seconds: how long it took.
    """

    library: str
    name: str
    form: dict[str, Any]
    made: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Equal for what is built in one place: of two recipes for that, the newer one counts."""
        return f"{self.library} {self.made}" if self.made else self.digest

    @property
    def digest(self) -> str:
        """Equal for what is built alike: a list may not know where that will be."""
        return hashlib.sha256(msgspec.json.encode((self.library, self.form), order="sorted")).hexdigest()


class BuildError(Exception):
    """It could not be built; says why in one line."""


def why(said: str) -> str:
    """The line of what ninja, or a library that has run it, says that tells why a build failed."""
    # ninja repeats the whole command behind the line that says what failed, and then comes what the compiler said.
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    failed = next((number + 2 for number, line in enumerate(lines) if line.startswith("FAILED: ")), 0)
    errors = [line for line in lines[failed:] if "error" in line.lower()]
    return (errors or lines[-1:] or ["ninja says nothing"])[0]


_listeners: list[Callable[[Recipe], object]] = []
_found: set[tuple[str, str, str]] = set()


def listen(listener: Callable[[Recipe], object]) -> Callable[[], None]:
    """Have ``listener`` hear of every recipe of this process. Returns what ends that."""
    _listeners.append(listener)

    def end() -> None:
        with contextlib.suppress(ValueError):
            _listeners.remove(listener)

    return end


def is_heard() -> bool:
    """Whether anybody listens: else there is no need to make a recipe."""
    return bool(_listeners)


def tell(recipe: Recipe) -> None:
    """Hand a recipe to whoever listens."""
    for listener in list(_listeners):
        listener(recipe)


def found(library: str, name: str, made: str = "") -> None:
    """Tell that a kernel of this name was found in the library's cache, by a recipe without a form."""
    if (library, name, made) not in _found and is_heard():
        _found.add((library, name, made))
        tell(Recipe(library, name, {}, made))
