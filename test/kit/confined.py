"""Run a piece of Python where the disk is small, read-only or otherwise not as it should be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path


def run_python(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """What a piece of Python prints in a process of its own; the rest of its environment is that of the tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*prefix, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def in_mount_namespace(setup: str) -> tuple[str, ...]:
    """The beginning of a command that runs the rest of it among mounts of its own, which end with it.

    Args:
        setup: in sh: what to mount first.
    """
    # The root of a user namespace may mount; that of this machine need not be asked.
    return ("unshare", "--mount", "--map-root-user", "sh", "-ec", f'{setup}\nexec "$@"', "sh")


@cache
def why_no_mounts() -> str:
    """Why this machine does not let us mount; empty if it does."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not there"
    done = subprocess.run([*in_mount_namespace("mount -t tmpfs none /mnt"), "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no mounts here: {done.stderr.strip()}"
