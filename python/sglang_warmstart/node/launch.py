"""Start the service beside a server."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from sglang_warmstart.base import processes
from sglang_warmstart.base.processes import OwnProcess


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
    library: str | None = None, restoring: Path | None = None, plans: Path | None = None
) -> ServiceProcess:
    """Start the service in a private directory. Returns at once: ranks wait for its socket.

    Args:
        library: the module that calls DeepGEMM in recording children; the service knows one if it is not named.
        restoring: a file that is locked as long as somebody restores kernels into the cache.
        plans: where the plans of ranks go; then nothing is compiled.

    Raises:
        OSError: no directory or no process can be made.
    """
    given = {"--library": library, "--restoring": restoring, "--plans": plans}
    options = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    started = processes.start(
        f"{__package__}.service",
        lambda directory: ["--socket", str(socket_in(directory)), *options],
        {
            # By NVML: torch would else start CUDA to tell whether there is a GPU, and no child could use one then.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # The forkserver of Python before 3.13 knows no other path.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    service = ServiceProcess(started.directory, started.process)
    atexit.register(_stop_at_exit, service, os.getpid())
    return service


def _stop_at_exit(service: ServiceProcess, owner: int) -> None:
    # A fork of the owner inherits this call, and has no service to stop.
    if os.getpid() == owner:
        service.stop()
