"""Declare switches on SGLang's ``Envs``, so that they read like their neighbours there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.switches import Switch

ENVIRON = "sglang.srt.environ"


def declare_bool(hooks: Hooks, environ: ModuleType, switch: Switch) -> None:
    """Add a boolean switch: ``.get()``, ``.set()``, ``.override()``, and SGLang's own warning for an unknown value.

    Raises:
        StandsAsideError: ``Envs`` or ``EnvBool`` is not there.
    """
    _declare(hooks, environ, switch, class_of(environ, "EnvBool")(switch.default == "1"))


def declare_text(hooks: Hooks, environ: ModuleType, switch: Switch) -> None:
    """Add a switch whose value is a word.

    Raises:
        StandsAsideError: ``Envs`` or ``EnvStr`` is not there.
    """
    _declare(hooks, environ, switch, class_of(environ, "EnvStr")(switch.default))


def _declare(hooks: Hooks, environ: ModuleType, switch: Switch, field: Any) -> None:
    cls = class_of(environ, "Envs")
    # A patch of the series declares all switches, also those of features that the tree at hand does not have.
    if not hasattr(cls, switch.name):
        # `__set_name__` would do this, and asserts that it runs while `Envs` itself is defined.
        field.name = switch.name
        hooks.add(cls, switch.name, field)
