"""SGLang's record of a server's arguments, with other values."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def with_values(server_args: ServerArgs, **values: object) -> ServerArgs:
    """A copy with these values. From 0.5.16 on a record that SGLang has resolved refuses a plain assignment."""
    if hasattr(server_args, "replace_resolved"):
        # In 0.5.19, what was decided is beside the record.
        replaced: ServerArgs = server_args.replace_resolved("a test", **values)
        return replaced
    changed = copy.copy(server_args)
    force = msgspec.structs.force_setattr if isinstance(changed, msgspec.Struct) else object.__setattr__
    for name, value in values.items():
        force(changed, name, value)
    return changed
