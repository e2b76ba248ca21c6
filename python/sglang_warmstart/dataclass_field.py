"""Give a dataclass that exists one more field, in place: the class stays the same object for all who imported it."""

from __future__ import annotations

import dataclasses

from sglang_warmstart.errors import StandsAsideError

_GENERATED = ("__init__", "__repr__", "__eq__", "__match_args__")
_DEFAULT_PARAMETERS = {"init": True, "repr": True, "eq": True, "order": False, "unsafe_hash": False, "frozen": False}


def add_field(cls: type, name: str, annotation: type, default: object) -> None:
    """Make ``name`` the last field of the dataclass ``cls``: constructor keyword, repr, equality, ``fields()``.

    ``dataclasses.dataclass`` is applied to the same class again, with every field's own ``Field`` object put back where
    it found the default the first time. Instances made before get the default.

    Raises:
        StandsAsideError: ``cls`` is no plain dataclass (frozen, ordered, slots, an ``__init__`` of its own), or has
            the field.
    """
    target = f"{cls.__module__}.{cls.__qualname__}"
    parameters = getattr(cls, "__dataclass_params__", None)
    if not dataclasses.is_dataclass(cls) or "__dataclass_params__" not in cls.__dict__:
        raise StandsAsideError(target, "not a dataclass")
    for parameter, value in _DEFAULT_PARAMETERS.items():
        if getattr(parameters, parameter) != value:
            raise StandsAsideError(target, f"a dataclass with {parameter}={not value}, expected {value}")
    if "__slots__" in cls.__dict__:
        raise StandsAsideError(target, "a dataclass with slots, which cannot grow")
    if name in cls.__dataclass_fields__:
        raise StandsAsideError(f"{target}.{name}", "already there")

    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            setattr(cls, field.name, field)
    cls.__annotations__[name] = annotation
    setattr(cls, name, default)
    _generate(cls)


def remove_field(cls: type, name: str) -> None:
    """Take back what ``add_field`` did."""
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            setattr(cls, field.name, field)
    del cls.__annotations__[name]
    delattr(cls, name)
    _generate(cls)


def _generate(cls: type) -> None:
    for method in _GENERATED:
        if method in cls.__dict__:
            delattr(cls, method)
    dataclasses.dataclass(cls)
