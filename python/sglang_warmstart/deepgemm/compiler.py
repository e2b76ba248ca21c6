"""Find the compiler that DeepGEMM's JIT uses, and run it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from sglang_warmstart.base.errors import printable
from sglang_warmstart.base.processes import KILL_S
from sglang_warmstart.deepgemm import nvrtc
from sglang_warmstart.deepgemm.dialects import FIRST_JIT, Dialect

Kind = Literal["nvcc", "nvrtc"]

_NICE = 5
VERSION_S = 30.0  # for a compiler to say which it is
_MESSAGE_LIMIT = 4000  # characters of the compiler's own words


class CompilerError(Exception):
    """The compiler is not there or did not compile; holds its own message."""


class Compiler(msgspec.Struct, frozen=True):
    """A compiler that was found.

    Args:
        path: of nvcc, or of what ``DG_JIT_NVCC_COMPILER`` names in its place.
        version: what it prints for ``--version``, and NVRTC's own version in a line after that.
        kind: "nvrtc" compiles by NVRTC what DeepGEMM would give to nvcc.
        cuda_home: the toolkit that it belongs to; NVRTC needs the headers there.
    """

    path: str
    version: str
    kind: Kind = "nvcc"
    cuda_home: str = ""

    @property
    def release(self) -> str:
        """Its version number, such as 13.0.88, or "unknown"."""
        found = re.search(r"V(\d+\.\d+\.\d+)", self.version)
        return found.group(1) if found else "unknown"


class CompileJob(msgspec.Struct, frozen=True):
    """One kernel to compile; it says all that the machine that compiles needs to know.

    Args:
        source: CUDA source.
        flags: the compiler's flags, in one line.
        compiler: which one.
        limit_s: seconds after which the run is ended.
    """

    source: str
    flags: str
    compiler: Compiler
    limit_s: float


def find_path(environment: Mapping[str, str], dialect: Dialect = FIRST_JIT) -> str:
    """Where DeepGEMM's compiler is.

    Raises:
        CompilerError: it is not there; says where it was looked for.
    """
    try:
        path, missing = dialect.compiler_path(environment)
    except (OSError, ValueError) as error:  # a name too long, say
        path, missing = None, str(error)
    if path is None:
        raise CompilerError(printable(missing))
    return path


def find(environment: Mapping[str, str], kind: Kind = "nvcc", dialect: Dialect = FIRST_JIT) -> Compiler:
    """The compiler with its version.

    Raises:
        CompilerError: it is not there, does not say its version, or is none that DeepGEMM takes.
    """
    path = find_path(environment, dialect)
    try:
        # It need not come from nvcc's toolkit. After nvcc's words: DeepGEMM reads its names of kernels from those.
        own = f"{nvrtc.version()}\n" if kind == "nvrtc" else ""
    except nvrtc.NvrtcError as error:
        raise CompilerError(str(error)) from None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerError(f"{path}: {error}") from error
    if problem := dialect.check_compiler(said):
        raise CompilerError(f"{path}: {problem}")
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or str(Path(path).resolve().parent.parent)
    return Compiler(path, said + own, kind, home)


def compile_kernel(job: CompileJob) -> bytes:
    """The cubin of a kernel. Runs in a pool's thread or process, here or on another machine.

    Raises:
        CompilerError: with the compiler's own message.
    """
    if job.compiler.kind == "nvrtc":
        try:
            return nvrtc.compile_source(job.source, job.flags, Path(job.compiler.cuda_home))
        except nvrtc.NvrtcError as error:
            raise CompilerError(_shortened(str(error))) from None
    try:
        with tempfile.TemporaryDirectory(prefix="warmstart-compile-") as directory:
            return _run_nvcc(job, Path(directory))
    except OSError as error:
        raise CompilerError(f"{job.compiler.path}: {error}") from error


def _run_nvcc(job: CompileJob, directory: Path) -> bytes:
    source, cubin, log = directory / "kernel.cu", directory / "kernel.cubin", directory / "log"
    source.write_bytes(job.source.encode())
    command = [job.compiler.path, str(source), "-cubin", "-o", str(cubin), *job.flags.split()]
    with log.open("wb") as output:
        # A group of its own: nvcc starts others, and all of them are to end with it.
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        _running.add(process)
        # Behind the ranks and the recording children: what those find is the next to compile.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PGRP, process.pid, _NICE)
        try:
            status = process.wait(job.limit_s)
        except subprocess.TimeoutExpired:
            raise CompilerError(f"{job.compiler.path} was ended after {job.limit_s:g} s") from None
        finally:
            _running.end(process)
    if status != 0:
        how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
        said = log.read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
        raise CompilerError(f"{job.compiler.path}: {how}: {_shortened(said)}")
    if not cubin.is_file():
        raise CompilerError(f"{job.compiler.path}: it left no cubin")
    return cubin.read_bytes()


def _shortened(message: str) -> str:
    return message if len(message) <= _MESSAGE_LIMIT else f"{message[:_MESSAGE_LIMIT]} ..."


class _Running:
    """The compilers that run in this process's threads, so that they can be ended with it."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.add(process)
            if self._closed:
                _kill_group(process)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            _kill_group(process)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a call that no signal ends, on a dead file system
                process.wait(KILL_S)
        with self._lock:
            self._processes.discard(process)

    def end_all(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Or it has just ended by itself.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_running = _Running()


def end_all_runs() -> None:
    """End every compiler that runs in this process, and any that starts from now on."""
    _running.end_all()
