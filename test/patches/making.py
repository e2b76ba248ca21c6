"""Trees and series of patches for the tests, made by real git, and the command, run in this process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_warmstart.cli import app
from typer.testing import CliRunner

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
ADDED = "sglang/srt/added/deep/module.py"
UPSTREAM_TEST = "test/registered/unit/test_a.py"
BEFORE = {
    A: numbered(60),
    B: numbered(20),
    GONE: b"to be removed\n",
    "sglang/__init__.py": b"raise RuntimeError('SGLang is not to be imported')\n",
    "sglang/_version.py": b"__version__ = version = '0.5.12'\n",
}
# What each of three patches does.
STEPS: tuple[Contents, ...] = (
    {A: numbered(60, _10="first", _40="first too")},
    {B: numbered(20, _5="second"), ADDED: b"added = 1\n"},
    {A: numbered(60, _10="first", _40="first too", _55="third"), GONE: None},
)


def after(count: int) -> dict[str, bytes]:
    """The files after so many of the patches."""
    files: dict[str, bytes | None] = dict(BEFORE)
    for step in STEPS[:count]:
        files |= step
    return {name: content for name, content in files.items() if content is not None}


def write(directory: Path, files: Contents) -> Path:
    """Write files, or remove them. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if content is None else path.write_bytes(content)
    return directory


def repository(directory: Path, files: Contents) -> Path:
    """A new repository with one commit, of these files and of what is there."""
    write(directory, files)
    git(directory, "init", "--quiet", "--initial-branch=main")
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--allow-empty", "--message=base")
    git(directory, "tag", "base")
    return directory


def in_repository(files: Contents) -> dict[str, bytes | None]:
    """The files as SGLang's own repository has them, with a test beside them that knows how many lines `A` has."""
    placed = {f"python/{name}": content for name, content in files.items()}
    return placed | {UPSTREAM_TEST: b"%d\n" % len(files.get(A) or b"")}


def make_series(root: Path, version: str = "0.5.12", place: Callable[[Contents], Contents] = dict) -> Path:
    """Write the three patches as they are shipped. Returns the root, for `patches --series`.

    Args:
        place: where the repository has the files that they are made from.
    """
    work = repository(root / f".work-{version}", place(BEFORE))
    for number, files in enumerate(STEPS, 1):
        write(work, place(files))
        git(work, "add", "--all")
        git(work, "commit", "--quiet", f"--message=Step {number}")
    out = root / f"sglang-{version}"
    made = git(work, "format-patch", f"--output-directory={out}", "--no-renames", "base..main")
    listed = "".join(f"{Path(name).name}\n" for name in made.decode().splitlines())
    write(out, {"series": f"# the patches for {version}\n\n{listed}".encode()})
    return root


def module_of(path: Path, name: str) -> Any:
    """A module of SGLang from another place, beside the installed one."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a tree. Of git's own directory nothing."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


@dataclass(frozen=True)
class Visit:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


def run(root: Path, *arguments: str | Path) -> Visit:
    """Run `sglang-warmstart patches` with the series of `root`."""
    result = CliRunner().invoke(app, ["patches", "--series", str(root), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Visit(result.exit_code, result.stdout, result.stderr)
