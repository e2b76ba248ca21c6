"""`sglang-warmstart patches` as an operator runs it: a process, its exit status, and what it prints."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from making import BEFORE, GONE, MODULE, PACKAGE, A, B, Commit, after, contents, git, make_series, numbered, write
from running import COMMAND, end, run, start

UPSTREAM = "https://github.com/sgl-project/sglang/pull/12345"


def in_terminal(columns: int, *command: str | Path) -> tuple[int, str]:
    """Exit status and output of a command in a terminal, without colours."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [COMMAND, *map(str, command)], env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    pieces = []
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # how the end of a terminal's output looks on Linux
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(master)
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    assert "\x1b[" in text, "it has no colours"
    return process.wait(60), re.sub(r"\x1b\[[0-9;]*m", "", text)


# check


def test_check_says_how_each_patch_stands(holder: Path, root: Path) -> None:
    visit = end(start(root, "check", write(holder, {**after(1), B: numbered(20, _4="a fork's")})))
    assert visit.out.splitlines() == [
        f"SGLang 0.5.12 (sglang/_version.py) in {holder}/sglang:",
        "  1  already applied  Step 1",
        "  2  does not apply   Step 2",
        "     sglang/srt/b.py: hunk 1, line 4: expected `line 4`, another line is there",
        "  3  applies          Step 3",
        "3 patches: 1 applies, 1 is applied already, 1 does not apply.",
    ]
    assert (visit.status, visit.err) == (1, "")


def test_check_ends_with_0_if_each_patch_applies_or_is_applied(holder: Path, root: Path) -> None:
    before = contents(holder)
    for there, said in [
        ((), "3 apply."),
        ((1,), "2 apply, 1 is applied already."),
        ((1, 2, 3), "3 are applied already."),
    ]:
        write(holder, {**after(*there), **({GONE: b""} if 3 in there else {})})
        if 3 in there:
            (holder / GONE).unlink()
        visit = run(root, "check", holder)
        assert (visit.status, visit.out.splitlines()[-1]) == (0, f"3 patches: {said}")
    assert before == BEFORE


def test_check_for_machines(holder: Path, root: Path) -> None:
    write(holder, {**after(1), B: numbered(20, _4="\\[red]ä"), MODULE: b"mine\n"})
    visit = end(start(root, "check", "--json", holder))
    report = json.loads(visit.out)
    assert (visit.status, report["ok"]) == (1, False)
    assert (report["tree"], report["version"], report["series"]) == (f"{holder}/sglang", "0.5.12", "0.5.12")
    assert [each["status"] for each in report["patches"]] == ["already applied", "does not apply", "applies"]
    assert report["patches"][1] == {
        "number": 2,
        "file": "0002-Step-2.patch",
        "subject": "Step 2",
        "status": "does not apply",
        "failures": [
            {
                "file": MODULE,
                "hunk": None,
                "line": None,
                "expected": None,
                "reason": "file is already there and different",
            },
            {"file": B, "hunk": 1, "line": 4, "expected": "line 4", "reason": "another line is there"},
        ],
    }
    (holder / MODULE).unlink()
    write(holder, {B: BEFORE[B]})
    visit = run(root, "check", "--json", holder)
    assert (visit.status, json.loads(visit.out)["ok"]) == (0, True)


@pytest.mark.parametrize("columns", [80, 160])
def test_in_a_terminal_it_is_a_table(columns: int, holder: Path, root: Path) -> None:
    write(holder, {**after(1), B: numbered(20, _5="a fork's"), "sglang/srt/added/deep": b""})
    status, text = in_terminal(columns, "patches", "--series", root, "check", holder)
    assert status == 1
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│")]
    assert rows == [["1", "already applied", "Step 1"], ["2", "does not apply", "Step 2"], ["3", "applies", "Step 3"]]
    lines = text.splitlines()
    # Never folded, so that it can be searched and copied.
    assert "     sglang/srt/b.py: hunk 1, line 5: expected `line 5`, another line is there" in lines
    assert f"     {MODULE}: {holder}/sglang/srt/added/deep is not a plain directory" in lines
    assert lines[-1] == "3 patches: 1 applies, 1 is applied already, 1 does not apply."


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    root = make_series(
        tmp_path / "patches", {A: b"[red]\n"}, [Commit({A: b"[bold]\n"}, "x: [red]is[/red] no [colour]")]
    )
    holder = write(tmp_path / "holder", {A: b"[/]\n"})
    status, text = in_terminal(100, "patches", "--series", root, "check", holder)
    assert status == 1
    assert "x: [red]is[/red] no [colour]" in text
    assert "expected `[red]`" in text


