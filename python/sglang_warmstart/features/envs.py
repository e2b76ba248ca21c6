"""Declare switches on SGLang's ``Envs``, so that they read like their neighbours there."""

from __future__ import annotations

from types import ModuleType

from sglang_warmstart.patch import Patch, class_of
from sglang_warmstart.switches import Switch

ENVIRON = "sglang.srt.environ"


def declare_bool(patch: Patch, environ: ModuleType, switch: Switch) -> None:
    """Add a boolean switch: ``.get()``, ``.set()``, ``.override()``, and SGLang's own warning for an unknown value.

    Raises:
        StandsAsideError: ``Envs`` or ``EnvBool`` is not there, or ``Envs`` has the switch.
    """
    field = class_of(environ, "EnvBool")(switch.default == "1")
    # `__set_name__` would do this, and asserts that it runs while `Envs` itself is defined.
    field.name = switch.name
    patch.add(class_of(environ, "Envs"), switch.name, field)


def declare_text(patch: Patch, environ: ModuleType, switch: Switch) -> None:
    """Add a switch whose value is a word.

    Raises:
        StandsAsideError: ``Envs`` or ``EnvStr`` is not there, or ``Envs`` has the switch.
    """
    field = class_of(environ, "EnvStr")(switch.default)
    field.name = switch.name  # as above
    patch.add(class_of(environ, "Envs"), switch.name, field)
