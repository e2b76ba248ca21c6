"""Very many archives that are not quite what they should be: see `unpack.py` beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.environment import child_environment


@pytest.mark.timeout(3600)
def test_each_of_very_many_inputs_is_refused_or_whole() -> None:
    command = [sys.executable, str(Path(__file__).with_name("unpack.py")), "--inputs", "20000"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
