"""The committed series for the installed SGLang, and a fork that has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kit.release import installed_release, sglang_directory
from making import git, repository
from sglang_warmstart.cli.patch_layout import layout_of
from sglang_warmstart.cli.patches import patches_in

RELEASE = installed_release().version
COMMITTED = Path(__file__).parents[2] / "patches" / f"sglang-{RELEASE}"
SERIES = patches_in(COMMITTED) if COMMITTED.is_dir() else []
LAYOUT = layout_of(b"".join(patch.read_bytes() for patch in SERIES))


@dataclass(frozen=True)
class Fork:
    """A repository with SGLang as released, and the series on it, where the series has its paths.

    Args:
        tree: the repository.
        holder: the directory in it that holds the package.
    """

    tree: Path
    holder: Path

    def at(self, number: int) -> Path:
        """The tree after so many patches: what holds the package."""
        git(self.tree, "checkout", "--quiet", "--force", f"main~{len(SERIES) - number}")
        return self.holder


def make_fork(tree: Path) -> Fork:
    """Make one in an empty directory, with `git am` as a fork does."""
    holder = tree if LAYOUT.am_in_repository else tree / "python"
    # With what Python has compiled: a process that imports the copy starts in half the time.
    shutil.copytree(sglang_directory(), holder / "sglang")
    repository(tree, {".gitignore": b"__pycache__/\n"})
    git(tree, "am", "--quiet", *map(str, SERIES))
    return Fork(tree, holder)
