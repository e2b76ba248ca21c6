"""A tree of SGLang is found, and its version told, without a line of it being run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.confined import run_python
from making import git, repository, write
from sglang_warmstart.cli import sglang_tree as trees
from sglang_warmstart.cli.patch_errors import NO_TREE, PatchesError

INIT = {"sglang/__init__.py": b"raise RuntimeError('imported')\n", "sglang/srt/a.py": b"1\n"}
_VERSION = {"sglang/_version.py": b"version: str\n__version__ = version = '0.5.12'\nraise RuntimeError('run')\n"}
METADATA = {"sglang-0.5.11.dist-info/METADATA": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.11\n\nVersion: 9\n"}
EGG = {"sglang.egg-info/PKG-INFO": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.10\n"}
SDIST = {"PKG-INFO": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n"}


def checkout(directory: Path, tag: str | None = "v0.5.12") -> Path:
    """A repository like SGLang's own."""
    repository(directory, {f"python/{name}": content for name, content in INIT.items()})
    if tag is not None:
        git(directory, "tag", tag)
    return directory


def test_each_kind_of_tree_is_found(tmp_path: Path) -> None:
    source = write(tmp_path / "source" / "python", INIT).parent
    wheel = write(tmp_path / "wheel", INIT)
    for place, package in [
        (source, source / "python" / "sglang"),
        (source / "python", source / "python" / "sglang"),
        (wheel, wheel / "sglang"),
        (wheel / "sglang", wheel / "sglang"),
        (wheel / "sglang" / "srt" / "..", wheel / "sglang"),
    ]:
        found = trees.find(place)
        assert (found.package, found.holder) == (package, package.parent)
        assert found.locate("sglang/srt/a.py") == package / "srt" / "a.py"


def test_a_link_to_a_package_leads_to_where_it_is(tmp_path: Path) -> None:
    write(tmp_path / "real", INIT)
    (tmp_path / "real" / "sglang").rename(tmp_path / "real" / "sglang-fork")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sglang").symlink_to(tmp_path / "real" / "sglang-fork")
    found = trees.find(tmp_path / "site")
    assert found.package == tmp_path / "real" / "sglang-fork"
    assert found.locate("sglang/srt/a.py").read_bytes() == b"1\n"


@pytest.mark.parametrize("place", ["nothing", "file", "empty", "other", "half"])
def test_what_is_no_tree_is_refused_with_a_line_that_says_what_is_one(tmp_path: Path, place: str) -> None:
    write(tmp_path, {"file": b"", "other/sglang/__init__.py": b"", "half/srt/a.py": b""})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchesError, match=str(tmp_path / place)) as caught:
        trees.find(tmp_path / place)
    assert caught.value.status == NO_TREE
    assert "\n" not in str(caught.value)


LOAD = "from sglang_warmstart.cli import sglang_tree as tree\n"
FIND = LOAD + "found = tree.find(None); print(found.package, found.version)"


def test_without_a_place_it_is_the_installed_one_and_it_is_not_imported(tmp_path: Path) -> None:
    write(tmp_path / "site", {**INIT, **_VERSION})
    said = run_python(FIND, environment={"PYTHONPATH": str(tmp_path / "site")})
    assert said.split() == [str(tmp_path / "site" / "sglang"), "0.5.12"]


