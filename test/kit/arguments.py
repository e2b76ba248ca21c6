"""SGLang's record of a server's arguments, with other values."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def with_values(server_args: ServerArgs, **values: object) -> ServerArgs:
    """A copy with these values. From 0.5.16 on a record that SGLang has resolved refuses a plain assignment."""
    changed = copy.copy(server_args)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed
