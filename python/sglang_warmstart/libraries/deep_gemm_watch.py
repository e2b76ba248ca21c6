"""Watch DeepGEMM's compiles in a process, by the compiler command that it runs.

DeepGEMM runs our command in place of nvcc. The command runs nvcc, and reports when it began and when it ended. The
result is the same, because neither the digest of a kernel nor its code depends on the compiler's path. A thread
listens. While it hears of a run, the call that waits for the kernel is still under way, so the thread can look at that
call's stack.

Source: ``NVCCCompiler`` in ``csrc/jit/compiler.hpp`` of DeepGEMM 0.1.x, ``backend/cuda/backend.hpp`` of DeepJIT. The
former reads ``DG_JIT_NVCC_COMPILER`` when it compiles its first kernel, the latter in its first call, whatever that is.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sglang_warmstart.base.events import EventLog, emit
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.private_directory import make_directory, remove_abandoned, remove_directory
from sglang_warmstart.base.switches import UNWATCHED
from sglang_warmstart.deepgemm.compiler import VERSION_S, CompilerError, find_path
from sglang_warmstart.libraries import deep_gemm_front as compiler_command
from sglang_warmstart.libraries.deep_gemm import DeepGemm, installed_dialect
from sglang_warmstart.libraries.monitor import REFUSED, JitWhileServingError

COMPILER = "DG_JIT_NVCC_COMPILER"

# A server may outlive the installation that it was started from: then the compiler runs unwatched.
_SCRIPT = """#!/bin/sh
if [ "$1" != --version ] && [ -x {python} ] && [ -r {command} ]; then
  exec {python} -IS {command} {socket} {ready} {refuse} {compiler} "$@"
