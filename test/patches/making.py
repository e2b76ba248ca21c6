"""Trees and series of patches for the tests, made by real git."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Content by path; None removes the file. Paths are relative to the directory that holds `sglang`.
Contents = Mapping[str, bytes | None]

# Nothing of the user's own configuration or of a repository around the tests.
GIT_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **{f"GIT_{role}_{part}": "t@t" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
}


def git(directory: Path, *arguments: str) -> bytes:
    """What git prints."""
    return subprocess.run(
        ["git", *arguments], cwd=directory, env=GIT_ENVIRONMENT, check=True, capture_output=True
    ).stdout


def numbered(count: int, **lines: str) -> bytes:
    """A file of `line 1` and so on; `_4="x"` makes line 4 another one."""
    return "".join(f"{lines.get(f'_{number}', f'line {number}')}\n" for number in range(1, count + 1)).encode()


A, B, GONE = "sglang/srt/a.py", "sglang/srt/b.py", "sglang/srt/gone.py"
PACKAGE, MODULE = "sglang/srt/added/__init__.py", "sglang/srt/added/deep/module.py"
BEFORE: Contents = {
    A: numbered(60),
    B: numbered(20),
    GONE: b"to be removed\n",
    "sglang/__init__.py": b"raise RuntimeError('SGLang is not to be imported')\n",
    "sglang/_version.py": b"version: str\n__version__ = version = '0.5.12'\n__version_tuple__ = (0, 5, 12)\n",
}
# What each of three patches does: lines of the first file, and other files.
LINES = ({"_10": "first", "_40": "first too"}, {}, {"_55": "third"})
FILES: Sequence[Contents] = ({}, {B: numbered(20, _5="second"), PACKAGE: b"", MODULE: b"added = 1\n"}, {GONE: None})


def after(*steps: int) -> dict[str, bytes]:
    """The files after some of the steps, by their numbers."""
    files, lines = dict(BEFORE), {}
    for step in steps:
        files |= FILES[step - 1]
        lines |= LINES[step - 1]
    files[A] = numbered(60, **lines)
    return {name: content for name, content in files.items() if content is not None}


@dataclass(frozen=True)
class Commit:
    """One commit of a series."""

    files: Contents
    message: str


def steps() -> list[Commit]:
    """The three steps, one on the other, with messages that only say which one it is."""
    return [Commit({**FILES[number - 1], A: after(*range(1, number + 1))[A]}, f"Step {number}") for number in (1, 2, 3)]


def write(directory: Path, files: Contents) -> Path:
    """Write files, or remove them. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return directory


def repository(directory: Path, files: Contents) -> Path:
    """A new repository with one commit."""
    write(directory, files)
    git(directory, "init", "--quiet", "--initial-branch=main")
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--allow-empty", "--message=base")
    git(directory, "tag", "base")
    return directory


def make_series(
    root: Path, before: Contents = BEFORE, series: Sequence[Commit] | None = None, version: str = "0.5.12"
) -> Path:
    """Write a series as it is shipped, made by `git format-patch`.

    Returns:
        The root, for `patches --series`.
    """
    work = repository(root / f".work-{version}", before)
    for commit in steps() if series is None else series:
        write(work, commit.files)
        git(work, "add", "--all")
        git(work, "commit", "--quiet", "--allow-empty", f"--message={commit.message}")
    out = root / f"sglang-{version}"
    made = git(work, "format-patch", f"--output-directory={out}", "--text", "--no-renames", "base..main")
    listed = "".join(f"{Path(name).name}\n" for name in made.decode().splitlines())
    (out / "series").write_text(f"# the patches for {version}\n\n{listed}")
    return root


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a tree. Of git's own directory nothing."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """All of a tree that must not change unasked: names, modes, and of files times and bytes."""
    found = {}
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            found[str(path)] = (status.st_mode, 0, b"")
        else:
            found[str(path)] = (status.st_mode, status.st_mtime_ns, path.read_bytes())
    return found
