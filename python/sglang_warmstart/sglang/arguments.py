"""The defaults of SGLang's server arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec


def defaults(kind: type) -> dict[str, Any]:
    """The default of each argument that has one, by name.

    Args:
        kind: SGLang's class of arguments: a dataclass, or a Struct of msgspec in later releases.
    """
    fields: Any = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else msgspec.structs.fields(kind)
    none = (dataclasses.MISSING, msgspec.NODEFAULT)
    made = {each.name: each.default for each in fields if each.default not in none}
    return made | {each.name: each.default_factory() for each in fields if each.default_factory not in none}
