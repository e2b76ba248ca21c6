"""A process whose JIT compiles are watched as in a rank: by the feature itself, which follows what is imported."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.base.events import Event, open_log
from sglang_warmstart.base.runs import say_ready
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.libraries.monitor import JitMonitor
from sglang_warmstart.report.reading import read_run

from kit.environment import child_environment, python_path
from kit.release import sglang_directory

_HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Watched:
    """What became of a piece of Python."""

    status: int
    said: str
    events: list[Event]

    def of(self, library: str) -> list[Event]:
        """The events of one library."""
        return [event for event in self.events if event.library == library]


def begin() -> None:
    """Watch this process. Its code calls this first; what is imported later is watched as soon as it is."""
    from sglang_warmstart.plugin import Plugin
    from sglang_warmstart.sglang.announce import Announcer
    from sglang_warmstart.sglang.build_ahead import BUILDING_AHEAD
    from sglang_warmstart.sglang.jit_monitor import JIT_MONITORING, mode_of

    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", force=True)
    log = open_log("rank", os.environ)
    assert log is not None
    mode = mode_of(os.environ)
    if mode != "off":
        log.listeners.append(JitMonitor(mode))
    announcer = Announcer()
    Plugin([BUILDING_AHEAD, JIT_MONITORING], announcer).install(sglang_directory())
    announcer.open()


def serve() -> None:
    """From now on, this process is one of a server that is ready."""
    say_ready(Path(os.environ[EVENTS]))


def run_watched(code: str, run: Path, environment: Mapping[str, str] | None = None) -> Watched:
    """Run code that calls ``begin``. Its events are those of a run of its own.

    Args:
        run: the directory for its events.
    """
    settings = {EVENTS: str(run), "PYTHONPATH": python_path(_HERE), **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=child_environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return Watched(done.returncode, done.stdout, read_run(run).lanes[0].events)
