"""Declare switches on SGLang's ``Envs``, so that they can be read like SGLang's own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.switches import Switch

ENVIRON = "sglang.srt.environ"


def declare(hooks: Hooks, environ: ModuleType, switch: Switch[Any]) -> None:
    """Add a switch to ``Envs``: a boolean or a word, with ``.get()``, ``.set()``, ``.override()`` and so on.

    Raises:
        StandsAsideError: ``Envs``, ``EnvBool`` or ``EnvStr`` is not there.
    """
    cls = class_of(environ, "Envs")
    if isinstance(switch.default, bool):
        field: Any = class_of(environ, "EnvBool")(switch.default)
    else:
        field = class_of(environ, "EnvStr")(switch.default or "")
    # A patch of the series declares all switches, also those of features that the tree at hand does not have.
    if not hasattr(cls, switch.name):
        # `__set_name__` would do this, and asserts that it runs while `Envs` itself is defined.
        field.name = switch.name
        hooks.add(cls, switch.name, field)