# apply and revert


def test_apply_and_revert_say_what_they_did(holder: Path, root: Path) -> None:
    write(holder, after(2))
    visit = end(start(root, "apply", holder))
    assert (visit.status, visit.err) == (0, "")
    assert visit.out.splitlines() == [
        f"SGLang 0.5.12 (sglang/_version.py) in {holder}/sglang:",
        "  1  applied          Step 1",
        "  2  already applied  Step 2",
        "  3  applied          Step 3",
        "2 patches applied (files: 1 changed, 1 removed).",
    ]
    assert contents(holder) == after(1, 2, 3)
    visit = run(root, "apply", holder)
    assert visit.status == 0
    assert visit.out == (
        f"SGLang 0.5.12 (sglang/_version.py) in {holder}/sglang: "
        "all of the 3 patches are applied already, nothing to do.\n"
    )
    visit = end(start(root, "revert", holder))
    assert visit.status == 0
    assert [line.split()[1] for line in visit.out.splitlines()[1:-1]] == ["reverted"] * 3
    assert visit.out.splitlines()[-1] == "3 patches reverted (files: 2 changed, 1 added, 2 removed)."
    assert contents(holder) == BEFORE
    visit = run(root, "revert", holder)
    assert visit.status == 0
    assert visit.out.endswith("none of the 3 patches is applied, nothing to do.\n")


def test_what_git_am_applied_can_be_reverted(tmp_path: Path, root: Path) -> None:
    work = tmp_path / "work"
    git(tmp_path, "clone", "--quiet", "--branch=base", str(root / ".work-0.5.12"), str(work))
    run(root, "export", "--out", tmp_path / "out")
    git(work, "am", "--quiet", str(tmp_path / "out" / "0001-Step-1.patch"))
    visit = run(root, "revert", work)
    assert visit.out.splitlines()[1:] == [
        "  1  reverted     Step 1",
        "  2  not applied  Step 2",
        "  3  not applied  Step 3",
        "1 patch reverted (files: 1 changed).",
    ]
    assert contents(work) == BEFORE


# Which tree, and which series


@pytest.mark.parametrize("version", ["0.5.12.post1", "0.5.13.dev4", "0.5.11+fork"])
@pytest.mark.parametrize("action", ["check", "apply", "revert"])
def test_a_tree_of_another_version_is_refused(action: str, version: str, holder: Path, root: Path) -> None:
    write(holder, {"sglang/_version.py": f"__version__ = '{version}'\n".encode()})
    before = contents(holder)
    visit = run(root, action, holder)
    assert (visit.status, visit.out) == (2, "")
    assert visit.err == (
        f"SGLang {version} (sglang/_version.py) in {holder}/sglang: there are patches for 0.5.12 only. "
        "Nothing was changed. If it is a fork of one of these, name that with --version\n"
    )
    assert contents(holder) == before


def test_a_fork_with_versions_of_its_own_is_taken_for_what_it_is_a_fork_of(holder: Path, root: Path) -> None:
    write(holder, {"sglang/_version.py": b"__version__ = '1.7.0'\n"})
    before = contents(holder)
    for action in ("check", "apply"):
        visit = run(root, action, "--version", "0.5.12", holder)
        assert visit.status == 0, visit
    assert contents(holder) == {**after(1, 2, 3), "sglang/_version.py": b"__version__ = '1.7.0'\n"}
    assert run(root, "revert", "--version", "0.5.12", holder).status == 0
    assert contents(holder) == before
    unknown = run(root, "apply", "--version", "0.4", holder)
    assert (unknown.status, unknown.err) == (1, "there are no patches for SGLang 0.4; there are for 0.5.12\n")
    assert contents(holder) == before


def test_a_forks_local_version_is_the_version(holder: Path, root: Path) -> None:
    write(holder, {"sglang/_version.py": b"__version__ = '0.5.12+fork.3'\n"})
    visit = run(root, "apply", holder)
    assert visit.status == 0
    assert visit.out.startswith("SGLang 0.5.12+fork.3 (sglang/_version.py) in")


