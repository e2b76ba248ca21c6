"""``sglang-warmstart run``: start the node's service, then become the command that starts the server.

The service is then ready before the server has imported anything. The command keeps the number of this process, and so
the service, which ends with its parent, ends with the server.

This module imports next to nothing: its command waits for that.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sglang_warmstart.base.errors import one_line
from sglang_warmstart.base.switches import BUILD_AHEAD, EARLY, SERVICE, WARMSTART

if TYPE_CHECKING:
    from sglang_warmstart.sglang.ahead import Known

# Of a shell, for a command that it cannot find.
EXIT_NOT_FOUND = 127
# As `ending` has it, which imports the whole command line.
EXIT_REFUSED = 2

# Python ignores them, and a program that it becomes would inherit that.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def become(words: Sequence[str]) -> int:
    """Start the service, and become a command. Returns only where that cannot be: the exit status.

    Args:
        words: the command, and "--" before it or not.
    """
    command = list(words[1:] if words[:1] == ["--"] else words)
    if not command:
        return _refused(EXIT_REFUSED, "name the command: sglang-warmstart run -- python -m sglang.launch_server ...")
    program = shutil.which(command[0])
    if program is None:
        return _refused(EXIT_NOT_FOUND, f"{command[0]}: command not found")
    environment, service = dict(os.environ), None
    if WARMSTART.value(environment):
        # Those of somebody else, whose server this is not.
        for name in (SERVICE, EARLY):
            environment.pop(name, None)
        try:
            from sglang_warmstart.node.launch import start_early

            known, caches = _known(command, environment)
            service = start_early(environment, caches, **known)
        except Exception as error:
            # Whatever it is, the server starts without.
            _say(f"no service before the server: {one_line(error)}")
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, command, environment)
    except OSError as error:
        if service is not None:
            service.stop()
        return _refused(EXIT_NOT_FOUND, f"{command[0]} cannot be run: {error.strerror}")


def _known(command: Sequence[str], environment: Mapping[str, str]) -> tuple[Known, dict[str, str]]:
    """What an earlier start of the command compiled, or one like it, if that is known, and where its caches are."""
    if not BUILD_AHEAD.value(environment):
        return {}, {}
    from sglang_warmstart.sglang.ahead import known_of
    from sglang_warmstart.sglang.caches import server_environment

    known = known_of(command, environment)
    return known, server_environment(environment) if known else {}


def _refused(status: int, line: str) -> int:
    _say(line)
    return status


def _say(line: str) -> None:
    print(f"sglang-warmstart run: {line}", file=sys.stderr, flush=True)
