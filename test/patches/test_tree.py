"""A tree of SGLang is found, and its version told, without a line of it being run."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.confined import run_python
from making import Contents, git, repository, write
from sglang_warmstart.cli import sglang_tree as trees
from sglang_warmstart.cli.patch_errors import NO_TREE, PatchesError

INIT = {"sglang/__init__.py": b"raise RuntimeError('imported')\n", "sglang/srt/a.py": b"1\n"}
VERSION = {"sglang/_version.py": b"version: str\n__version__ = version = '0.5.12'\nraise RuntimeError('run')\n"}
METADATA = {"sglang-0.5.11.dist-info/METADATA": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.11\n\nVersion: 9\n"}
EGG = {"sglang.egg-info/PKG-INFO": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.10\n"}
SDIST = {"PKG-INFO": b"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n"}
OTHER = {"sglang-0.5.12.dist-info/METADATA": b"Version: 0.5.12\n"}
UNTAGGED = {"sglang/_version.py": b'__version__ = version = "0.0.0.dev0"\n'}


def checkout(directory: Path, tag: str | None = "v0.5.12") -> Path:
    """A repository like SGLang's own."""
    repository(directory, {f"python/{name}": content for name, content in INIT.items()})
    if tag is not None:
        git(directory, "tag", tag)
    return directory


@pytest.mark.parametrize("place", ["nothing", "file", "empty", "other", "half"])
def test_what_is_no_tree_is_refused_with_a_line(tmp_path: Path, place: str) -> None:
    write(tmp_path, {"file": b"", "other/sglang/__init__.py": b"", "half/srt/a.py": b""})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchesError, match=str(tmp_path / place)) as caught:
        trees.find(tmp_path / place)
    assert caught.value.status == NO_TREE
    assert "\n" not in str(caught.value)


FIND = """
import sys
from sglang_warmstart.cli import sglang_tree as trees
sys.path = [sys.argv[1], *(path for path in sys.path if not path.endswith("-packages"))]
try: found = trees.find(None); print(found.package, found.version)
except trees.PatchesError as error: print(error)
print([name for name in sys.modules if name.split(".")[0] == "sglang"])
"""


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**INIT, **VERSION}, "{}/sglang 0.5.12"),
        ({"sglang/notes.txt": b""}, "SGLang is not installed here"),
        ({"sglang/__init__.py": b""}, "is not SGLang"),
    ],
    ids=["SGLang", "a directory of that name", "another package of that name"],
)
def test_without_a_place_it_is_the_installed_one_and_it_is_not_imported(
    tmp_path: Path, files: Contents, said: str
) -> None:
    found, imported = run_python(FIND, str(write(tmp_path, files))).splitlines()
    assert said.format(tmp_path) in found
    assert imported == "[]"


def test_the_version_is_that_of_the_nearest_tag_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkout(tmp_path / "ours")
    # A hook of another repository does not matter.
    other = repository(tmp_path / "other", INIT)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert (trees.find(place).version, trees.find(place).told_by) == ("0.5.12", "git describe: v0.5.12")
    git(place, "commit", "--allow-empty", "--message=more")
    git(place, "tag", "gateway-v0.3.1")
    # A version that was built in between is not what the commit is based on.
    write(place / "python", {"sglang/_version.py": b"version = '0.5.13.dev1+g1234567'\n"})
    assert trees.find(place / "python" / "sglang").version == "0.5.12"
    git(place, "tag", "v0.5.12.post1")
    assert trees.find(place).version == "0.5.12.post1"
    monkeypatch.setenv("PATH", "")  # without git the files are asked
    assert trees.find(place).version == "0.5.13.dev1+g1234567"


def test_a_repository_around_a_tree_is_not_asked(tmp_path: Path) -> None:
    project = repository(tmp_path, {"main.py": b"", "vendor/python/sglang/srt/a.py": b""})
    git(project, "tag", "v7.1")
    # In an environment that the project ignores, and in a directory that looks like SGLang's repository.
    for place in (project / ".venv" / "lib" / "site-packages", project / "python"):
        assert trees.find(write(place, {**INIT, **METADATA})).version == "0.5.11"
    assert trees.find(project / "vendor").version is None


@pytest.mark.parametrize("tag", [None, "nightly"])
def test_a_checkout_without_a_tag_of_a_version_has_none(tmp_path: Path, tag: str | None) -> None:
    found = trees.find(checkout(tmp_path, tag))
    assert (found.version, found.told_by) == (None, "")


@pytest.mark.parametrize(
    ("files", "version", "told_by"),
    [
        (SDIST, "0.5.9", "PKG-INFO"),
        (EGG, "0.5.10", "sglang.egg-info/PKG-INFO"),
        (EGG | METADATA, "0.5.11", "sglang-0.5.11.dist-info/METADATA"),
        (EGG | METADATA | VERSION, "0.5.12", "sglang/_version.py"),
        (UNTAGGED, None, ""),  # what a build without tags writes
        (UNTAGGED | METADATA, "0.5.11", "sglang-0.5.11.dist-info/METADATA"),
        (METADATA | OTHER, None, ""),  # of two distributions neither is believed
    ],
)
def test_the_files_are_asked_in_order(files: Contents, version: str | None, told_by: str, tmp_path: Path) -> None:
    found = trees.find(write(tmp_path, {**INIT, **files}))
    assert (found.version, found.told_by) == (version, told_by)


@pytest.mark.parametrize(
    ("version", "same"),
    [("0.5.12", True), ("0.5.12+fork.3", True), ("0.5.12.post1", False), ("0.5.13.dev4", False), ("0.5.1", False)],
)
def test_a_local_part_is_the_same_version(tmp_path: Path, version: str, same: bool) -> None:
    found = trees.find(write(tmp_path, {**INIT, "sglang/_version.py": f"__version__ = '{version}'\n".encode()}))
    assert (found.version, found.is_version("0.5.12")) == (version, same)
