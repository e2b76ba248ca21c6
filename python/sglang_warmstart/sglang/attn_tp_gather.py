"""F5: ``--disable-attn-tp-gather``, for models that do their own sequence-parallel gather in attention.

Without it, the scheduler and the graph runner pad the tokens of such models to ``attn_tp_size``, so autotuners choose
kernels for the wrong size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import IntendedError
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.sglang.dataclass_field import add_field
from sglang_warmstart.sglang.feature import Feature, Step

SERVER_ARGS = "sglang.srt.server_args"
COMMON = "sglang.srt.utils.common"
FIELD = "disable_attn_tp_gather"
FLAG = "--disable-attn-tp-gather"

HELP = (
    "Do not gather attention's input over the attention TP ranks, and do not pad token counts to their number. For "
    "models that do sequence-parallel gathering on their own; on a model that needs the gather, results are wrong."
)


class BadValueError(IntendedError, TypeError):
    """The argument is no bool; names it."""


def install_argument(hooks: Hooks, server_args: ModuleType) -> None:
    """Make it a field of ``ServerArgs``, checked at construction, and an option of the command line."""
    cls = class_of(server_args, "ServerArgs")

    def add_cli_args(original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
        original(parser)
        parser.add_argument(FLAG, action="store_true", default=False, help=HELP)

    def post_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        value = getattr(self, FIELD)
        if not isinstance(value, bool):
            raise BadValueError(f"{FIELD} ({FLAG}) must be True or False, got {type(value).__name__} {value!r}")
        original(self, *args, **kwargs)

    # Wrapped before the field is added: `dataclass` looks at the class for __post_init__ while it writes __init__.
    hooks.wrap(cls, "__post_init__", post_init, "self")
    # A field without the option would be looked for among the arguments that were parsed.
    hooks.wrap(cls, "add_cli_args", add_cli_args, "parser", if_it_fails=hooks.undo)
    hooks.made(f"{SERVER_ARGS}.ServerArgs.{FIELD}", undo=add_field(cls, FIELD, bool, default=False))


def install_requirement(hooks: Hooks, common: ModuleType) -> None:
    """Answer no first thing; ``require_gathered_buffer`` and ``require_mlp_sync`` ask this function."""

    def require_attn_tp_gather(original: Callable[..., bool], server_args: Any) -> bool:
        return not getattr(server_args, FIELD, False) and original(server_args)

    hooks.wrap(common, "require_attn_tp_gather", require_attn_tp_gather, "server_args")


ATTN_TP_GATHER = Feature(
    name="attn-tp-gather",
    gains=f"{FLAG}: no padding for models that do their own sequence parallelism",
    hooks={
        f"{COMMON}.require_attn_tp_gather": "the one question that gathered buffer, padding and all-gather depend on",
        f"{SERVER_ARGS}.ServerArgs.{FIELD}": "a real field, added to the dataclass in place",
        f"{SERVER_ARGS}.ServerArgs.__post_init__": "refuses a value that is no bool, naming the switch",
        f"{SERVER_ARGS}.ServerArgs.add_cli_args": "the flag",
    },
    upstream="#26047",
    drop_when="SGLang 0.5.13 and later have it",
    built_in_as=(
        f"{SERVER_ARGS}:{FIELD} called in {COMMON}",
        f"sglang.srt.arg_groups.fields.parallel:{FIELD} called in {COMMON}",
    ),
    steps=(
        Step((COMMON,), install_requirement),
        Step((SERVER_ARGS,), install_argument),
    ),
)
