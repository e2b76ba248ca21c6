"""Start the service beside a server."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from sglang_warmstart.base import processes
from sglang_warmstart.base.processes import Inherited, OwnProcess
from sglang_warmstart.base.switches import EARLY, SERVICE


class ServiceProcess(OwnProcess):
    """A service that has been started; it ends by itself when this process does."""

    @property
    def socket(self) -> Path:
        """Where ranks find it, as soon as it listens."""
        return socket_in(self.directory)


def socket_in(directory: Path) -> Path:
    """The socket of the service that has this directory."""
    return directory / "service.sock"


def start_service(
    library: str | None = None,
    restoring: Path | None = None,
    plans: Path | None = None,
    build_plan: Path | None = None,
    guesses: Path | None = None,
    finder: Sequence[str] = (),
    early: bool = False,
    environment: Mapping[str, str] | None = None,
) -> ServiceProcess:
    """Start the service in a private directory. Returns at once: ranks wait for its socket.

    Args:
        library: the module that calls DeepGEMM in recording children; the service knows one if it is not named.
        restoring: a file that is locked as long as somebody restores kernels into the cache.
        plans: where the plans of ranks go; then nothing is compiled.
        build_plan: what other libraries compile: it is built at once.
        guesses: what they may compile.
        finder: a module that finds out which targets of DeepGEMM the ranks will have, and its words; it is run with the
            socket before them, and says :class:`.protocol.Expect`.
        early: it is to end after a while if no server comes.
        environment: on top of our own.

    Raises:
        OSError: no directory or no process can be made.
    """
    given = {
        "--library": library,
        "--restoring": restoring,
        "--plans": plans,
        "--build-plan": build_plan,
        "--guesses": guesses,
        "--finder": json.dumps(list(finder)) if finder else None,
    }
    options = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    options += ["--early"] * early
    started = processes.start(
        f"{__package__}.service",
        lambda directory: ["--socket", str(socket_in(directory)), *options],
        {
            # By NVML: torch would else start CUDA to tell whether there is a GPU, and no child could use one then.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # The forkserver of Python before 3.13 knows no other path.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **(environment or {}),
        },
    )
    return _stopped_at_exit(ServiceProcess(started.directory, started.process))


def start_early(
    environment: MutableMapping[str, str],
    caches: Mapping[str, str] | None = None,
    build_plan: Path | None = None,
    guesses: Path | None = None,
    finder: Sequence[str] = (),
) -> ServiceProcess:
    """Start the service for the program that this process is about to become, which asks :func:`early_service` for it.

    Args:
        environment: of that program. It is told where the service is, and whose.
        caches: variables that say where caches are, on top of our own.
        build_plan, guesses, finder: see :func:`start_service`.

    Raises:
        OSError: no directory or no process can be made.
    """
    service = start_service(build_plan=build_plan, guesses=guesses, finder=finder, early=True, environment=caches)
    environment[SERVICE] = str(service.socket)
    environment[EARLY] = f"{service.process.pid} {_python()}"
    return service


def early_service(environment: MutableMapping[str, str]) -> ServiceProcess | None:
    """The service that was started for this process before it became this program.

    It is told once: the variable that says so is removed. None where there is none, where it has ended, where it is
    another process's (this one has inherited the variables), or where it cannot work for this one; then it is ended.
    """
    said, socket = environment.pop(EARLY, None), environment.get(SERVICE)
    if said is None or socket is None:
        return None
    number, _, python = said.partition(" ")
    child = Inherited(int(number)) if number.isdecimal() else None
    # Also the path, since another child of this process may have got the number.
    if child is None or not _is_served_by(socket, number) or not child.is_alive():
        return None
    service = _stopped_at_exit(ServiceProcess(Path(socket).parent, child))
    if python != _python():
        del environment[SERVICE]
        service.stop()
        return None
    return service


def _python() -> str:
    """What a service and the ranks must have in common: the interpreter, and the DeepGEMM that they import."""
    found = importlib.util.find_spec("deep_gemm")
    return f"{sys.prefix} {sys.version_info[:2]} {found.origin if found is not None else None}"


def _is_served_by(socket: str, pid: str) -> bool:
    try:
        command_line = Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(socket) in command_line.split(b"\0")


def _stopped_at_exit(service: ServiceProcess) -> ServiceProcess:
    atexit.register(_stop_at_exit, service, os.getpid())
    return service


def _stop_at_exit(service: ServiceProcess, owner: int) -> None:
    # A fork of the owner inherits this call, and has no service to stop.
    if os.getpid() == owner:
        service.stop()