def test_where_the_version_cannot_be_told_the_content_tells(holder: Path, root: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    (both / "sglang-0.5.12").symlink_to(root / "sglang-0.5.12")
    make_series(
        both, {A: numbered(60, _9="later")}, [Commit({A: numbered(60, _9="later", _11="x")}, "later")], "0.5.13"
    )
    write(holder, {"sglang/_version.py": None})
    visit = run(both, "apply", holder)
    assert visit.status == 0
    assert visit.out.splitlines()[:2] == [
        f"SGLang of a version that cannot be told in {holder}/sglang:",
        "its content is compared with the patches for 0.5.12",
    ]
    assert contents(holder).items() >= {A: after(1, 2, 3)[A], PACKAGE: b""}.items()
    # The newest one is what does not apply if none does.
    write(holder, {A: b""})
    visit = run(both, "check", holder)
    assert visit.status == 1
    assert "the patches for 0.5.13" in visit.out


def test_no_tree_is_a_line_and_status_2(tmp_path: Path, root: Path) -> None:
    visit = end(start(root, "apply", tmp_path))
    assert (visit.status, visit.out) == (2, "")
    assert visit.err.startswith(f"{tmp_path} holds no SGLang: name a checkout")
    assert visit.err.count("\n") == 1


def test_without_a_tree_it_is_the_installed_one(holder: Path, root: Path) -> None:
    # It comes before the environment's own.
    visit = end(start(root, "apply", PYTHONPATH=str(holder)))
    assert (visit.status, visit.err) == (0, "")
    assert contents(holder) == after(1, 2, 3)


# list


def test_list_shows_the_patches_of_each_version(tmp_path: Path) -> None:
    message = f"A subject\n\nBody.\n\nUpstream: {UPSTREAM}"
    root = make_series(
        tmp_path, BEFORE, [Commit({A: numbered(60, _7="7", _8="a\nb"), GONE: None, MODULE: b""}, message)]
    )
    make_series(tmp_path, BEFORE, [Commit({B: b""}, "Another\n\nUpstream: none")], "0.5.9")
    visit = end(start(root, "list"))
    assert visit.status == 0
    assert visit.out.splitlines() == [
        "SGLang 0.5.12: 1 patch",
        "  1  A subject",
        f"     files: 1 changed, 1 added, 1 deleted; lines: +3 -3; upstream: {UPSTREAM}",
        "SGLang 0.5.9: 1 patch",
        "  1  Another",
        "     files: 1 changed; lines: +0 -20",
    ]
    assert run(root, "list", "--version", "0.5.9").out == "".join(visit.out.splitlines(keepends=True)[3:])
    assert run(root, "list", "--version", "0.5.10").status == 1
    newest, oldest = json.loads(run(root, "list", "--json").out)
    assert newest["version"] == "0.5.12"
    assert newest["patches"] == [
        {
            "number": 1,
            "file": "0001-A-subject.patch",
            "subject": "A subject",
            "files": [
                {"file": A, "kind": "changed"},
                {"file": MODULE, "kind": "added"},
                {"file": GONE, "kind": "deleted"},
            ],
            "lines_added": 3,
            "lines_removed": 3,
            "upstream": UPSTREAM,
        }
    ]
    assert oldest["patches"][0]["upstream"] is None


@pytest.mark.parametrize("columns", [80, 160])
def test_the_list_in_a_terminal_fits_into_it(columns: int, tmp_path: Path) -> None:
    message = f"{'a long subject ' * 9}\n\nUpstream: {UPSTREAM}"
    root = make_series(tmp_path, BEFORE, [Commit({A: b"", GONE: None, MODULE: b"1\n"}, message)])
    status, text = in_terminal(columns, "patches", "--series", root, "list")
    assert status == 0
    assert max(map(len, text.splitlines())) <= columns
    for word in ("1 changed", "1 added", "1 deleted", "+1 -61"):
        assert word in text
    assert "sgl-project/sglang/pull/12345" in re.sub(r"[\s│]", "", text) or "12345" in text


def test_a_series_that_cannot_be_read_is_a_line(tmp_path: Path) -> None:
    for root, said in [(tmp_path, "holds no patches"), (_broken(tmp_path / "broken"), "no diff in it")]:
        for command in (
            ["list"],
            ["check", str(write(tmp_path / "holder", BEFORE))],
            ["export", "--out", str(tmp_path / "o")],
        ):
            visit = run(root, *command)
            assert (visit.status, visit.out, visit.err.count("\n")) == (1, "", 1)
            assert said in visit.err


def _broken(root: Path) -> Path:
    return write(
        root, {"sglang-0.5.12/series": b"one.patch\n", "sglang-0.5.12/one.patch": b"Subject: no diff\n\n---\n"}
    )
