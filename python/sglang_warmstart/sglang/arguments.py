"""The server's arguments, with the values that SGLang has decided on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec


def decided(server_args: Any) -> Mapping[str, Any]:
    """The arguments by name. From 0.5.19 on the object itself has only what the user gave."""
    given = not hasattr(server_args, "resolved_dict")
    found: Mapping[str, Any] = vars(server_args) if given else server_args.resolved_dict()
    return found


def defaults(kind: type) -> dict[str, Any]:
    """The default of each argument that has one, by name.

    Args:
        kind: SGLang's class of arguments: a dataclass, or a Struct of msgspec in later releases.
    """
    fields: Any = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else msgspec.structs.fields(kind)
    none = (dataclasses.MISSING, msgspec.NODEFAULT)
    made = {each.name: each.default for each in fields if each.default not in none}
    return made | {each.name: each.default_factory() for each in fields if each.default_factory not in none}
