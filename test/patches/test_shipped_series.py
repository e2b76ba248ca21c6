"""The patches that are shipped: they fit the SGLang they are for, and the package carries them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from making import contents, repository
from running import run
from sglang_warmstart.series import series
from sglang_warmstart.series.series import SHIPPED

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
    patches = series.read_version(SHIPPED, "0.5.12").patches
    visit = run(SHIPPED, "apply", holder)
    assert visit.status == 0
    assert [line.split(None, 2)[1:] for line in visit.out.splitlines()[1:-1]] == [
        ["applied", patch.subject] for patch in patches
    ]
    changed = {path for path, content in contents(holder).items() if before.get(path) != content}
    assert changed == {change.path for patch in patches for change in patch.files}
    assert run(SHIPPED, "check", holder).status == 0
    assert run(SHIPPED, "revert", holder).status == 0
    assert contents(holder) == before


@pytest.mark.release("0.5.12")
def test_git_am_makes_the_same_of_them(holder: Path, tmp_path: Path) -> None:
    work = repository(tmp_path / "work", {})
    shutil.copytree(holder, work, dirs_exist_ok=True)
    assert run(SHIPPED, "export", "--out", tmp_path / "out").status == 0
    commands = "git add --all && git commit --quiet --message=base && git am --quiet --whitespace=nowarn ../out/*.patch"
    subprocess.run(commands, shell=True, cwd=work, check=True, env=_environment())
    assert run(SHIPPED, "apply", holder).status == 0
    assert contents(work) == contents(holder)


def _environment() -> dict[str, str]:
    from making import GIT_ENVIRONMENT

    return GIT_ENVIRONMENT


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
    prefix = "sglang_warmstart/series/data/"
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
    newest = next(iter(series.directories(SHIPPED)))
    assert title == f"SGLang {newest}: {len(series.read_version(SHIPPED, newest).patches)} patches"
