"""The patches that are shipped: they fit the SGLang they are for, and the package carries them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from making import GIT_ENVIRONMENT, contents, repository
from running import run
from sglang_warmstart.cli.patches import SHIPPED, patches_in

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def holder(tmp_path: Path) -> Path:
    """A copy of the installed SGLang's own modules, as an unpacked wheel without patches."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    holder = tmp_path / "holder"
    for name in ("__init__.py", "_version.py", "srt"):
        source, target = package / name, holder / "sglang" / name
        target.parent.mkdir(exist_ok=True, parents=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy2(source, target)
    assert run(SHIPPED, "revert", holder).status == 0
    return holder


@pytest.mark.release("0.5.12")
def test_they_apply_to_the_release_and_go_without_a_trace(holder: Path) -> None:
    before = contents(holder)
    visit = run(SHIPPED, "apply", holder)
    assert visit.status == 0
    touched = {
        line.removeprefix("+++ b/")
        for patch in patches_in(SHIPPED / "sglang-0.5.12")
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+++ b/")
    }
    written = contents(holder)
    assert {path for path, content in written.items() if content and before.get(path) != content} <= touched
    assert {path for path in touched if written.get(path) == before.get(path)} == set()
    assert run(SHIPPED, "check", holder).status == 0
    assert run(SHIPPED, "revert", holder).status == 0
    assert contents(holder) == before


@pytest.mark.release("0.5.12")
def test_git_am_makes_the_same_of_them(holder: Path, tmp_path: Path) -> None:
    work = repository(tmp_path / "work", {})
    shutil.copytree(holder, work, dirs_exist_ok=True)
    assert run(SHIPPED, "export", "--out", tmp_path / "out").status == 0
    commands = "git add --all && git commit --quiet --message=base && git am --quiet --whitespace=nowarn ../out/*.patch"
    subprocess.run(commands, shell=True, cwd=work, check=True, env=GIT_ENVIRONMENT)
    assert run(SHIPPED, "apply", holder).status == 0
    assert contents(work) == contents(holder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy: a build leaves its traces."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for name in ("python", "patches"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", directory, source], check=True, capture_output=True, timeout=120)
    (made,) = directory.glob("*.whl")
    return made


def test_a_wheel_carries_them_and_nothing_else_of_their_directory(wheel: Path) -> None:
    prefix = "sglang_warmstart/cli/patches_data/"
    with zipfile.ZipFile(wheel) as archive:
        carried = {name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)}
    shipped = {str(path.relative_to(SHIPPED)) for directory in SHIPPED.glob("sglang-*") for path in directory.iterdir()}
    assert len(shipped) > 1
    assert carried == shipped | ({"NOTICE"} if (SHIPPED / "NOTICE").exists() else set())


def test_an_installed_wheel_lists_them(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import sglang_warmstart; print(sglang_warmstart.__file__);"
        "from sglang_warmstart.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(site), "patches", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60)
    location, title, *_ = done.stdout.splitlines()
    assert Path(location).is_relative_to(site)
    assert title == f"SGLang 0.5.12: {len(patches_in(SHIPPED / 'sglang-0.5.12'))} patches"
