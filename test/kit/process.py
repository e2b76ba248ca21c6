"""A real SGLang HTTP server as a child process that leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

_READY = "The server is fired up and ready to roll!"
_TERM_LIMIT_S = 15.0
_KILL_LIMIT_S = 15.0


class ServerProcess:
    """Starts on entering the context, which returns once requests are answered; stops on leaving it.

    `environment` is the child's whole environment. `log_file` outlives the server; without it the log is read through
    `log` alone.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str],
        *,
        log_file: Path | None = None,
        start_limit_s: float = 180.0,
        request_limit_s: float = 60.0,
    ) -> None:
        self.port = port
        self._command = list(command)
        self._environment = dict(environment)
        self._log_file = log_file
        self._start_limit_s = start_limit_s
        self._request_limit_s = request_limit_s
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._last_log = ""

    def __enter__(self) -> "ServerProcess":
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:  # also Ctrl-C and a test's own time limit: __exit__ is not called for a failed __enter__
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start without waiting."""
        if self._process is not None:
            raise RuntimeError("this server was started before: make a new one")
        if self._log_file is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="sglang-server-")
            self._log_file = Path(self._scratch.name, "log")
        with self._log_file.open("wb") as log:
            # A session of its own: Ctrl-C reaches the caller alone, and every descendant can be found by its session.
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when requests are answered; RuntimeError with the log's end if it died or took too long."""
        deadline = time.monotonic() + self._start_limit_s
        while _READY not in self.log:
            code = self.process.poll()
            if code is not None:
                raise RuntimeError(f"the server ended with status {code} before it was ready:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {self._start_limit_s:.0f} s:\n{self._log_tail()}")
            time.sleep(0.1)

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The server's main process."""
        if self._process is None:
            raise RuntimeError("this server was not started")
        return self._process

    @property
    def log(self) -> str:
        """What all processes of the server wrote so far."""
        if self._log_file is not None and self._log_file.exists():
            self._last_log = self._log_file.read_text(errors="replace")
        return self._last_log

    def _log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def generate(self, input_ids: Sequence[int], max_new_tokens: int = 4) -> list[int]:
        """The tokens that follow `input_ids`, chosen greedily."""
        body = {
            "input_ids": list(input_ids),
            # A made-up model may choose the end token first; the caller asked for a number of tokens.
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # Not through a proxy that the machine may have set for the outside.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=self._request_limit_s) as response:
            answer = json.load(response)
        return [int(token) for token in answer["output_ids"]]

    def processes(self) -> list[psutil.Process]:
        """Every living process of the server, also where the main one has died and left them."""
        if self._process is None:
            return []
        return [process for process in psutil.process_iter() if _lives_in_session(process, self._process.pid)]

    def stop(self) -> None:
        """End every process of the server. May be called again, and after the main process has died."""
        if self._process is not None:
            try:
                self._end(signal.SIGTERM, _TERM_LIMIT_S)
            finally:  # also when a second Ctrl-C ends the wait
                self._end(signal.SIGKILL, _KILL_LIMIT_S)
            if left := self.processes():
                raise RuntimeError(f"processes of the server survived SIGKILL: {left}")
        if self._scratch is not None:
            _ = self.log  # stays readable after the file is gone
            self._scratch.cleanup()
            self._scratch = None

    def _end(self, with_signal: signal.Signals, limit_s: float) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since the listing: what the signal is for
                process.send_signal(with_signal)
        deadline = time.monotonic() + limit_s
        # poll() collects the main process, which would stay a zombie and count as living by its id otherwise
        while (self.process.poll() is None or self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)


def _lives_in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
