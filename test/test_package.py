"""What is installed has everything that the source has: files that are read, and not imported, too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "python" / "sglang_warmstart"


def test_every_file_of_the_source_is_installed(tmp_path: Path) -> None:
    # pip builds where the source is.
    for name in ("python", "patches"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-compile", "--target", str(tmp_path / "site"), str(tmp_path)], check=True)
    expected = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith(".pyc")
    }
    installed = tmp_path / "site" / "sglang_warmstart"
    assert expected - {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()} == set()
