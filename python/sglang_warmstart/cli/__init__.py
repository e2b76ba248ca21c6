"""``sglang-warmstart``: the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_warmstart.cli.commands import app

__all__ = ["app", "main"]

_RUN = "run"
_HELP = ("--help",)


def main() -> None:
    """Entry point of the console script. An error that no command expects is one line too, and exit status 1."""
    words = sys.argv[1:]
    if words[:1] == [_RUN] and tuple(words[1:2]) != _HELP:
        # Before everything else: the server waits for it, and the other commands import ten times as much.
        from sglang_warmstart.cli.run import become

        raise SystemExit(become(words[1:]))
    from sglang_warmstart.cli.commands import main as run_command

    run_command()


def __getattr__(name: str) -> Any:
    if name == "app":
        from sglang_warmstart.cli import commands

        return commands.app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
