"""Start the service beside a server."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.kernels.recording import LIBRARY

_PREFIX = "sglang-warmstart-"
# A Unix socket's path has room for about a hundred bytes.
_PATH_LIMIT = 100


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
        shutil.rmtree(self.socket.parent, ignore_errors=True)


def start_service(library: str = LIBRARY) -> ServiceProcess:
    """Start the service in a private directory. Returns at once: ranks wait for its socket.

    Raises:
        OSError: no directory or no process can be made.
    """
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if len(str(directory)) > _PATH_LIMIT - 20:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    socket = directory / "service.sock"
    command = [sys.executable, "-m", __package__ + ".service", "--socket", str(socket)]
    command += ["--parent", str(os.getpid()), "--library", library]
    # By NVML: torch would else start CUDA to tell whether there is a GPU, and no child could use one then.
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    # A session of its own: Ctrl-C in the terminal is for the server.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    (directory / "pid").write_text(str(process.pid), encoding="ascii")
    started = ServiceProcess(socket, process)
    atexit.register(started.stop)
    return started


def _remove_abandoned() -> None:
    """Remove what services that were killed have left of their private directories."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if directory.stat().st_uid == os.getuid() and not _is_alive(int((directory / "pid").read_text())):
                shutil.rmtree(directory, ignore_errors=True)
        except (OSError, ValueError):
            continue


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