fi
exec {compiler} "$@"
"""
_MESSAGE_BYTES = 65536
# How long a call that failed waits to be told that it was refused.
_REFUSAL_WAIT_S = 2.0
# How far out from the innermost function a call is looked for.
_DEPTH = 16

logger = logging.getLogger(LOGGER_NAME)

# SGLang's wrapped GEMMs, which exact warm-up covers.
WRAPPED = "sglang.srt.layers.deep_gemm_wrapper.entrypoint"
# Whose calls may need a kernel.
_CALLERS = ("sglang.srt.layers.", "sglang.srt.models.", "deep_gemm")


@dataclass(frozen=True)
class Call:
    """A call that needs a kernel, as a look at its stack shows it.

    Args:
        function: the innermost function in Python.
        shape: its tensors and numbers.
        wrapped: whether it is one of SGLang's wrapped GEMMs.
    """

    function: str = ""
    shape: str = ""
    wrapped: bool = False


class DeepGemmWatch:
    """Watches DeepGEMM in this process.

    Args:
        log: of this process.
        environment: of this process, before DeepGEMM compiles its first kernel.
        refuse: whether a kernel that is compiled while serving makes its call fail.
        exact: whether exact warm-up has a service on this node.

    Raises:
        CompilerError: there is no compiler to stand before, or DeepGEMM does not use one.
        OSError: the command cannot be written.
    """

    def __init__(self, log: EventLog, environment: MutableMapping[str, str], *, refuse: bool, exact: bool) -> None:
        dialect = installed_dialect()
        if "nvrtc" in dialect.compilers and environment.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
            raise CompilerError("DG_JIT_USE_NVRTC is set: DeepGEMM compiles inside the process")
        self._exact = exact
        self._under_way: dict[int, tuple[str, Call]] = {}
        self._refusals: list[JitWhileServingError] = []
        self._told = threading.Condition()
        self._environment, self._before = environment, environment.get(COMPILER)
        compiler = find_path(environment, dialect)
        remove_abandoned()
        # The lock lives as long as this process does.
        self._directory, self._alive = make_directory()
        atexit.register(self._remove, os.getpid())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._directory / "socket"))
        words = {
            "compiler": compiler,
            "python": sys.executable,
            "command": compiler_command.__file__,
            "socket": str(self._directory / "socket"),
            "ready": str(log.ready_file.absolute()),
            "refuse": "1" if refuse and log.directory.is_dir() else "0",
        }
        command = self._directory / "compiler"
        command.write_text(
            _SCRIPT.format(**{name: shlex.quote(word) for name, word in words.items()}), encoding="utf-8"
        )
        command.chmod(0o700)
        self._try(command, words)
        environment[UNWATCHED] = self._before or ""
        environment[COMPILER] = str(command)
        threading.Thread(target=self._listen, name="warmstart-deep-gemm-watch", daemon=True).start()

    @staticmethod
    def _try(command: Path, words: dict[str, str]) -> None:
        """See that a command runs, and what it runs: a temporary directory may be mounted so that nothing in it does.

        Raises:
            CompilerError: it does not.
        """
        # A directory that is there is not a server that is ready.
        place = [str(command.parent / "nobody"), str(command.parent / "not ready"), "0"]
        inner = [words["python"], "-IS", words["command"], *place, words["compiler"]]
        for each in ([str(command)], *([inner] if Path(words["command"]).is_file() else [])):
            try:
                subprocess.run([*each, "--version"], capture_output=True, timeout=VERSION_S, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                raise CompilerError(f"a command before the compiler cannot run: {error}") from error

    def refusal(self) -> JitWhileServingError | None:
        """Why a call of DeepGEMM that has just failed was made to fail, if it was."""
        with self._told:
            self._told.wait_for(lambda: self._refusals, _REFUSAL_WAIT_S)
            return self._refusals.pop() if self._refusals else None

    def stop(self) -> None:
        """The compiler is the real one again, for a DeepGEMM that has not yet asked."""
        self._environment.pop(UNWATCHED, None)
        if self._before is None:
            self._environment.pop(COMPILER, None)
        else:
            self._environment[COMPILER] = self._before
        self._remove(os.getpid())

    def _listen(self) -> None:
        while True:
            try:
                message, address = self._socket.recvfrom(_MESSAGE_BYTES)
            except OSError:
                return  # it was closed
            try:
                self._hear(json.loads(message))
                if address:
                    # It has waited for this.
                    with contextlib.suppress(OSError):
                        self._socket.sendto(b"heard", address)
            except Exception:
                # The frames of a running thread may hold anything. Whoever compiles next is still to be heard.
                logger.warning("warmstart: the JIT monitor missed a kernel of deep-gemm's", exc_info=True)

    def _hear(self, words: dict[str, Any]) -> None:
        if "begins" in words:
            self._under_way[words["run"]] = kernel_of(Path(words["begins"])), call_under_way()
        else:
            self._ended(words)

    def _ended(self, words: dict[str, Any]) -> None:
        kernel, call = self._under_way.pop(words["run"], ("a kernel", Call()))
        try:
            emit(
                "jit",
                kernel,
                words["at"],
                words["seconds"],
                library=DeepGemm.name,
                shape=f"{call.function}({call.shape})" if call.function else "",
                error=_error_of(words),
                remedy=remedy_of(call, self._exact),
            )
        except JitWhileServingError as error:
            # DeepGEMM's own error does not say why.
            logger.error("warmstart: %s", error)
            with self._told:
                self._refusals.append(error)
                self._told.notify_all()

    def _remove(self, owner: int) -> None:
        # A fork of the owner inherits the call at its exit.
        if os.getpid() == owner:
            self._socket.close()
            remove_directory(self._directory)
            self._alive.close()


def _error_of(words: dict[str, Any]) -> str:
    if words.get("refused"):
        return REFUSED
    return f"the compiler's exit status is {words['status']}" if words["status"] else ""


def remedy_of(call: Call, exact: bool) -> str:
    """What would have covered a call that DeepGEMM compiled for.

    Args:
        exact: whether exact warm-up is at work in this process.
    """
    if not call.wrapped:
        return "no warm-up reaches this function; the next start on this cache finds the kernel"
    if exact:
        return (
            "exact warm-up was not done with this GEMM, or does not cover this M; the next start on this cache finds "
            "the kernel"
        )
    return DeepGemm.remedy


def kernel_of(source: Path) -> str:
    """What DeepGEMM's kernel in a source file is called, with its template arguments: those tell it from others."""
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "a kernel"
    found = re.search(r"&\s*(?:\w+::)*(\w+)\s*<([^;]*)>\s*\)?;", text)
    return f"{found[1]}<{' '.join(found[2].split())}>" if found else "a kernel"


def call_under_way() -> Call:
    """The call that waits for a kernel now: the innermost one of SGLang's layers, or of DeepGEMM, in any thread."""
    frames = sys._current_frames()
    threads = [threading.main_thread().ident, *frames]  # that one first: it runs most forwards
    for thread in threads:
        calls = [_described(frame) for frame in _callers(frames.get(thread) if thread is not None else None)]
        if calls:
            return max(calls, key=lambda call: (call.wrapped, bool(call.shape)))
    return Call()


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    for _ in range(_DEPTH):
        if frame is None:
            return
        if str(frame.f_globals.get("__name__")).startswith(_CALLERS):
            yield frame
        frame = frame.f_back


def _described(frame: FrameType) -> Call:
    code, values = frame.f_code, frame.f_locals
    parts = []
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = values.get(name)
        # A scaled operand is a pair: the tensor, and its scales.
        tensor: Any = value[0] if isinstance(value, (tuple, list)) and value else value
        if hasattr(tensor, "shape") and hasattr(tensor, "dtype"):
            parts.append(f"{name}: ({', '.join(map(str, tensor.shape))})")
        elif isinstance(value, int) and not isinstance(value, bool):
            parts.append(f"{name}={value}")
    return Call(code.co_name, ", ".join(parts), frame.f_globals.get("__name__") == WRAPPED)
