"""One bar says how many kernels are done, and how many compilers run."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sglang_warmstart.node.progress import Progress


def _plan(progress: Progress, kernels: int, given: int) -> None:
    for _ in range(kernels):
        progress.planned()
    for _ in range(given):
        progress.started()


def _finish(progress: Progress, kernels: int) -> None:
    for _ in range(kernels):
        progress.ended()
        progress.finished()
    progress.rest()  # without effect while any is left


def test_a_log_says_at_the_end_how_many_kernels_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(workers=4)
    _plan(progress, kernels=3, given=3)
    _finish(progress, 3)
    said = capsys.readouterr().err
    assert "warmstart: DeepGEMM kernels: 100%" in said
    assert "3/3" in said
    assert said.endswith("\n")


def test_a_log_gets_no_line_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(workers=4)
    _plan(progress, kernels=500, given=4)
    _finish(progress, 500)
    assert capsys.readouterr().err.count("\r") < 5


class Terminal:
    """A terminal, and what is on it."""

    def __init__(self, columns: int = 120) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = os.fdopen(theirs, "w")

    def shows(self, *words: str, limit_s: float = 5.0) -> bool:
        """Whether all words come within the limit, in what has been written since they were last asked for."""
        shown, deadline = "", time.monotonic() + limit_s
        while not all(each in shown for each in words):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            shown += os.read(self._ours, 1 << 16).decode(errors="replace")
        return True

    def close(self) -> None:
        self.file.close()
        os.close(self._ours)


@contextmanager
def standard_error_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """What is written to this process's standard error goes to a terminal."""
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal.file)
        yield terminal
    terminal.close()


def test_a_terminal_shows_kernels_done_wanted_and_in_flight_while_they_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> None:
        _finish(progress, 1)

    with standard_error_on_a_terminal(monkeypatch) as terminal:
        progress = Progress(workers=2)
        _plan(progress, kernels=5, given=0)
        for step, expected in (
            (progress.started, ("0/5", "1 in flight")),
            (progress.started, ("0/5", "2 in flight")),
            (progress.started, ("0/5", "2 in flight")),  # there are two workers, whatever they have been given
            (finish, ("1/5", "2 in flight")),
            (finish, ("2/5", "2 in flight")),
            (finish, ("3/5", "1 in flight")),
            (progress.planned, ()),
            (progress.started, ("3/6", "1 in flight")),
        ):
            time.sleep(0.12)  # it is drawn ten times a second, at the most
            step()
            assert terminal.shows(*expected), expected
        _finish(progress, 3)
        assert terminal.shows("6/6")


def test_a_second_round_has_a_bar_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(workers=4)
    for kernels in (2, 5):
        _plan(progress, kernels, given=kernels)
        _finish(progress, kernels)
        assert f"{kernels}/{kernels}" in capsys.readouterr().err
