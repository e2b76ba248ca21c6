"""Start processes beside a server: each has a directory of its own and ends with the process that started it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sglang_warmstart.base.private_directory import make_directory, remove_abandoned, remove_directory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# For a process to end by itself, and for the kernel to end it.
STOP_S = 10.0
KILL_S = 2.0

_PARENT_CHECK_S = 0.5
_ENDED_CHECK_S = 0.02


class Child(Protocol):
    """A child of this process, as ``subprocess.Popen`` has it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, for so many seconds at the most. Returns its exit status."""


class Inherited:
    """A child that was started before this process became the program that it is.

    Args:
        pid: its number.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def is_alive(self) -> bool:
        """Whether there is a child of this number, and it has not ended."""
        if self._status is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except (ChildProcessError, OverflowError):
                self._status = -1  # another process's, or somebody else has asked for its end
            else:
                self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status is None

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            TimeoutExpired: it has not, after so many seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.is_alive():
            if end is not None and timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_ENDED_CHECK_S)
        assert self._status is not None
        return self._status

    def _send(self, number: signal.Signals) -> None:
        # As long as nobody has asked for its end, its number is nobody else's.
        if self.is_alive():
            os.kill(self.pid, number)


@dataclass
class OwnProcess:
    """A process that was started.

    Args:
        directory: its own; it is removed when the process has ended, at the latest by the next start.
    """

    directory: Path
    process: Child

    def stop(self) -> None:
        """End it now."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a call that no signal ends, on a dead file system
                self.process.wait(KILL_S)
        remove_directory(self.directory)


def start(module: str, arguments: Callable[[Path], list[str]], environment: Mapping[str, str]) -> OwnProcess:
    """Run ``main()`` of a module in a process with a private directory.

    Args:
        arguments: of its command line, given the directory. ``--parent`` and our process number come after them.
        environment: on top of our own.

    Raises:
        OSError: no directory or no process can be made.
    """
    remove_abandoned()
    directory, alive = make_directory()
    # Not -m: each child of its own would begin with an import of its main module. And by the path of this process: it
    # is to find the DeepGEMM that the ranks import, not one in the working directory.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
    command = [sys.executable, "-c", code, *arguments(directory), "--parent", str(os.getpid())]
    try:
        with alive:
            process = subprocess.Popen(
                command,
                # What is left by children that are killed goes with the directory.
                env={**os.environ, "TMPDIR": str(directory), **environment},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the server
                pass_fds=(alive.fileno(),),
            )
    except BaseException:
        remove_directory(directory)
        raise
    return OwnProcess(directory, process)


def cpu_s_of(pid: int) -> float:
    """Seconds of processor time of a process and of what it has started, unless that has ended and nobody waited."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # its name may have blanks
        except OSError:
            continue  # it has just ended
        number = int(path.parent.name)
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    own = {pid}
    while more := {number for number, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(number, 0) for number in own) / os.sysconf("SC_CLK_TCK")


def end_with(parent: int, at_end: Callable[[], object] = lambda: None, limit_s: float = float("inf")) -> None:
    """Have this process end when its parent does, or when the time is up.

    Args:
        at_end: what is done first. It may ask ``os.getppid()`` which of the two it is.
    """

    def watch() -> None:
        end = time.monotonic() + limit_s
        while os.getppid() == parent and time.monotonic() < end:
            time.sleep(_PARENT_CHECK_S)
        try:
            at_end()
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_pipe(life: Connection) -> None:
    """Have the kernel kill this process when the other side of a pipe is closed.

    A thread that waits for it would not do: whoever hangs in the driver may hold the interpreter's lock.
    """
    descriptor = life.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    if life.poll():
        os._exit(1)  # it was closed before
