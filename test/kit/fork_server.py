"""Fresh processes in tens of milliseconds: forked from one that has imported SGLang already.

    def test_it(forks):
        done = forks.run("import sys; print(sys.argv[1])", "hello", environment={"HOME": str(tmp_path)})
        assert (done.status, done.out) == (0, "hello\\n")
        done = forks.call("kit.sample:function", 1, 2)  # module:name, with arguments that can be pickled

Each case has its own session, environment, directory, arguments, output and exit status. It is killed with all of its
group at its time limit, and when the test process ends. SGLang is imported, and the plugin is not. SGLang reads some
variables while it is imported: a case that sets one of those needs a process of its own (``kit.confined.run_python``).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from kit.environment import child_environment, python_path

# What costs the seconds of `import sglang`: torch, transformers, and SGLang's own modules up to the model runner.
SGLANG = ("sglang.srt.model_executor.model_runner", "sglang.srt.entrypoints.engine")

_HEADER = struct.Struct("!Q")
_ANSWER = struct.Struct("!i")
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Case:
    code: str  # a program, or "module:name" where `call` is set
    call: bool
    arguments: tuple[object, ...]
    environment: dict[str, str]
    directory: str


@dataclass(frozen=True)
class Done:
    """How a case ended. `status` is negative where a signal ended it, as in `subprocess`."""

    status: int
    out: str
    err: str

    def checked(self) -> str:
        """What it printed; RuntimeError if it failed."""
        if self.status != 0:
            raise RuntimeError(f"it ended with status {self.status}: {self.err}")
        return self.out


class ForkServer:
    """A process that has imported `modules`, and forks the cases. Ends on leaving the context."""

    def __init__(self, modules: Sequence[str] = SGLANG) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "kit.fork_server", str(theirs.fileno()), *modules],
                env=child_environment({"PYTHONPATH": python_path(Path(__file__).parents[1])}),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(
        self,
        code: str,
        *arguments: str,
        environment: Mapping[str, str | None] | None = None,
        directory: Path | None = None,
        limit_s: float = 60.0,
    ) -> Done:
        """Run a program as `python -c code arguments` does. `environment`: as of `child_environment`."""
        return self._case(code, False, arguments, environment, directory, limit_s)

    def call(
        self,
        function: str,
        *arguments: object,
        environment: Mapping[str, str | None] | None = None,
        directory: Path | None = None,
        limit_s: float = 60.0,
    ) -> Done:
        """Call "module:name" with arguments that can be pickled; a returned value is dropped."""
        return self._case(function, True, arguments, environment, directory, limit_s)

    def _case(
        self,
        code: str,
        call: bool,
        arguments: tuple[object, ...],
        environment: Mapping[str, str | None] | None,
        directory: Path | None,
        limit_s: float,
    ) -> Done:
        case = _Case(code, call, arguments, child_environment(environment), str(directory or Path.cwd()))
        payload = pickle.dumps(case)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with theirs:
                files = [theirs.fileno(), out.fileno(), err.fileno()]
                socket.send_fds(self._socket, [_HEADER.pack(len(payload))], files)
                self._socket.sendall(payload)
            # The first case waits for the imports, which are not its time.
            ours.settimeout(180)
            if ours.recv(1) != b"s":
                raise RuntimeError(f"the fork server has ended: status {self._process.poll()}")
            ours.settimeout(limit_s)
            try:
                answer = ours.recv(_ANSWER.size)
            except TimeoutError:
                ours.shutdown(socket.SHUT_WR)  # the case is killed
                ours.settimeout(15)
                ours.recv(_ANSWER.size)
                raise TimeoutError(
                    f"not done after {limit_s:g} s: {_text(out.fileno())}{_text(err.fileno())}"
                ) from None
            if len(answer) != _ANSWER.size:
                raise RuntimeError("the case's supervisor has ended")
            return Done(_ANSWER.unpack(answer)[0], _text(out.fileno()), _text(err.fileno()))


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are not waited for
    while True:
        header, files, _, _ = socket.recv_fds(requests, _HEADER.size, 3)
        if not header:
            return
        payload = b""
        while len(payload) < _HEADER.unpack(header)[0]:
            payload += requests.recv(1 << 20)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = 1
            try:
                status = _supervise(payload, *files)
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        for file in files:
            os.close(file)


def _supervise(payload: bytes, connection: int, out: int, err: int) -> int:
    """Fork the case, and kill it when the test hangs up."""
    _die_with_parent()
    case = os.fork()
    if case == 0:
        os.close(connection)
        os.setsid()
        _die_with_parent()
        os.dup2(out, 1)
        os.dup2(err, 2)
        _run(pickle.loads(payload))
    with socket.socket(fileno=connection) as caller:
        caller.sendall(b"s")
        done = os.pidfd_open(case)
        readable, _, _ = select.select([done, caller], [], [])
        if done not in readable:
            with contextlib.suppress(ProcessLookupError):
                # By its id: it may not be the head of a group yet.
                os.kill(case, signal.SIGKILL)
        _, status = os.waitpid(case, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(case, signal.SIGKILL)  # what it left behind
        with contextlib.suppress(BrokenPipeError):
            caller.sendall(_ANSWER.pack(os.waitstatus_to_exitcode(status)))
    return 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def _run(case: _Case) -> None:
    """Run a case in this process, which ends with it."""
    status = 0
    try:
        os.environ.clear()
        os.environ.update(case.environment)
        time.tzset()
        tempfile.tempdir = None
        os.chdir(case.directory)
        sys.path[:0] = [p for p in case.environment.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
        if case.call:
            module, name = case.code.split(":")
            getattr(importlib.import_module(module), name)(*case.arguments)
        else:
            sys.argv = ["-c", *map(str, case.arguments)]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(case.code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)


def _main() -> None:
    _die_with_parent()
    requests = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    if (count := len(list(Path("/proc/self/task").iterdir()))) > 1:
        print(f"kit.fork_server: {count} threads after the imports; forked cases have one", file=sys.stderr)
    sys.stdout.flush()
    _serve(requests)


if __name__ == "__main__":
    # Cases are pickled as of the module of this name.
    importlib.import_module("kit.fork_server")._main()
