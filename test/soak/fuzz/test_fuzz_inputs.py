"""Very many inputs that are not quite what they should be, of each kind: see `inputs.py` beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.environment import child_environment
from kit.hostile import SUBJECTS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SUBJECTS)
def test_each_of_very_many_inputs_is_taken_or_refused_in_one_line(name: str) -> None:
    program = Path(__file__).with_name("inputs.py")
    command = [sys.executable, str(program), "--subject", name, "--inputs", "20000"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
