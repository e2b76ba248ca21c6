"""Hunks go exactly where `git apply` would put them, or nowhere."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from making import GIT_ENVIRONMENT, git, numbered, repository
from sglang_warmstart.series import hunks, patchfile
from sglang_warmstart.series.hunks import Hunk

FILE = "sglang/srt/file"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which patches are made."""
    return repository(tmp_path_factory.mktemp("work"), {FILE: b"nothing yet"})


def difference(work: Path, old: bytes, new: bytes) -> tuple[Hunk, ...]:
    """What git says changes from one content to another, read as a patch of the series."""
    path = work / FILE
    path.write_bytes(old)
    git(work, "add", FILE)
    path.write_bytes(new)
    patch = work / "one.patch"
    patch.write_bytes(b"Subject: one\n\n---\n\n" + git(work, "diff", "--text", "--full-index", FILE))
    return patchfile.read(patch, 1).files[0].hunks


def backwards(changes: Sequence[Hunk]) -> list[Hunk]:
    return [hunk.reversed() for hunk in changes]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (numbered(30), numbered(30, _3="x", _15="y", _28="z")),
        (numbered(3), b""),
        (b"", numbered(3)),
        (b"a\nb", b"a\nb\n"),
        (b"a\nb\n", b"a\nb"),
        (b"a\nb", b"a\nc"),
        (b"a\r\nb\r\nc\r\n", b"a\r\nx\r\nc\r\n"),
        (b"a\r\nb\r\nc\r\n", b"a\nb\nc\n"),
        (b"a\x0cb\rc\x1cd\x85e\n" * 3, b"a\x0cb\rc\x1cd\x85e\n" * 2),
        (b"\xff\xfe\n\xe4\n", b"\xff\xfe\n\xf6\n"),
        (b"-- \n2.39.5\n\n", b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n"),
    ],
    ids=[
        "three hunks",
        "all goes",
        "all comes",
        "a newline comes",
        "a newline goes",
        "no newline on either side",
        "CRLF",
        "CRLF goes",
        "what str takes for a line's end",
        "not UTF-8",
        "what looks like a patch",
    ],
)
def test_a_change_goes_forth_and_back_to_the_byte(work: Path, old: bytes, new: bytes) -> None:
    changes = difference(work, old, new)
    assert hunks.apply(old, changes) == (new, [])
    assert hunks.apply(new, backwards(changes)) == (old, [])


def test_a_hunk_may_be_at_another_line(work: Path) -> None:
    changes = difference(work, numbered(40), numbered(40, _20="changed"))
    above = b"above\n" * 7
    assert hunks.apply(above + numbered(40), changes) == (above + numbered(40, _20="changed"), [])
    lower = numbered(40).split(b"\n", 9)[9]
    changed, misfits = hunks.apply(lower, changes)
    assert not misfits
    assert changed == numbered(40, _20="changed").split(b"\n", 9)[9]


def test_of_two_places_the_nearer_one_is_taken_and_of_two_as_near_the_later_one(work: Path) -> None:
    block = b"1\n2\n3\nold\n4\n5\n6\n"
    changes = difference(
        work, b"x\n" * 20 + block + b"y\n" * 20, b"x\n" * 20 + block.replace(b"old", b"new") + b"y\n" * 20
    )
    # It is expected after 20 lines.
    for before, between, taken in [(18, 0, 1), (15, 0, 2), (16, 1, 2), (17, 1, 1)]:
        parts = [b"x\n" * before, block, b"z\n" * between, block, b"y\n" * 20]
        expected = list(parts)
        expected[2 * taken - 1] = block.replace(b"old", b"new")
        assert hunks.apply(b"".join(parts), changes) == (b"".join(expected), []), (before, between)


def test_a_hunk_of_the_first_line_or_the_last_one_stays_there(work: Path) -> None:
    first = difference(work, numbered(9), numbered(9, _1="changed"))
    last = difference(work, numbered(9), numbered(9, _9="changed"))
    _, (misfit,) = hunks.apply(b"above\n" + numbered(9), first)
    assert (misfit.expected, misfit.reason) == (None, "its lines are there, but not at the beginning of the file")
    _, (misfit,) = hunks.apply(numbered(9) + b"below\n", last)
    assert (misfit.expected, misfit.reason) == (None, "its lines are there, but not at the end of the file")


