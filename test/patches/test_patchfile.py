"""A patch is read as git wrote it, and what we do not do is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from making import Commit, git, make_series, numbered, repository
from sglang_warmstart.series import patchfile, series
from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.patchfile import Kind, Patch

A = "sglang/srt/a.py"
MESSAGE = """\
Ein Grüß Gott, in a subject that is long enough for git to fold it over more than one line of the mail

What it does.

--- a/looks/like/a/diff
@@ -1 +1 @@

Upstream: https://github.com/sgl-project/sglang/pull/1
Upstream: #2
Upstream: none
"""


def only_patch(directory: Path, message: str, before: dict[str, bytes], after: dict[str, bytes | None]) -> Patch:
    root = make_series(directory, before, [Commit(after, message)])
    (patch,) = series.read_version(root, None).patches
    return patch


def test_the_message_is_read(tmp_path: Path) -> None:
    patch = only_patch(tmp_path, MESSAGE, {A: numbered(9)}, {A: numbered(9, _2="x\ny")})
    assert b"\n folded" in patch.source.read_bytes() or b"?=\n =?" in patch.source.read_bytes(), "git did not fold it"
    assert patch.subject == MESSAGE.splitlines()[0]
    assert patch.upstream == "https://github.com/sgl-project/sglang/pull/1, #2"
    assert (patch.number, patch.added, patch.removed) == (1, 2, 1)
    assert [(change.path, change.kind) for change in patch.files] == [(A, Kind.CHANGE)]


def test_files_come_and_go(tmp_path: Path) -> None:
    before = {A: b"\xe4\r\nb", "sglang/srt/empty.py": b""}
    after = {A: None, "sglang/srt/empty.py": None, "sglang/new.py": b"\xf6\n-- \n2.39.5\n", "sglang/z/empty.py": b""}
    patch = only_patch(tmp_path, "Files\n\nno upstream", before, after)
    assert patch.upstream is None
    assert {(change.path, change.kind, change.content) for change in patch.files} == {
        (A, Kind.DELETE, b"\xe4\r\nb"),
        ("sglang/srt/empty.py", Kind.DELETE, b""),
        ("sglang/new.py", Kind.ADD, b"\xf6\n-- \n2.39.5\n"),
        ("sglang/z/empty.py", Kind.ADD, b""),
    }
    assert not any(change.executable for change in patch.files)


def test_an_executable_file_is_one(tmp_path: Path) -> None:
    work = repository(tmp_path, {"sglang/a": b""})
    (work / "sglang/tool").write_bytes(b"#!/bin/sh\n")
    (work / "sglang/tool").chmod(0o755)
    git(work, "add", ".")
    git(work, "commit", "--message=tool")
    git(work, "format-patch", "--output=the.patch", "-1")
    (change,) = patchfile.read(work / "the.patch", 1).files
    assert change.executable
    assert change.reversed().executable


REFUSED = {
    "rename": ("git mv sglang/srt/a.py sglang/srt/b.py", "similarity index 100%"),
    "copy": ("sed s/3/4/ sglang/srt/a.py > sglang/srt/b.py", "similarity index"),
    "mode": ("chmod +x sglang/srt/a.py", "old mode 100644"),
    "mode and text": ("chmod +x sglang/srt/a.py; echo x >> sglang/srt/a.py", "old mode 100644"),
    "link": ("ln -s a.py sglang/srt/link.py", "new file mode 120000"),
    "binary": (r"printf '\0\1' > sglang/data", "GIT binary patch|binary"),
    "quoted": ("touch sglang/ä.py", "not a file in `sglang/`"),
    "outside": ("touch other.py", "not a file in `sglang/`"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_done_here_is_refused(tmp_path: Path, kind: str) -> None:
    work = repository(tmp_path, {A: numbered(30), "sglang/data": b"\0\1\2"})
    command, said = REFUSED[kind]
    subprocess.run(command, shell=True, cwd=work, check=True)
    git(work, "add", "--all")
    git(work, "commit", "--message=change")
    git(work, "format-patch", "--output=the.patch", "--find-copies-harder", "-1")
    with pytest.raises(PatchesError, match=rf"the\.patch: .*({said})") as caught:
        patchfile.read(work / "the.patch", 1)
    assert "\n" not in str(caught.value)


def test_a_mail_without_a_diff_is_an_error(tmp_path: Path) -> None:
    work = repository(tmp_path, {A: numbered(30)})
    git(work, "commit", "--allow-empty", "--message=nothing")
    git(work, "format-patch", "--output=the.patch", "--always", "-1")
    with pytest.raises(PatchesError, match=r"the\.patch: no diff in it"):
        patchfile.read(work / "the.patch", 1)


@pytest.mark.parametrize(
    "path", ["sglang/../x", "sglang//x", "sglang/./x", "/sglang/x", "sglang", "sglang/", "other/x"]
)
def test_a_path_that_leads_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    patch = tmp_path / "the.patch"
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\nindex 0000000..1111111\n--- /dev/null\n+++ b/{path}\n"
    patch.write_text(f"Subject: x\n\n---\n{head}@@ -0,0 +1 @@\n+x\n")
    with pytest.raises(PatchesError, match="not a file in `sglang/`"):
        patchfile.read(patch, 1)


@pytest.mark.parametrize("damage", ["cut off", "longer", "no hunks", "two names", "not there"])
def test_a_damaged_patch_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    source = only_patch(tmp_path, "x", {A: numbered(9)}, {A: numbered(9, _2="x")}).source
    data = source.read_bytes()
    if damage == "cut off":
        source.write_bytes(data[: data.index(b" line 5")])
    elif damage == "longer":
        source.write_bytes(data.replace(b"@@ -1,5 +1,5 @@", b"@@ -1,5 +1,3 @@"))
    elif damage == "no hunks":
        source.write_bytes(data[: data.index(b"@@ ")])
    elif damage == "two names":
        source.write_bytes(data.replace(b"+++ b/sglang/srt/a.py", b"+++ b/sglang/srt/b.py"))
    else:
        source.unlink()
    with pytest.raises(PatchesError, match=source.name) as caught:
        patchfile.read(source, 1)
    assert "\n" not in str(caught.value)


def test_a_series_is_read_in_its_own_order(tmp_path: Path) -> None:
    make_series(tmp_path, {A: b"1\n"}, [Commit({A: b"2\n"}, "two"), Commit({A: b"3\n"}, "three")])
    index = tmp_path / "sglang-0.5.12" / "series"
    names = [line for line in index.read_text().splitlines() if line.endswith(".patch")]
    index.write_text(f"\n# last first\n{names[1]} # why\n\n  {names[0]}\n")
    read = series.read_version(tmp_path, "0.5.12")
    assert [(patch.number, patch.subject) for patch in read.patches] == [(1, "three"), (2, "two")]
    index.write_text("missing.patch\n")
    with pytest.raises(PatchesError, match=r"missing\.patch: the patch cannot be read \(No such file or directory\)"):
        series.read_version(tmp_path, "0.5.12")


def test_the_newest_version_comes_first(tmp_path: Path) -> None:
    for version in ("0.5.9", "0.5.12", "0.5.12.post1", "0.5.2"):
        make_series(tmp_path, {A: b"1\n"}, [Commit({A: b"2\n"}, version)], version)
    (tmp_path / "sglang-0.6").mkdir()  # without a series
    assert list(series.directories(tmp_path)) == ["0.5.12.post1", "0.5.12", "0.5.9", "0.5.2"]
    assert series.read_version(tmp_path, None).patches[0].subject == "0.5.12.post1"
    with pytest.raises(
        PatchesError, match=r"no patches for SGLang 0\.6; there are for 0\.5\.12\.post1, 0\.5\.12, 0\.5\.9"
    ):
        series.read_version(tmp_path, "0.6")
    with pytest.raises(PatchesError, match="holds no patches"):
        series.directories(tmp_path / "nowhere")
