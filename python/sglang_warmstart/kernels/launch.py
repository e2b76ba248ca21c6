"""Start the service beside a server."""

from __future__ import annotations

import atexit
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.kernels.recording import LIBRARY

PREFIX = "sglang-warmstart-"
# A Unix socket's path has room for 107 bytes, and the sockets of multiprocessing lie two levels deeper.
_PATH_LIMIT = 70
# Locked as long as the service lives. A process number would say nothing to those in another container.
ALIVE = "alive"


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
    _remove_abandoned()
    directory = _make_directory()
    socket = directory / "service.sock"
    try:
        modules = str(_lay_out_modules(directory))
        # Not -m: each child of the service would begin with an import of its main module. And by the path of this
        # process: it is to record with the DeepGEMM that the ranks import, not with one in the working directory.
        search = [modules, *sys.path]
        code = f"import sys; sys.path[:] = {search!r}; from {__package__}.service import main; main()"
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
            "PYTHONPATH": os.pathsep.join(filter(None, (modules, os.environ.get("PYTHONPATH")))),
        }
        with (directory / "fresh").open("wb") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            (directory / "fresh").rename(directory / ALIVE)  # nobody is to find it without the lock
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


def remove_directory(directory: Path) -> None:
    """Remove the private directory of a service, and never another one."""
    if directory.name.startswith(PREFIX):
        shutil.rmtree(directory, ignore_errors=True)


def _lay_out_modules(directory: Path) -> Path:
    """A directory that has this package, in empty ones in the place of those above it.

    In SGLang's tree an import of this package would import SGLang: seconds, and hundreds of megabytes, of which the
    service and its children have no use.
    """
    *above, name = str(__package__).split(".")
    place = modules = directory / "modules"
    for package in above:
        place /= package
        place.mkdir(parents=True)
        (place / "__init__.py").touch()
    (place / name).symlink_to(Path(__file__).parent)
    return modules


def _stop_at_exit(service: ServiceProcess, owner: int) -> None:
    # A fork of the owner inherits this call, and has no service to stop.
    if os.getpid() == owner:
        service.stop()


def _make_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    # DeepGEMM quotes nothing in the command line of its compiler, and that of a recording lies here.
    if len(str(directory)) > _PATH_LIMIT or shlex.quote(str(directory)) != str(directory):
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    return directory


def _remove_abandoned() -> None:
    """Remove what services that were killed have left of their private directories."""
    for place in {tempfile.gettempdir(), "/tmp"}:
        for directory in Path(place).glob(f"{PREFIX}*"):
            try:
                if directory.stat().st_uid == os.getuid():
                    with (directory / ALIVE).open("rb") as alive:
                        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        remove_directory(directory)
            except OSError:
                continue  # in use, or somebody else is removing it
