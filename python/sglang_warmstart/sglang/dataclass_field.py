"""Add a field to an existing dataclass in place: the class stays the same object for all who imported it.

``dataclasses.make_dataclass`` and subclassing make another class: whoever imported the old one keeps it, and instances
of the two do not compare or unpickle as one. The standard library changes no class in place, so this does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import FunctionType

from sglang_warmstart.base.errors import StandsAsideError

_METHODS = ("__init__", "__repr__", "__eq__")
_PARAMETERS = {"init": True, "repr": True, "eq": True, "order": False, "unsafe_hash": False, "frozen": False}
_MISSING = object()


def add_field(cls: type, name: str, annotation: type, default: object) -> Callable[[], None]:
    """Make ``name`` the last field of the dataclass ``cls``: constructor keyword, repr, equality, ``fields()``.

    ``dataclasses.dataclass`` is applied to the same class again, with every field's own ``Field`` object put back where
    it found the default the first time. Methods that the class wrote itself stay. Instances made before have the
    default.

    Returns:
        What takes it back: the class is as it was, down to the identity of its methods.

    Raises:
        StandsAsideError: ``cls`` is no plain dataclass (frozen, ordered, slots, an ``__init__`` of its own), or has
            the field.
    """
    _check(cls, name)
    before = dict(cls.__dict__)
    annotations: dict[str, object] = dict(before.get("__annotations__", {}))
    try:
        for field in dataclasses.fields(cls):
            if field.name in annotations:  # an inherited one is found in its own class
                setattr(cls, field.name, field)
        cls.__annotations__ = {**annotations, name: annotation}
        setattr(cls, name, default)
        for method in _METHODS:
            if _is_generated(before.get(method)):
                delattr(cls, method)
        if "__match_args__" in before:
            del cls.__match_args__  # type: ignore[attr-defined]
        dataclasses.dataclass(cls)
    except Exception as error:
        _restore(cls, before, dict(cls.__dict__))
        raise StandsAsideError(_name(cls), f"cannot be made a dataclass again: {error}") from error
    after = dict(cls.__dict__)
    return lambda: _restore(cls, before, after)


def _check(cls: type, name: str) -> None:
    target = _name(cls)
    if "__dataclass_params__" not in cls.__dict__:
        raise StandsAsideError(target, "not a dataclass")
    parameters = cls.__dict__["__dataclass_params__"]
    for parameter, value in _PARAMETERS.items():
        if getattr(parameters, parameter) != value:
            raise StandsAsideError(target, f"a dataclass with {parameter}={not value}, expected {value}")
    if "__slots__" in cls.__dict__:
        raise StandsAsideError(target, "a dataclass with slots, which cannot grow")
    if not _is_generated(cls.__dict__.get("__init__")):
        raise StandsAsideError(target, "a dataclass with an __init__ of its own")
    if name in cls.__dict__["__dataclass_fields__"]:
        raise StandsAsideError(f"{target}.{name}", "already there")


def _is_generated(method: object) -> bool:
    """Whether ``dataclasses`` wrote it: it compiles its methods from strings, and wraps ``__repr__``."""
    function = getattr(method, "__wrapped__", method)
    return isinstance(function, FunctionType) and function.__code__.co_filename == "<string>"


def _restore(cls: type, before: dict[str, object], after: dict[str, object]) -> None:
    """Put back what differs between the two, but for what somebody has changed since."""
    for name in before.keys() | after.keys():
        old, new = before.get(name, _MISSING), after.get(name, _MISSING)
        if old is new or cls.__dict__.get(name, _MISSING) is not new:
            continue
        if old is _MISSING:
            delattr(cls, name)
        else:
            setattr(cls, name, old)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
