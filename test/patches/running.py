"""Run `sglang-warmstart patches` in this process, in a child that does not live to its end, or as its users do."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from errno import EPERM
from pathlib import Path
from typing import Any

from sglang_warmstart.cli import app
from typer.testing import CliRunner

COMMAND = str(Path(sysconfig.get_path("scripts"), "sglang-warmstart"))
# What changes something on the disk. Of an `open`, only one that may write.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.chown", "os.truncate"}


@dataclass(frozen=True)
class Visit:
    """How a command ended, and what it said. ``changes`` is how often it changed something on the disk, if counted."""

    status: int
    out: str
    err: str
    changes: int = 0


def run(root: Path, *arguments: str | Path) -> Visit:
    """Run it in this process.

    Args:
        root: of the series.
        arguments: after `patches`.
    """
    result = CliRunner().invoke(app, ["patches", "--series", str(root), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Visit(result.exit_code, result.stdout, result.stderr)


def start(root: Path, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start it as its users do."""
    return subprocess.Popen(
        [COMMAND, "patches", "--series", str(root), *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Visit:
    """Wait for its end."""
    out, err = process.communicate(timeout=60)
    return Visit(process.returncode, out, err)


def before_change(number: int, act: Callable[[], None], refused: str = "") -> list[str]:
    """Do something just before the n-th change of the disk that this process makes. It cannot be taken back.

    Args:
        number: n.
        act: what to do.
        refused: a kind of change that is not permitted.

    Returns:
        The changes, as they come.
    """
    changes: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or writes:
            changes.append(event)
            if len(changes) == number:
                act()
            if event == refused:
                raise PermissionError(EPERM, os.strerror(EPERM))

    sys.addaudithook(hook)
    return changes


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until(number: int, act: Callable[[], None], root: Path, *arguments: str | Path, refused: str = "") -> Visit:
    """Run it in a child in which something happens before its n-th change of the disk.

    Returns:
        A status below 0 is the signal that has ended the child.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            os.close(reading)
            out, err = io.StringIO(), io.StringIO()
            changes = before_change(number, act, refused)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    app(["patches", "--series", str(root), *map(str, arguments)])
                except SystemExit as error:
                    status = error.code if isinstance(error.code, int) else 98
            os.write(writing, "\0".join((out.getvalue(), err.getvalue(), str(len(changes)))).encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().split("\0")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Visit(status, said[0], said[1], int(said[2])) if len(said) == 3 else Visit(status, "", "")
