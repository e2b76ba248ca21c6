"""Write the series: each patch is a commit on a pristine SGLang, formatted by git."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wiring.commit import Commit
from wiring.edits import changed
from wiring.places import placed_path, placed_source

VERSION = "0.5.12"
AUTHOR, EMAIL = "sglang-warmstart", "maintainers@sglang-warmstart.example"
DATE = "2026-11-24T12:00:00+00:00"

_HEADER = f"""\
# Applies to SGLang {VERSION}, in this order. In an unpacked wheel:       git am *.patch
#                                        in SGLang's own repository:  git am --directory=python *.patch
"""
# Nobody's own settings of git show in what it writes.
_GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": AUTHOR,
    "GIT_AUTHOR_EMAIL": EMAIL,
    "GIT_AUTHOR_DATE": DATE,
    "GIT_COMMITTER_NAME": AUTHOR,
    "GIT_COMMITTER_EMAIL": EMAIL,
    "GIT_COMMITTER_DATE": DATE,
    "LC_ALL": "C",
}
_FORMAT = ("--zero-commit", "--no-signature", "--full-index", "--no-renames", "--diff-algorithm=myers", "--unified=3")


def build(commits: Sequence[Commit], pristine: Path, out: Path) -> list[Path]:
    """Write the patches and their series file.

    Args:
        commits: in their order.
        pristine: the directory that has the package ``sglang`` as released.
        out: where to; made if needed.

    Returns:
        What was written.

    Raises:
        StandsAsideError: an edit does not fit this SGLang.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, "tree")
        tree.mkdir()
        _git(tree, "init", "--quiet", "--initial-branch=main")
        for path in sorted({path for commit in commits for path in commit.changes}):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes((pristine / path).read_bytes())
        _commit(tree, f"SGLang {VERSION}")
        for commit in commits:
            _carry_out(commit, tree)
            _commit(tree, commit.text)
        written = _git(tree, "format-patch", *_FORMAT, "--output-directory", str(out), f"-{len(commits)}").splitlines()
    series = out / "series"
    series.write_text(_HEADER + "".join(f"{Path(each).name}\n" for each in written), encoding="utf-8")
    return [*map(Path, written), series]


def _carry_out(commit: Commit, tree: Path) -> None:
    added = {placed_path(module): placed_source(module) for module in commit.modules} | dict(commit.files)
    for path, text in added.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text, encoding="utf-8")
    for path, changes in commit.changes.items():
        before = (tree / path).read_text(encoding="utf-8")
        (tree / path).write_text(changed(before, changes, path), encoding="utf-8")


def _commit(tree: Path, message: str) -> None:
    _git(tree, "add", "--all")
    _git(tree, "commit", "--quiet", "--cleanup=verbatim", "--message", message)


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=tree, env={**os.environ, **_GIT}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"git {arguments[0]} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
