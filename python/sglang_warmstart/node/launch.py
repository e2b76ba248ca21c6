"""Start the service beside a server."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.base.private_directory import make_directory, remove_abandoned, remove_directory
from sglang_warmstart.deepgemm.record.child import LIBRARY


@dataclass
class ServiceProcess:
    """A service that has been started.

    Args:
        socket: where ranks find it, as soon as it listens.
        process: it ends by itself when this process does.
    """

    socket: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it now."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        remove_directory(self.socket.parent)


def start_service(library: str = LIBRARY, restoring: Path | None = None, plans: Path | None = None) -> ServiceProcess:
    """Start the service in a private directory. Returns at once: ranks wait for its socket.

    Args:
        library: the module that calls DeepGEMM in recording children.
        restoring: a file that is locked as long as somebody restores kernels into the cache.
        plans: where the plans of ranks go; then nothing is compiled.

    Raises:
        OSError: no directory or no process can be made.
    """
    remove_abandoned()
    directory, alive = make_directory()
    socket = directory / "service.sock"
    try:
        # Not -m: each child of the service would begin with an import of its main module. And by the path of this
        # process: it is to record with the DeepGEMM that the ranks import, not with one in the working directory.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.service import main; main()"
        command = [sys.executable, "-c", code, "--socket", str(socket)]
        command += ["--parent", str(os.getpid()), "--library", library]
        for option, path in (("--restoring", restoring), ("--plans", plans)):
            command += [option, str(path)] if path is not None else []
        environment = os.environ | {
            # By NVML: torch would else start CUDA to tell whether there is a GPU, and no child could use one then.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # What compilers and children leave when they are killed goes with the directory.
            "TMPDIR": str(directory),
            # The forkserver of Python before 3.13 knows no other path.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with alive:
            # A session of its own: Ctrl-C in the terminal is for the server.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(alive.fileno(),),
            )
    except BaseException:
        remove_directory(directory)
        raise
    started = ServiceProcess(socket, process)
    atexit.register(_stop_at_exit, started, os.getpid())
    return started


def _stop_at_exit(service: ServiceProcess, owner: int) -> None:
    # A fork of the owner inherits this call, and has no service to stop.
    if os.getpid() == owner:
        service.stop()
