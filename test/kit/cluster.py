"""A real dask cluster for tests: a scheduler and workers that are processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from kit.compile_runs import Machine, wait_for
from kit.ports import free_ports
from kit.recorded import recording

_WORKER = "from distributed.cli.dask_worker import main; main()"


class Cluster:
    """A scheduler and its workers, which end with the context.

    Args:
        directory: for their logs; a new one.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        (port,) = free_ports(1)
        self._at = f"127.0.0.1:{port}"
        self.address = f"dask://{self._at}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        host, _, port = self._at.rpartition(":")
        log = self._directory / "scheduler"
        arguments = ["--host", host, "--port", port, "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self._start(log, ["-m", "distributed.cli.dask_scheduler", *arguments], dict(os.environ))
        wait_for(lambda: "Scheduler at:" in log.read_text())
        return self

    def worker(self, machine: Machine, before: str = "") -> int:
        """Add a worker that runs on a machine.

        Args:
            before: Python that is run first.

        Returns:
            Its process.
        """
        log = self._directory / f"worker-{len(self._processes)}"
        arguments = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        arguments += ["--host", "127.0.0.1", "--local-directory", str(self._directory)]
        command = ["-c", f"{before}\n{_WORKER}", f"tcp://{self._at}", *arguments]
        process = self._start(log, command, machine.environment)
        wait_for(lambda: "Registered to:" in log.read_text())
        return process.pid

    def _start(self, log: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    @property
    def workers(self) -> set[int]:
        """Their processes."""
        return {process.pid for process in self._processes[1:]}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Those of compilers are groups of their own, but still their children.
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


def without_tools(machine: Machine) -> Machine:
    """A machine without a compiler and without DeepGEMM."""
    machine.nvcc.path.unlink()
    machine.deep_gemm.rename(machine.directory / "no_deep_gemm")
    return machine


def with_other_compiler(directory: Path) -> Machine:
    """A machine whose nvcc is of another release."""
    machine = Machine(directory)
    (machine.nvcc.path.parent / "version").write_text(recording().compiler.replace("V13.0.88", "V13.0.99"))
    return machine
