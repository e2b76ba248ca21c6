"""One feature's changes to SGLang: each is checked before it is made, and all are undone if one cannot be made.

SGLang's own ``HookRegistry`` imports the module of every target as soon as plugins have registered. That is too early:
importing ``model_runner`` before the arguments are parsed freezes environment switches that it reads at import, and
importing ``layers.mhc`` pulls in TileLang. So we place a hook once SGLang itself has imported the module. Otherwise we
work like the registry: the wrapper carries ``__wrapped__``, and copies made by ``from module import name`` are replaced
too. Hooks of other plugins on the same function stack with ours, in either order.

Every call from SGLang into our code is guarded (:mod:`.guard`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, cast

from sglang_warmstart.base.copies import mend_copies, mended_together
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.guard import Around, guarded, nothing, warn
from sglang_warmstart.base.source_edit import Edit, edited_function

Owner = ModuleType | type

_MISSING = object()


@dataclass
class _Life:
    """Whether the hooks made together still count."""

    alive: bool = True


class Hooks:
    """The changes of one feature, in the order in which they were made.

    Args:
        feature: its name.
        warn: what says a warning in the log.
    """

    def __init__(self, feature: str, warn: Callable[[str], None] = warn) -> None:
        self.feature = feature
        self._warn = warn
        self.changed: list[str] = []  # dotted names, as the feature's table of hooks has them
        self.notes: list[str] = []  # what its user is to know, once there is a log
        self.lacking: list[str] = []  # what does not work of it here
        self._undo: list[Callable[[], None]] = []
        self._life = _Life()

    def add(self, owner: Owner, name: str, value: object) -> None:
        """Give ``owner`` an attribute that it does not have.

        Raises:
            StandsAsideError: it has one of that name.
        """
        if getattr(owner, name, _MISSING) is not _MISSING:
            raise StandsAsideError(_dotted(owner, name), "already there")
        _mark(value, self.feature)
        setattr(owner, name, value)
        self.changed.append(_dotted(owner, name))

        def undo() -> None:
            if owner.__dict__.get(name) is value:
                delattr(owner, name)

        self._undo.append(undo)

    def wrap(
        self,
        owner: Owner,
        name: str,
        around: Around,
        *parameters: str,
        if_it_fails: Callable[[], object] = nothing,
    ) -> None:
        """Put ``around(original, *args, **kwargs)`` in the place of a function of ``owner``.

        Args:
            parameters: what the original may take, as "name, name": one of these, followed by optional ones at the
                most.
            if_it_fails: is called where ``around`` fails, before the original is: ``self.undo``, say, where the
                feature's other changes are of no use without this one.

        Raises:
            StandsAsideError: the function is missing, is ours already, or has other parameters.
        """
        raw, original = self._function(owner, name)
        check_parameters(original, parameters, _dotted(owner, name))
        life = self._life
        guard = guarded(f"{self.feature}: {_dotted(owner, name)}", around, original, self._warn, if_it_fails)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # Undone below somebody else's wrapper, it stays in the chain and does nothing.
            return guard(*args, **kwargs) if life.alive else original(*args, **kwargs)

        self._replace_function(owner, name, raw, cast(FunctionType, wrapper))

    def wrap_any(self, owner: Owner, name: str, around: Around) -> None:
        """As ``wrap``, whatever the function takes: ``around`` does nothing with it but hand it on.

        Raises:
            StandsAsideError: the function is missing or is ours already.
        """
        _, original = self._function(owner, name)
        self.wrap(owner, name, around, ", ".join(inspect.signature(original).parameters))

    def guarded(self, target: str, around: Around, original: Callable[..., Any]) -> Callable[..., Any]:
        """``around(original, ...)``, guarded: for what SGLang calls by another way than a wrapped function.

        Args:
            target: what the warning calls it.
        """
        return guarded(f"{self.feature}: {target}", around, original, self._warn)

    def edit(self, owner: Owner, name: str, edits: Sequence[Edit], *parameters: str) -> None:
        """Apply ``edits`` to the source of a function of ``owner`` (see :mod:`.source_edit`).

        Raises:
            StandsAsideError: as ``wrap``, or an edit does not match.
        """
        target = _dotted(owner, name)
        raw, original = self._function(owner, name)
        check_parameters(original, parameters, target)
        self._replace_function(owner, name, raw, edited_function(original, edits, target))

    def replace(self, owner: Owner, name: str, value: object) -> None:
        """Put ``value`` in the place of a function or class of ``owner``, and of its copies in other modules.

        A function that is put there is called as it is: what may fail in it goes through :meth:`guarded`.

        Raises:
            StandsAsideError: ``owner`` has no such attribute, or it is a plain value, which others may hold by chance.
        """
        old = _own_attribute(owner, name)
        if not callable(old):
            raise StandsAsideError(_dotted(owner, name), f"expected a function or class, found {type(old).__name__}")
        _mark(value, self.feature)
        self._set(owner, name, old, value)

    def lacks(self, line: str) -> None:
        """Note what does not work of the feature on this release: in the log, and by ``doctor``."""
        self.lacking.append(line)
        self.notes.append(line)

    def made(self, target: str, undo: Callable[[], None]) -> None:
        """Note a change that none of the methods above makes, and how to take it back."""
        self.changed.append(target)
        self._undo.append(undo)

    def also_undo(self, undo: Callable[[], None]) -> None:
        """Note what else is to be done when the changes are taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take everything back, last change first."""
        with mended_together():
            while self._undo:
                self._undo.pop()()
        self.changed.clear()
        self._life.alive = False
        self._life = _Life()

    def _function(self, owner: Owner, name: str) -> tuple[object, FunctionType]:
        raw = _own_attribute(owner, name)
        original = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        if not isinstance(original, FunctionType):
            raise StandsAsideError(_dotted(owner, name), f"expected a function, found {type(raw).__name__}")
        layer: object = original
        while layer is not None:
            if getattr(layer, "__warmstart__", None) == self.feature:
                raise StandsAsideError(_dotted(owner, name), "already patched by this feature")
            layer = getattr(layer, "__wrapped__", None)
        return raw, original

    def _replace_function(self, owner: Owner, name: str, raw: object, new: FunctionType) -> None:
        _mark(new, self.feature)
        bound = type(raw)(new) if isinstance(raw, (staticmethod, classmethod)) else new
        self._set(owner, name, raw, bound)

    def _set(self, owner: Owner, name: str, old: object, new: object) -> None:
        setattr(owner, name, new)
        self.changed.append(_dotted(owner, name))
        if isinstance(owner, ModuleType):
            mend_copies(old, new)

        def undo() -> None:
            # Whoever wrapped ours in the meantime keeps it: taking it away would drop their hook too.
            if owner.__dict__.get(name) is new:
                setattr(owner, name, old)
                if isinstance(owner, ModuleType):
                    mend_copies(new, old)
            else:
                # It does nothing from now on, and is not in the way of another installation.
                _unmark(new)

        self._undo.append(undo)


def class_of(module: ModuleType, name: str) -> type:
    """The class ``name`` of ``module``.

    Raises:
        StandsAsideError: there is none.
    """
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise StandsAsideError(_dotted(module, name), "not there" if found is None else "not a class")
    return found


def check_parameters(function: FunctionType, accepted: Sequence[str], target: str) -> None:
    """Refuse a function that takes none of ``accepted`` ("name, name"), followed by optional parameters at the most.

    Raises:
        StandsAsideError: it takes something else.
    """
    parameters = list(inspect.signature(function).parameters.values())
    names = [parameter.name for parameter in parameters]
    for wanted in accepted:
        count = len(wanted.split(", "))
        if ", ".join(names[:count]) == wanted and all(map(_is_optional, parameters[count:])):
            return
    expected = " or ".join(f"({wanted})" for wanted in accepted)
    raise StandsAsideError(target, f"expected parameters {expected}, found ({', '.join(names)})")


def _is_optional(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is not parameter.empty or parameter.kind in variadic


def _own_attribute(owner: Owner, name: str) -> object:
    value = owner.__dict__.get(name, _MISSING)
    if value is _MISSING:
        raise StandsAsideError(_dotted(owner, name), "not there")
    return value


def _dotted(owner: Owner, name: str) -> str:
    if isinstance(owner, ModuleType):
        return f"{owner.__name__}.{name}"
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def _unmark(value: object) -> None:
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(function, FunctionType) and hasattr(function, "__warmstart__"):
        del function.__warmstart__


def _mark(value: object, feature: str) -> None:
    if isinstance(value, FunctionType):
        value.__warmstart__ = feature  # type: ignore[attr-defined]
