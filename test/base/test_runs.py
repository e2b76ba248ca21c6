"""Each start has a directory of its own for its events, and old ones go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.confined import run_python
from kit.environment import child_environment, python_path
from sglang_warmstart.base.events import READY
from sglang_warmstart.base.runs import KEPT_RUNS, new_run, runs_of, say_ready


def test_a_run_lies_in_the_cache_and_bears_its_process(tmp_path: Path) -> None:
    directory, problem = new_run(tmp_path)
    assert problem is None
    assert directory.is_dir()
    assert directory.parent == runs_of(tmp_path)
    assert directory.name.endswith(f"-{os.getpid()}")


def test_the_oldest_go_and_what_is_no_run_stays(tmp_path: Path) -> None:
    place = runs_of(tmp_path)
    for number in range(KEPT_RUNS + 5):
        old = place / f"20200101-0000{number:02}-7"
        old.mkdir(parents=True)
        os.utime(old, (0, 0))
    (place / "20200101-notes").mkdir()
    directory, _ = new_run(tmp_path)
    left = sorted(path.name for path in place.iterdir())
    assert len(left) == KEPT_RUNS + 1
    assert {"20200101-notes", directory.name} <= set(left)
    assert "20200101-000005-7" not in left
    assert "20200101-000006-7" in left


_ELSEWHERE = """
import sys
from pathlib import Path
from sglang_warmstart.base.runs import new_run
directory, problem = new_run(Path(sys.argv[1]))
assert directory.is_dir()
print(directory)
print(problem)
"""


def test_where_the_cache_cannot_be_written_a_run_ends_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    directory, problem = run_python(_ELSEWHERE, str(tmp_path / "file")).splitlines()
    assert problem == f"{tmp_path / 'file' / 'warmstart' / 'events'} cannot be written: Not a directory"
    assert not Path(directory).exists()


_KILLED = """
import os, sys
from pathlib import Path
from sglang_warmstart.base.runs import new_run
directory, _ = new_run(Path(sys.argv[1]))
(directory / "main-1.jsonl").touch()
print(directory, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_elsewhere_goes_with_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = child_environment({"PYTHONPATH": python_path(Path(__file__).parents[1])})
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "file")]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL and left.is_dir()
    run_python(_ELSEWHERE, str(tmp_path / "file"))
    assert not left.exists()


def test_ready_is_a_file(tmp_path: Path) -> None:
    say_ready(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [READY]
    with pytest.raises(FileNotFoundError):
        say_ready(tmp_path / "is not there")


def test_runs_that_began_just_now_stay_however_many_there_are(tmp_path: Path) -> None:
    # As where many nodes start on one cache.
    directories = [new_run(tmp_path)[0] for _ in range(KEPT_RUNS + 5)]
    assert len(set(directories)) == KEPT_RUNS + 5  # also those of one second, with one process number
    assert all(directory.is_dir() for directory in directories)
    assert sorted(directories) == sorted(runs_of(tmp_path).iterdir())


_NOWHERE = """
import sys, tempfile
from pathlib import Path
from sglang_warmstart.base.runs import new_run
tempfile.tempdir = sys.argv[1] + "/is not there"
directory, problem = new_run(Path(sys.argv[1]))
assert not directory.exists()
print(problem)
"""


def test_where_nothing_can_be_written_at_all_a_run_has_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = run_python(_NOWHERE, str(tmp_path / "file")).splitlines()
    assert problem == f"{tmp_path / 'file' / 'warmstart' / 'events'} cannot be written: Not a directory"
