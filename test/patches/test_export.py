"""What is exported is what `git am` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import BEFORE, Commit, after, contents, git, make_series, repository, write
from running import run


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A series with a notice."""
    return write(make_series(tmp_path / "patches"), {"NOTICE": b"a notice\n"})


def test_git_am_takes_it_in_an_unpacked_wheel_and_in_sglangs_repository(noted: Path, tmp_path: Path) -> None:
    out = tmp_path / "not there yet" / "out"
    visit = run(noted, "export", "--out", out)
    assert visit.status == 0
    assert contents(out) == {**contents(noted / "sglang-0.5.12"), "NOTICE": b"a notice\n"}
    assert visit.out.splitlines() == [
        f"5 files for SGLang 0.5.12 are in {out}.",
        f"In an unpacked wheel:    git am '{out}'/*.patch",
        f"In SGLang's repository:  git am --directory=python '{out}'/*.patch",
    ]
    wheel = repository(tmp_path / "wheel", BEFORE)
    checkout = repository(tmp_path / "checkout", {f"python/{name}": content for name, content in BEFORE.items()})
    # As printed, in the shell that fills in the names.
    for work, line in zip((wheel, checkout), visit.out.splitlines()[1:], strict=True):
        git(work, "-c", f"alias.do=!{line.partition(':')[2].strip()} --quiet", "do")
        assert contents(work if work is wheel else work / "python") == after(1, 2, 3)
        assert git(work, "log", "--format=%s", "base..").decode().split("\n") == ["Step 3", "Step 2", "Step 1", ""]
        assert "0 patches apply, 3 are applied already" in run(noted, "check", work).out


def test_a_file_of_other_content_stops_it_before_anything_is_written(noted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"NOTICE": b"another notice\n"})
    visit = run(noted, "export", "--out", out)
    assert (visit.status, visit.out) == (1, "")
    assert visit.err == f"{out}/NOTICE is there with other content, nothing was written: name an empty directory\n"
    assert contents(out) == {"NOTICE": b"another notice\n"}


def test_it_may_be_exported_again(noted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(noted, "export", "--out", out)
    (out / "series").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(noted, "export", "--out", out).status == 0
    after_it = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after_it.items() > before.items()
    assert after_it.keys() - before.keys() == {"series"}


def test_the_newest_version_is_exported_unless_one_is_named(tmp_path: Path) -> None:
    for version in ("0.5.12", "0.5.9"):
        make_series(tmp_path, BEFORE, [Commit({"sglang/new.py": b""}, f"for {version}")], version)
    run(tmp_path, "export", "--out", tmp_path / "newest")
    run(tmp_path, "export", "--out", tmp_path / "named", "--version", "0.5.9")
    assert set(contents(tmp_path / "newest")) == {"series", "0001-for-0.5.12.patch"}
    assert set(contents(tmp_path / "named")) == {"series", "0001-for-0.5.9.patch"}


def test_a_directory_that_cannot_be_made_is_a_line(noted: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    visit = run(noted, "export", "--out", tmp_path / "file" / "out")
    assert (visit.status, visit.out) == (1, "")
    assert visit.err == f"{tmp_path}/file/out cannot be written (Not a directory)\n"
