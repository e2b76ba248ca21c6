"""Runs and events on a file system that refuses, hangs or lies: a process loses its events, and nothing else."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import pytest
from kit.bad_files import EVERY, BadFiles, Rule
from kit.confined import run_python

# Everything that a server does with its run, and what it knows of it afterwards.
_RUN = """
import json, logging, os, sys
from pathlib import Path
from sglang_warmstart.base import events, runs

logging.basicConfig(format="%(message)s", stream=sys.stdout)
directory, problem = runs.new_run(Path(sys.argv[1]))
log = events.open_log("rank", {"SGLANG_WARMSTART_EVENTS": str(directory)})
for name in ("first", "second"):
    events.emit("jit", name, 0.0)
try:
    runs.say_ready(directory)
except OSError:
    log.begin_serving()
events.emit("jit", "third", 0.0)
assert log.phase == "serving"
events.close_log()
print(json.dumps([str(directory), problem]))
"""


def run(bad: BadFiles, cache: Path) -> tuple[Path, str | None, list[str]]:
    """A run on a cache. Returns its directory, why it is not in the cache, and what was logged."""
    *said, last = run_python(_RUN, str(cache), environment=bad.environment).splitlines()
    directory, problem = json.loads(last)
    return Path(directory), problem, said


def lines_of(directory: Path) -> list[str]:
    """The events that were written: all lines but the first. Each is whole."""
    (path,) = directory.glob("rank-*.jsonl")
    return [str(json.loads(line)["name"]) for line in path.read_text().splitlines()[1:]]


@pytest.fixture
def bad(tmp_path: Path) -> BadFiles:
    return BadFiles(tmp_path)


def test_whichever_call_fails_a_process_goes_on(bad: BadFiles, tmp_path: Path) -> None:
    # Alternating: a refusal for once, and one from then on.
    for n in range(1, 60):
        cache = tmp_path / str(n)
        rule = bad.refuse(EVERY, cache, errno.ESTALE, first=n, **({"last": n} if n % 2 else {}))
        directory, problem, said = run(bad, cache)
        rule.lift()
        if not rule.fired:
            break
        assert len(said) <= 1 and all("events are not recorded in" in line for line in said)
        assert problem is None or "cannot be written: Stale file handle" in problem
        if directory.is_dir() and not said:
            assert lines_of(directory) == ["first", "second", "third"]
    assert 10 < n < 59


def hangs(bad: BadFiles, cache: Path, call: str) -> tuple[Rule, float]:
    """A run where one kind of call never returns, and the seconds that it takes."""
    rule = bad.set("hang", (call,), cache)
    start = time.monotonic()
    _, problem, said = run(bad, cache)
    seconds = time.monotonic() - start
    assert "no answer in 5 s" in f"{problem} {said}"
    assert len(said) <= 1
    return rule, seconds


@pytest.mark.parametrize("call", ["mkdir", "write"])
def test_a_call_that_never_returns_is_waited_for_once(call: str, bad: BadFiles, tmp_path: Path) -> None:
    rule, seconds = hangs(bad, tmp_path / "cache", call)
    assert rule.fired
    assert 5 <= seconds < 12


# By the clock of the host, all of these are two hours old.
_SWEEP = """
import os, sys, time
from pathlib import Path
from sglang_warmstart.base import runs
from sglang_warmstart.base.files import remove_left_behind

cache = Path(sys.argv[1])
young, old = (cache / "tmp" / f"warmstart-{name}" for name in ("young", "old"))
for place in (young, old):
    place.mkdir(parents=True)
os.utime(old, (time.time() - 4000,) * 2)
(cache / "fresh").touch()
remove_left_behind(cache / "tmp", cache / "fresh")
assert young.is_dir() and not old.is_dir(), "what is being built"
for number in range(runs.KEPT_RUNS + 5):
    (runs.runs_of(cache) / f"20200101-0000{number:02}-7").mkdir(parents=True)
directory, problem = runs.new_run(cache)
assert directory.is_dir() and problem is None
assert len(list(runs.runs_of(cache).iterdir())) == runs.KEPT_RUNS + 6, "runs of other hosts"
"""


def test_what_others_just_made_is_not_old_by_another_hosts_clock(bad: BadFiles, tmp_path: Path) -> None:
    rule = bad.set("clock", ("look",), tmp_path / "cache", number=-7200)
    run_python(_SWEEP, str(tmp_path / "cache"), environment=bad.environment)
    assert rule.fired
