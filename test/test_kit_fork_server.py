"""A forked case is as a fresh process: its own environment, arguments, output, status and end."""

import os
import time
from pathlib import Path

import psutil
import pytest
from kit.fork_server import ForkServer
from kit.node import wait_until

SEEN = "import os, sys; print(os.environ['HOME'], os.getcwd(), sys.argv[1:], 'torch' in sys.modules)"


def test_a_case_has_its_own_environment_directory_and_arguments(forks: ForkServer, tmp_path: Path) -> None:
    done = forks.run(SEEN, "a", environment={"HOME": "/nowhere"}, directory=tmp_path)
    assert (done.status, done.out) == (0, f"/nowhere {tmp_path} ['a'] True\n")


def test_a_case_leaves_nothing_to_the_next(forks: ForkServer) -> None:
    forks.run("import sys, os; sys.mine = 1; os.environ['MINE'] = '1'").checked()
    assert forks.run("import sys, os; print(hasattr(sys, 'mine'), 'MINE' in os.environ)").checked() == "False False\n"


def test_a_call_and_how_it_failed(forks: ForkServer) -> None:
    assert forks.call("builtins:print", "one", 2).checked() == "one 2\n"
    assert forks.run("raise SystemExit(3)").status == 3
    assert forks.run("import os; os.kill(os.getpid(), 9)").status == -9
    failed = forks.run("raise ValueError('no luck')")
    assert failed.status == 1
    assert "ValueError: no luck" in failed.err


def test_at_its_limit_a_case_is_killed_with_its_children(forks: ForkServer, tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)"
    with pytest.raises(TimeoutError) as late:
        forks.run(code, limit_s=1)
    child = int(str(late.value).split(": ")[1])
    assert wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_the_plugin_is_not_imported(forks: ForkServer) -> None:
    assert forks.run("import sys; print('sglang_warmstart' in sys.modules)").checked() == "False\n"


def test_a_case_takes_a_moment(forks: ForkServer) -> None:
    forks.run("pass").checked()  # the imports
    start = time.monotonic()
    forks.run("pass").checked()
    assert time.monotonic() - start < 2, os.getloadavg()