def test_lines_that_a_hunk_wrote_are_not_taken_for_another_hunks() -> None:
    first = Hunk(1, 2, 2, (b"a\n", b"b\n"), (b"a\n", b"c\n"), 0)
    second = Hunk(2, 3, 3, (b"c\n",), (b"d\n",), 1)
    _, (misfit,) = hunks.apply(b"x\na\nb\n", [first, second])
    assert misfit.hunk is second
    assert hunks.apply(b"x\na\nb\nc\n", [Hunk(1, 2, 2, first.old, first.new, 1), second]) == (b"x\na\nc\nd\n", [])


def test_there_is_no_fuzz(work: Path) -> None:
    changes = difference(work, numbered(40), numbered(40, _20="changed"))
    for line in range(17, 24):
        other = numbered(40, **{f"_{line}": "somebody's"})
        unchanged, (misfit,) = hunks.apply(other, changes)
        assert unchanged == other
        assert (misfit.line, misfit.expected) == (line, f"line {line}\n".encode())
    # Not even a blank at the end of a line.
    assert hunks.apply(numbered(40, _18="line 18 "), changes)[1]


def test_a_misfit_names_the_line_of_the_file_as_it_is(work: Path) -> None:
    old, new = numbered(60), numbered(60, _10="10\nand\nthree\nmore", _50="changed")
    changes = difference(work, old, new)
    # Five lines further down than in the patch, of which the first hunk's do not count.
    _, (misfit,) = hunks.apply(b"above\n" * 5 + numbered(60, _51="somebody's"), changes)
    assert (misfit.hunk.number, misfit.line, misfit.expected) == (2, 56, b"line 51\n")
    _, (misfit,) = hunks.apply(numbered(51), changes)
    assert (misfit.line, misfit.expected, misfit.reason) == (52, b"line 52\n", "the file ends before it")
    # Where hardly a line is left, it is the line of the patch.
    _, misfits = hunks.apply(b"another file\n" * 60, changes)
    assert [(each.line, each.expected) for each in misfits] == [(7, b"line 7\n"), (47, b"line 47\n")]


LINES = st.sampled_from([b"a\n", b"b\n", b"\n", b"c\r\n", b"\xff\n", b"d\x0c e\n", b"-- \n", b"f\r"])


@st.composite
def edited(draw: st.DrawFn, lines: list[bytes]) -> list[bytes]:
    """The same lines with a few edits."""
    lines = list(lines)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(lines)))
        lines[start : start + draw(st.integers(0, 3))] = draw(st.lists(LINES, max_size=3))
    return lines


@st.composite
def three_contents(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """A file, what a patch makes of it, and another file that the patch is applied to."""
    old = draw(st.lists(LINES, max_size=40))
    contents = [b"".join(lines) for lines in (old, draw(edited(old)), draw(edited(old)))]
    # A file may end without a newline.
    old_content, new, other = (each.removesuffix(b"\n") if draw(st.booleans()) else each for each in contents)
    return old_content, new, other


def git_apply(work: Path, content: bytes, *options: str) -> bytes | None:
    """What `git apply` makes of a content; None if the patch does not apply."""
    path = work / FILE
    path.write_bytes(content)
    command = ["git", "apply", "--whitespace=nowarn", *options, "one.patch"]
    done = subprocess.run(command, cwd=work, env=GIT_ENVIRONMENT, capture_output=True, check=False)
    return path.read_bytes() if done.returncode == 0 else None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(three_contents())
def test_it_is_what_git_apply_makes(work: Path, given: tuple[bytes, bytes, bytes]) -> None:
    old, new, other = given
    assume(old != new)
    changes = difference(work, old, new)
    assert hunks.apply(old, changes) == (new, [])
    assert hunks.apply(new, backwards(changes)) == (old, [])
    for content, options, wanted in [(other, (), changes), (other, ("--reverse",), backwards(changes))]:
        made, misfits = hunks.apply(content, wanted)
        if misfits and any(hunk.trailing and hunk.old[-1][-1:] != b"\n" for hunk in wanted):
            continue  # Git takes `a` in the context for `a` with a newline, and removes the newline. We do not.
        assert (None if misfits else made) == git_apply(work, content, *options)
