"""Apply patches to a tree of SGLang with ``git apply``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.cli.patch_errors import NO_TREE, PatchesError
from sglang_warmstart.cli.patch_layout import layout_of


def refusal(package: Path, patches: Sequence[Path], *, reverse: bool = False) -> str | None:
    """Why git would not apply these patches, in a line. None if it would.

    Raises:
        PatchesError: git cannot be run.
    """
    if not patches:
        return None
    done = _run(package, patches, reverse, "--check")
    return None if done.returncode == 0 else _complaint(done)


def change(package: Path, patches: Sequence[Path], *, reverse: bool = False) -> None:
    """Apply patches as one: git writes nothing unless all of them fit.

    Raises:
        PatchesError: they do not fit, or a file cannot be written.
    """
    # git removes the old files before it writes the new ones, so a directory that it cannot write to costs files.
    for name in _touched(package, patches):
        directory = (package / name).parent
        while not directory.exists():
            directory = directory.parent
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PatchesError(f"{directory} cannot be written. Nothing was changed")
    done = _run(package, patches, reverse)
    if done.returncode != 0:
        raise PatchesError(f"git apply failed in {package}: {_complaint(done)}")


def _touched(package: Path, patches: Sequence[Path]) -> list[str]:
    lines = os.fsdecode(_run(package, patches, False, "--numstat", "-z").stdout).split("\0")
    return [line.split("\t")[2] for line in lines if line]


def _run(package: Path, patches: Sequence[Path], reverse: bool, *options: str) -> subprocess.CompletedProcess[bytes]:
    # Inside a repository, git apply skips files silently that lie outside of the current directory's part of it, and
    # takes line ends from its settings. With no repository it changes the files that are named, and these only.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_DIR": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    data = b"".join(patch.read_bytes() for patch in patches)
    options = (*layout_of(data).apply, *options, *(["--reverse"] if reverse else []))
    command = ["git", "apply", "--whitespace=nowarn", *options, "-"]
    try:
        return subprocess.run(command, cwd=package, env=environment, input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise PatchesError("git is not installed: the patches are applied with it", NO_TREE) from error
    except OSError as error:
        raise PatchesError(f"git cannot be run ({error.strerror or error})", NO_TREE) from error


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    line = first_line(done.stderr.decode(errors="replace")).removeprefix("error: ")
    return line or f"git ended with status {done.returncode}"
