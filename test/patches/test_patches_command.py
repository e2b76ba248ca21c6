"""`patches check`, `apply`, `revert` and `export` on trees of every kind, with the real git."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from making import (
    BEFORE,
    A,
    B,
    Contents,
    after,
    contents,
    git,
    in_repository,
    make_series,
    numbered,
    repository,
    run,
    write,
)


def nested(tmp_path: Path, ignored: bool) -> Path:
    """A site-packages directory inside somebody's repository."""
    work = repository(tmp_path / "project", {".gitignore": b".venv/\n" if ignored else b""})
    write(work / ".venv" / "site-packages", BEFORE)
    return work / ".venv" / "site-packages"


def place(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """A tree: what the user names, and the directory that holds the package."""
    if kind == "checkout":
        work = repository(tmp_path / "checkout", {f"python/{name}": content for name, content in BEFORE.items()})
        git(work, "tag", "v0.5.12")
        git(work, "config", "core.autocrlf", "true")
        return work, work / "python"
    if kind == "wheel in a repository":
        work = repository(tmp_path / "wheel", BEFORE)
        return work, work
    holder = nested(tmp_path, ignored=True) if kind == "ignored" else write(tmp_path / "holder", BEFORE)
    if kind == "not ignored":
        holder = nested(tmp_path, ignored=False)
    if kind == "linked":
        (holder / "sglang").rename(holder / "sglang-fork")
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sglang").symlink_to(holder / "sglang-fork")
        return tmp_path / "site", tmp_path / "site"
    return (holder / "sglang" if kind == "package" else holder), holder


def content_of(holder: Path) -> dict[str, bytes]:
    """The files of the package, found through a link too."""
    return {f"sglang/{name}": content for name, content in contents((holder / "sglang").resolve()).items()}


@pytest.fixture(params=["root", "upstream_root"])
def each_layout(request: pytest.FixtureRequest) -> Path:
    """A series of either layout."""
    root: Path = request.getfixturevalue(request.param)
    return root


@pytest.mark.parametrize(
    "kind", ["wheel", "package", "linked", "checkout", "wheel in a repository", "ignored", "not ignored"]
)
def test_each_kind_of_tree_is_patched_and_put_back(kind: str, each_layout: Path, tmp_path: Path) -> None:
    named, holder = place(kind, tmp_path)
    root = each_layout
    assert "3 patches apply, 0 are applied" in run(root, "check", named).out
    assert "3 patches would be applied" in run(root, "apply", named, "--dry-run").out
    assert content_of(holder) == BEFORE
    assert "3 patches applied" in run(root, "apply", named).out
    assert content_of(holder) == after(3)
    assert "0 patches apply, 3 are applied" in run(root, "check", named).out
    again = run(root, "apply", named)
    assert (again.status, "applied already, nothing to do" in again.out) == (0, True)
    assert "3 patches reverted" in run(root, "revert", named).out
    assert content_of(holder) == BEFORE
    assert not (holder / "sglang" / "srt" / "added").exists()
    assert not list(named.rglob("test_a.py"))  # SGLang's own tests are for its repository
    again = run(root, "revert", named)
    assert (again.status, "no patch is applied, nothing to do" in again.out) == (0, True)


def test_it_goes_on_where_the_first_patches_are_applied(root: Path, holder: Path) -> None:
    write(holder, after(1))
    states = [each["state"] for each in json.loads(run(root, "check", holder, "--json").out)["patches"]]
    assert states == ["applied", "applies", "applies"]
    assert "2 patches applied" in run(root, "apply", holder).out
    assert contents(holder) == after(3)


def test_a_fork_with_another_line_is_refused_and_nothing_is_changed(each_layout: Path, holder: Path) -> None:
    write(holder, {A: numbered(60, _55="the fork's")})
    before = contents(holder)
    for action in ("check", "apply"):
        visit = run(each_layout, action, holder)
        assert (visit.status, visit.out) == (1, "")
        assert "(patch failed: srt/a.py:52). Nothing was changed\n" in visit.err
        assert visit.err.count("\n") == 1
    assert contents(holder) == before


def test_a_patched_line_that_was_changed_since_is_not_taken_back(root: Path, holder: Path) -> None:
    run(root, "apply", holder)
    write(holder, {B: numbered(20, _5="changed since")})
    before = contents(holder)
    assert run(root, "revert", holder).status == 1
    assert contents(holder) == before


def test_another_version_is_refused_unless_it_is_named(root: Path, holder: Path) -> None:
    write(holder, {"sglang/_version.py": b"__version__ = version = '0.5.13'\n"})
    before = contents(holder)
    visit = run(root, "apply", holder)
    assert (visit.status, visit.out) == (2, "")
    assert "there are patches for 0.5.12 only. Nothing was changed" in visit.err
    assert contents(holder) == before
    assert "3 patches applied" in run(root, "apply", holder, "--version", "0.5.12").out
    assert "no patches for SGLang 9" in run(root, "check", holder, "--version", "9").err


VERSIONS = ("0.5.12", "0.5.23")


@pytest.fixture(scope="module")
def two_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of two versions a series. Next to a line that they change, the newer one has another line."""
    root = tmp_path_factory.mktemp("two series")
    make_series(root, VERSIONS[0])
    return make_series(root, VERSIONS[1], place=lambda files: in_repository(newer(files)))


def newer(files: Contents) -> Contents:
    """The files in the newer version."""
    return {name: content and content.replace(b"line 54\n", b"newer line 54\n") for name, content in files.items()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "found by git"])
def test_of_several_series_a_tree_gets_that_of_its_version(
    version: str, told: bool, two_series: Path, tmp_path: Path
) -> None:
    of_version = newer if version == VERSIONS[1] else dict
    written = f"__version__ = '{version if told else '0.0.0'}'\n".encode()  # 0.0.0: built without tags
    tree = write(tmp_path, {**of_version(BEFORE), "sglang/_version.py": written})
    assert "3 patches applied" in run(two_series, "apply", tree).out
    assert contents(tree)[A] == of_version(after(3))[A]
    assert json.loads(run(two_series, "check", tree, "--json").out)["refusal"] is None


def test_a_tree_between_two_series_is_refused_in_a_line(two_series: Path, tmp_path: Path) -> None:
    tree = write(tmp_path, {**BEFORE, "sglang/_version.py": b"__version__ = '0.5.20'\n"})
    before = contents(tree)
    visit = run(two_series, "apply", tree)
    assert (visit.status, visit.out, visit.err.count("\n")) == (2, "", 1)
    assert "there are patches for 0.5.23, 0.5.12 only" in visit.err
    visit = run(two_series, "apply", tree, "--version", "0.5.23")
    assert (visit.status, visit.out, visit.err.count("\n")) == (1, "", 1)
    assert "the patches for 0.5.23 do not apply (" in visit.err
    assert contents(tree) == before


def test_without_git_one_line_says_so(
    root: Path, holder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for action in ("check", "apply", "revert"):
        visit = run(root, action, holder)
        assert (visit.status, visit.out) == (2, "")
        assert visit.err == "git is not installed: the patches are applied with it\n"


def test_a_repository_named_in_the_environment_is_not_touched(
    root: Path, holder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repository(tmp_path / "other", {"sglang/srt/a.py": b"other\n"})
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert run(root, "apply", holder).status == 0
    assert contents(holder) == after(3)
    assert contents(other) == {"sglang/srt/a.py": b"other\n"}


def test_a_directory_that_cannot_be_written_is_told_before_any_file_goes(
    root: Path, holder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the answer of the system is given here.
    before, closed = contents(holder), holder / "sglang" / "srt"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    visit = run(root, "apply", holder)
    assert (visit.status, visit.err) == (1, f"{closed} cannot be written. Nothing was changed\n")
    assert contents(holder) == before


def test_a_list_that_names_a_missing_patch_is_a_line(holder: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", {"sglang-0.5.12/series": b"0001-gone.patch\n"})
    visit = run(broken, "check", holder)
    assert (visit.status, visit.err.count("\n")) == (1, 1)
    assert "names 0001-gone.patch, which is not there" in visit.err
    assert run(tmp_path / "nothing", "list").status == 1


def test_they_are_listed(root: Path) -> None:
    assert run(root, "list").out.splitlines() == ["SGLang 0.5.12: 3 patches", *(f"  {n}  Step {n}" for n in (1, 2, 3))]
    (listed,) = json.loads(run(root, "list", "--json").out)
    assert [each["subject"] for each in listed["patches"]] == ["Step 1", "Step 2", "Step 3"]


def test_what_is_exported_git_am_takes_as_the_command_says(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "not there yet" / "out"
    for _ in range(2):  # and again, over the same files
        visit = run(root, "export", "--out", out)
        assert visit.status == 0
    assert contents(out) == {**contents(root / "sglang-0.5.12"), "NOTICE": b"a notice\n"}
    wheel = repository(tmp_path / "wheel", BEFORE)
    checkout = repository(tmp_path / "checkout", {f"python/{name}": content for name, content in BEFORE.items()})
    # As printed, in the shell that fills in the names.
    for work, line in zip((wheel, checkout), visit.out.splitlines()[1:], strict=True):
        git(work, "-c", f"alias.do=!{line.partition(':')[2].strip()} --quiet", "do")
        assert contents(work if work is wheel else work / "python") == after(3)
        assert "0 patches apply, 3 are applied already" in run(root, "check", work).out


def test_of_patches_with_tests_the_repository_gets_the_tests(upstream_root: Path, tmp_path: Path) -> None:
    visit = run(upstream_root, "export", "--out", tmp_path / "out")
    wheel = repository(tmp_path / "wheel", BEFORE)
    checkout = repository(tmp_path / "checkout", in_repository(BEFORE))
    for work, line in zip((wheel, checkout), visit.out.splitlines()[1:], strict=True):
        git(work, "-c", f"alias.do=!{line.partition(':')[2].strip()} --quiet", "do")
    assert contents(wheel) == after(3)
    assert contents(checkout) == in_repository(after(3))


def test_an_export_that_cannot_be_written_is_a_line_and_leaves_what_was_there(root: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"NOTICE": b"another notice\n"})
    visit = run(root, "export", "--out", out)
    assert (visit.status, visit.out) == (1, "")
    assert visit.err == f"{out}/NOTICE is there with other content, nothing was written: name an empty directory\n"
    assert contents(out) == {"NOTICE": b"another notice\n"}
    visit = run(root, "export", "--out", out / "NOTICE" / "out")
    assert (visit.status, visit.err) == (1, f"{out}/NOTICE/out cannot be written (Not a directory)\n")


def test_the_newest_version_is_exported_unless_one_is_named(tmp_path: Path) -> None:
    for version in ("0.5.12", "0.5.9"):
        make_series(tmp_path, version)
    for version, named in (("0.5.12", ()), ("0.5.9", ("--version", "0.5.9"))):
        assert f"files for SGLang {version} are in" in run(tmp_path, "export", "--out", tmp_path / version, *named).out
