"""How each patch of a series stands to a tree is told from the tree's content alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from making import GONE, MODULE, PACKAGE, A, B, Commit, after, contents, git, make_series, numbered, write
from sglang_warmstart.series import series, view
from sglang_warmstart.series import tree as trees
from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.view import Change, Failure, Report, Status

APPLIES, APPLIED, FAILS = Status.APPLIES, Status.APPLIED, Status.FAILS


def examine(holder: Path, root: Path) -> Report:
    return view.examine(trees.find(holder), series.read_version(root, None))


def statuses(report: Report) -> list[Status]:
    return [state.status for state in report.states]


def made(holder: Path, changes: Sequence[Change]) -> dict[str, bytes]:
    """The tree after the changes."""
    files = contents(holder)
    for change in changes:
        assert files.pop(change.path, None) == (change.before.data if change.before else None)
        if change.after is not None:
            files[change.path] = change.after.data
    return files


@pytest.mark.parametrize("there", [steps for n in range(4) for steps in itertools.combinations((1, 2, 3), n)], ids=str)
def test_any_subset_that_is_applied_is_recognised(tmp_path: Path, root: Path, there: tuple[int, ...]) -> None:
    holder = write(tmp_path, after(*there))
    report = examine(holder, root)
    assert statuses(report) == [APPLIED if number in there else APPLIES for number in (1, 2, 3)]
    assert report.ok
    assert made(holder, report.applying) == after(1, 2, 3)
    assert made(holder, report.reverting) == after()


def test_what_git_am_made_is_recognised(tmp_path: Path, root: Path) -> None:
    work = tmp_path / "work"
    git(tmp_path, "clone", "--quiet", str(root / ".work-0.5.12"), str(work))
    git(work, "checkout", "--quiet", "-B", "main", "base")
    patches = sorted((root / "sglang-0.5.12").glob("*.patch"))
    git(work, "am", "--quiet", str(patches[1]))
    assert statuses(examine(work, root)) == [APPLIES, APPLIED, APPLIES]
    git(work, "am", "--quiet", str(patches[0]), str(patches[2]))
    report = examine(work, root)
    assert statuses(report) == [APPLIED] * 3
    assert report.applying == ()


def test_lines_that_have_moved_are_found(holder: Path, root: Path) -> None:
    files = after(2)
    files[A] = numbered(60, _30="line 30\n" + "a fork's\n" * 9)
    write(holder, files)
    report = examine(holder, root)
    assert statuses(report) == [APPLIES, APPLIED, APPLIES]
    changed = made(holder, report.applying)
    assert changed[A] == numbered(60, _10="first", _40="first too", _55="third", _30="line 30\n" + "a fork's\n" * 9)


def test_each_hunk_that_fails_is_named_with_its_first_line_that_is_not_there(holder: Path, root: Path) -> None:
    write(holder, {A: b"above\n" * 4 + numbered(60, _12="theirs", _41="theirs as well"), B: numbered(4)})
    report = examine(holder, root)
    assert statuses(report) == [FAILS, FAILS, APPLIES]
    assert [state.failures for state in report.states] == [
        (
            Failure(A, "another line is there", 1, 16, "line 12"),
            Failure(A, "another line is there", 2, 45, "line 41"),
        ),
        (Failure(B, "the file ends before it", 1, 5, "line 5"),),
        (),
    ]


def test_a_patch_fails_by_files_that_are_not_as_it_needs_them(holder: Path, root: Path) -> None:
    write(holder, {B: None, PACKAGE: b"", MODULE: b"another = 1\n", GONE: b"to be removed\nbut there is more\n"})
    report = examine(holder, root)
    assert statuses(report) == [APPLIES, FAILS, FAILS]
    assert set(report.states[1].failures) == {
        Failure(B, "file is not there"),
        Failure(PACKAGE, "file is already there"),
        Failure(MODULE, "file is already there and different"),
    }
    (failure,) = report.states[2].failures
    assert (failure.path, failure.hunk, failure.reason) == (
        GONE,
        1,
        "its lines are there, but not at the end of the file",
    )


def test_half_a_patch_says_which_half_is_there(holder: Path, root: Path) -> None:
    write(holder, {A: numbered(60, _40="first too")})
    report = examine(holder, root)
    assert statuses(report)[0] is FAILS
    (failure,) = report.states[0].failures
    assert (failure.hunk, failure.expected, failure.reason) == (2, None, "this hunk is applied already")


def test_a_patch_whose_lines_were_changed_since_is_neither(holder: Path, root: Path) -> None:
    write(holder, {**after(1, 2, 3), GONE: None, B: numbered(20, _5="second, and a word more")})
    assert statuses(examine(holder, root)) == [APPLIED, FAILS, APPLIED]


def test_an_empty_file_that_somebody_has_filled_is_not_ours_to_remove(tmp_path: Path, root: Path) -> None:
    report = examine(write(tmp_path, {**after(1, 2, 3), PACKAGE: b"theirs = 1\n"}), root)
    assert statuses(report) == [APPLIED, FAILS, APPLIED]
    assert Failure(PACKAGE, "file is already there and different") in report.states[1].failures
    assert PACKAGE not in {change.path for change in report.reverting}


@pytest.mark.parametrize("what", ["link", "directory", "link above", "file above"])
def test_nothing_but_plain_files_is_patched(holder: Path, root: Path, tmp_path: Path, what: str) -> None:
    place = {"link": B, "directory": B}.get(what, "sglang/srt/added")
    path = holder / place
    path.unlink(missing_ok=True)
    if what == "link":
        (tmp_path / "elsewhere.py").write_bytes(numbered(20))
        path.symlink_to(tmp_path / "elsewhere.py")
    elif what == "link above":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"")
    report = examine(holder, root)
    assert statuses(report) == [APPLIES, FAILS, APPLIES]
    reasons = {failure.reason for failure in report.states[1].failures}
    assert reasons == {
        "link": {"it is a symbolic link"},
        "directory": {"it is not a plain file"},
    }.get(what, {f"{path} is not a plain directory"})


def test_a_file_that_cannot_be_read_is_one_line(holder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind everybody who runs the tests; a name that is too long binds all.
    long = f"sglang/srt/{'x' * 300}.py"
    patch = next((root / "sglang-0.5.12").glob("0001-*"))
    root = write(holder.parent / "other", {"sglang-0.5.12/series": b"one.patch\n"})
    (root / "sglang-0.5.12" / "one.patch").write_bytes(patch.read_bytes().replace(A.encode(), long.encode()))
    with pytest.raises(PatchesError, match=r"cannot be read \(File name too long\)"):
        examine(holder, root)


def test_what_cannot_come_back_to_the_same_lines_stays_where_it_is(tmp_path: Path) -> None:
    # The patch was made for the second of two equal blocks, and somebody applied it there. With lines above, the first
    # block is the nearer one: taken back and applied again, it would land there.
    block = b"1\n2\n3\nold\n4\n5\n6\n"
    changed = block.replace(b"old", b"new")
    other = "sglang/srt/other.py"
    before = {A: b"x\n" * 20 + block + b"z\n" * 20, other: b"old\n"}
    series_of = [Commit({other: b"new\n"}, "one"), Commit({A: b"x\n" * 20 + changed + b"z\n" * 20}, "two")]
    root = make_series(tmp_path / "patches", before, series_of)
    tree = {A: b"x\n" * 19 + block + b"y\n" + changed + b"z\n" * 20, other: b"old\n"}
    holder = write(tmp_path / "holder", tree)
    report = examine(holder, root)
    assert statuses(report) == [APPLIES, APPLIED]
    assert made(holder, report.applying) == {**tree, other: b"new\n"}


def test_bytes_and_modes_are_kept(tmp_path: Path) -> None:
    tool = "sglang/tool"
    before = {A: b"\xe4\r\nb\r\nc\x0cd\r\nno newline", tool: b"#!/bin/sh\n"}
    root = make_series(
        tmp_path / "patches", before, [Commit({A: b"\xe4\r\nB\r\nc\x0cd\r\nnewline\n", tool: b"#!/bin/bash"}, "1")]
    )
    holder = write(tmp_path / "holder", {**before, "sglang/srt/x": b""})
    (holder / tool).chmod(0o755)
    report = examine(holder, root)
    assert {change.path: change.after for change in report.applying} == {
        A: view.File(b"\xe4\r\nB\r\nc\x0cd\r\nnewline\n", False),
        tool: view.File(b"#!/bin/bash", True),
    }