@pytest.mark.parametrize(
    ("files", "said"),
    [({"sglang/notes.txt": b""}, "SGLang is not installed here"), ({"sglang/__init__.py": b""}, "is not SGLang")],
    ids=["a directory of that name", "another package of that name"],
)
def test_without_an_installed_one_it_says_what_to_do(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    write(tmp_path / "site", files)
    # No site-packages: the one of the tests has an SGLang.
    elsewhere = "import sys; sys.path = [path for path in sys.path if not path.endswith('-packages')]\n"
    code = LOAD + elsewhere + FIND.removeprefix(LOAD)
    with pytest.raises(RuntimeError, match=f"PatchesError: .*{said}"):
        run_python(code, environment={"PYTHONPATH": f"{tmp_path / 'site'}:{_package_path()}"})


def _package_path() -> str:
    """Where this package and what it imports are, under a name that the code above leaves alone."""
    import sglang_warmstart

    return str(Path(sglang_warmstart.__file__).parents[1])


def test_the_version_is_that_of_the_nearest_tag_of_a_checkout(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    assert (trees.find(place).version, trees.find(place).told_by) == ("0.5.12", "git describe: v0.5.12")
    git(place, "commit", "--allow-empty", "--message=more")
    git(place, "tag", "gateway-v0.3.1")
    found = trees.find(place)
    assert found.version == "0.5.12"
    assert found.told_by.startswith("git describe: v0.5.12-1-g")
    # A version that was built in between is not what the commit is based on.
    write(place / "python", {"sglang/_version.py": b"version = '0.5.13.dev1+g1234567'\n"})
    assert trees.find(place / "python" / "sglang").version == "0.5.12"
    git(place, "tag", "v0.5.12.post1")
    assert trees.find(place).version == "0.5.12.post1"


def test_a_hook_of_another_repository_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path / "ours")
    other = repository(tmp_path / "other", INIT)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert trees.find(tmp_path / "ours").version == "0.5.12"


def test_a_repository_around_a_tree_is_not_asked(tmp_path: Path) -> None:
    project = repository(tmp_path, {"main.py": b"", "vendor/python/sglang/srt/a.py": b""})
    git(project, "tag", "v7.1")
    # In an environment that the project ignores, and in a directory that looks like SGLang's repository.
    site = write(project / ".venv" / "lib" / "site-packages", {**INIT, **METADATA})
    untracked = write(project / "python", {**INIT, **METADATA})
    for place in (site, untracked):
        assert trees.find(place).version == "0.5.11"
    assert trees.find(project / "vendor").version is None


@pytest.mark.parametrize("tag", [None, "nightly"])
def test_a_checkout_without_a_tag_of_a_version_has_none(tmp_path: Path, tag: str | None) -> None:
    found = trees.find(checkout(tmp_path, tag))
    assert (found.version, found.told_by) == (None, "")


def test_without_git_the_files_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkout(tmp_path)
    write(place / "python", _VERSION | {"sglang/_version.py": b"version = '0.5.13.dev4+g1234567'\n"})
    monkeypatch.setenv("PATH", "")
    assert trees.find(place).version == "0.5.13.dev4+g1234567"


def test_the_files_are_asked_in_order(tmp_path: Path) -> None:
    for version, told_by, files in [
        ("0.5.9", "PKG-INFO", SDIST),
        ("0.5.10", "sglang.egg-info/PKG-INFO", EGG),
        ("0.5.11", "sglang-0.5.11.dist-info/METADATA", METADATA),
        ("0.5.12", "sglang/_version.py", _VERSION),
    ]:
        if files is EGG:
            (tmp_path / "PKG-INFO").unlink()
        write(tmp_path, {**INIT, **files})
        found = trees.find(tmp_path)
        assert (found.version, found.told_by) == (version, told_by)


def test_what_a_build_without_tags_writes_is_no_version(tmp_path: Path) -> None:
    write(tmp_path, {**INIT, "sglang/_version.py": b'__version__ = version = "0.0.0.dev0"\n'})
    assert trees.find(tmp_path).version is None
    write(tmp_path, METADATA)
    assert trees.find(tmp_path).version == "0.5.11"


def test_of_two_distributions_neither_is_believed(tmp_path: Path) -> None:
    write(tmp_path, {**INIT, **METADATA, "sglang-0.5.12.dist-info/METADATA": b"Version: 0.5.12\n"})
    assert trees.find(tmp_path).version is None


@pytest.mark.parametrize(
    ("version", "same"),
    [("0.5.12", True), ("0.5.12+fork.3", True), ("0.5.12.post1", False), ("0.5.13.dev4", False), ("0.5.1", False)],
)
def test_a_local_part_is_the_same_version(tmp_path: Path, version: str, same: bool) -> None:
    write(tmp_path, {**INIT, "sglang/_version.py": f"__version__ = '{version}'\n".encode()})
    found = trees.find(tmp_path)
    assert found.version == version
    assert found.is_version("0.5.12") is same


def test_no_module_of_sglang_is_loaded_by_the_command_line() -> None:
    code = "import sys, sglang_warmstart.cli; print([name for name in sys.modules if name.split('.')[0] == 'sglang'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
