"""Run a piece of Python where the disk is small, read-only or otherwise not as it should be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from kit.environment import python_path


def run_python(
    code: str,
    *arguments: str,
    prefix: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a piece of Python prints in a process of its own.

    Args:
        code, arguments: what to run.
        prefix: the beginning of the command.
        options: of Python.
        environment: laid over that of the tests. Without a PYTHONPATH in it, the tests' own modules are found.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(Path(__file__).parents[1]), **(environment or {})}
    command = [*prefix, sys.executable, *options, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"it ended with status {done.returncode}: {done.stderr}")
    return done.stdout


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
