"""Run `sglang-warmstart patches` in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.cli import app
from typer.testing import CliRunner


@dataclass(frozen=True)
class Visit:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


def run(root: Path, *arguments: str | Path) -> Visit:
    """Run it.

    Args:
        root: of the series.
        arguments: after `patches`.
    """
    result = CliRunner().invoke(app, ["patches", "--series", str(root), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Visit(result.exit_code, result.stdout, result.stderr)
