"""A command that stands where nvcc does and does what a test wants of it."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from sglang_warmstart.deepgemm.compiler import Compiler

from kit.recorded import real_cubin, recording

_SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then exec cat {version}; fi
# SOURCE -cubin -o CUBIN FLAGS..., as DeepGEMM calls nvcc
source=$1 cubin=$4
echo "start $$" >> {log}
{body}
status=$?
echo "end $$" >> {log}
exit $status
"""


@dataclass(frozen=True)
class ScriptedCompiler:
    """The command, and what it noted of its runs.

    Args:
        directory: of the command alone.
    """

    directory: Path

    @property
    def compiler(self) -> Compiler:
        """It, with the version of the compiler that the kernels were recorded for."""
        return Compiler(str(self.directory / "nvcc"), recording().compiler)

    @property
    def starts(self) -> list[int]:
        """The process of each run, as they began."""
        return [process for word, process in self._notes() if word == "start"]

    @property
    def most_at_once(self) -> int:
        """How many ran beside each other at the most."""
        running = most = 0
        for word, _ in self._notes():
            running += 1 if word == "start" else -1
            most = max(most, running)
        return most

    def wait_for_start(self, limit_s: float = 10.0) -> int:
        """The process of the first run, as soon as there is one."""
        deadline = time.monotonic() + limit_s
        while not self.starts:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody has started {self.compiler.path} in {limit_s:g} s")
            time.sleep(0.01)
        return self.starts[0]

    def _notes(self) -> list[tuple[str, int]]:
        log = self.directory / "log"
        lines = log.read_text(encoding="ascii").splitlines() if log.exists() else []
        return [(word, int(process)) for word, process in (line.split() for line in lines)]


def write_compiler(directory: Path, body: str) -> ScriptedCompiler:
    """Write the command.

    Args:
        directory: an existing one, of the command alone.
        body: in sh; `$source` and `$cubin` are the paths that it was given, and the last status is its own.
    """
    (directory / "version").write_text(recording().compiler, encoding="utf-8")
    text = _SCRIPT.format(
        version=shlex.quote(str(directory / "version")), log=shlex.quote(str(directory / "log")), body=body
    )
    command = directory / "nvcc"
    command.write_text(text, encoding="utf-8")
    command.chmod(0o700)
    return ScriptedCompiler(directory)


def write_copying_compiler(directory: Path, seconds: float = 0.0) -> ScriptedCompiler:
    """A compiler that takes so many seconds and leaves a real cubin, which it does not make itself."""
    real = directory / "real.cubin"
    real.write_bytes(real_cubin())
    return write_compiler(directory, f'sleep {seconds}\ncp {shlex.quote(str(real))} "$cubin"')


def is_alive(process: int) -> bool:
    """Whether a process runs. One that has ended and that nobody has asked for does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(processes: list[int], limit_s: float = 5.0) -> list[int]:
    """Those that are still alive when the time is up."""
    deadline = time.monotonic() + limit_s
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [process for process in processes if is_alive(process)]
