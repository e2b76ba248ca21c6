"""What is written to a tree, and what is not."""

from __future__ import annotations

import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from making import BEFORE, GONE, MODULE, PACKAGE, A, B, Commit, after, contents, make_series, numbered, snapshot, write
from running import end, run, start
from sglang_warmstart.series import transaction
from sglang_warmstart.series import tree as trees
from sglang_warmstart.series.errors import PatchesError

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())
LEFT = ".sglang-warmstart-patches"


# What is written


def test_applied_and_reverted_it_is_as_it_was_to_the_byte(holder: Path, root: Path) -> None:
    assert run(root, "apply", holder).status == 0
    assert contents(holder) == after(1, 2, 3)
    assert run(root, "revert", holder).status == 0
    assert contents(holder) == BEFORE
    assert not (holder / "sglang/srt/added").exists()
    assert not list(holder.glob(".*"))


def test_modes_are_kept_and_what_is_added_has_the_users_own(holder: Path, root: Path) -> None:
    modes = {A: 0o754, B: 0o640, GONE: 0o600}
    for name, mode in modes.items():
        (holder / name).chmod(mode)
    umask = os.umask(0o027)
    try:
        run(root, "apply", holder)
    finally:
        os.umask(umask)
    assert [(holder / name).stat().st_mode & 0o7777 for name in (A, B, MODULE)] == [0o754, 0o640, 0o640]
    run(root, "revert", holder)
    assert {name: (holder / name).stat().st_mode & 0o7777 for name in (A, B)} == {A: 0o754, B: 0o640}


def test_an_executable_file_is_added_as_one(tmp_path: Path, root: Path) -> None:
    other = make_series(
        tmp_path / "patches", {"sglang/srt/a.py": b"1\n"}, [Commit({"sglang/tool": b"#!/bin/sh\n"}, "tool")]
    )
    (patch,) = (other / "sglang-0.5.12").glob("*.patch")
    patch.write_bytes(patch.read_bytes().replace(b"new file mode 100644", b"new file mode 100755"))
    holder = write(tmp_path / "holder", {"sglang/srt/a.py": b"1\n"})
    assert run(other, "apply", holder).status == 0
    assert (holder / "sglang/tool").stat().st_mode & 0o111
    assert not (holder / "sglang/srt/a.py").stat().st_mode & 0o111


def test_a_file_that_is_a_link_into_a_cache_does_not_change_there(holder: Path, root: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "a.py"
    cached.parent.mkdir()
    cached.hardlink_to(holder / A)
    before = snapshot(cached.parent)
    run(root, "apply", holder)
    assert (holder / A).read_bytes() != cached.read_bytes()
    run(root, "revert", holder)
    assert snapshot(cached.parent) == before


def test_what_no_patch_names_is_not_touched(holder: Path, root: Path) -> None:
    write(holder, {"sglang/srt/other.py": b"1\n", "sglang/srt/added/theirs.txt": b"1\n", "torch/__init__.py": b""})
    before = snapshot(holder)
    ours = {str(holder / name) for name in (A, B, GONE, PACKAGE, MODULE)} | {str(holder / MODULE).rpartition("/")[0]}
    for action in ("apply", "revert"):
        run(root, action, holder)
        left = {name: found for name, found in snapshot(holder).items() if name not in ours}
        assert left == {name: found for name, found in before.items() if name not in ours}


def test_of_what_python_compiled_the_removed_modules_part_goes(holder: Path, root: Path) -> None:
    theirs = "sglang/srt/added/theirs.py"
    run(root, "apply", holder)
    write(holder, {theirs: b"1\n"})
    for name in (PACKAGE, MODULE, theirs, "sglang/_version.py"):
        py_compile.compile(str(holder / name))
    run(root, "revert", holder)
    left = {name for name in contents(holder) if "added" in name}
    assert left == {theirs, f"sglang/srt/added/__pycache__/theirs.{sys.implementation.cache_tag}.pyc"}
    (holder / theirs).unlink()
    run(root, "apply", holder)
    for name in (PACKAGE, MODULE):
        py_compile.compile(str(holder / name))
    run(root, "revert", holder)
    assert not (holder / "sglang/srt/added").exists()
    assert (holder / "sglang/__pycache__").is_dir()


def test_what_somebody_put_into_a_directory_of_ours_stays(holder: Path, root: Path) -> None:
    run(root, "apply", holder)
    write(holder, {"sglang/srt/added/deep/__pycache__/notes.txt": b"mine"})
    assert run(root, "revert", holder).status == 0
    assert [name for name in contents(holder) if "added" in name] == ["sglang/srt/added/deep/__pycache__/notes.txt"]


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_patch_that_does_not_fit_leaves_all_as_it_was(action: str, holder: Path, root: Path) -> None:
    write(holder, {**after(1), B: numbered(20, _5="somebody's")})
    before, directory = snapshot(holder), holder.stat().st_mtime_ns
    visit = run(root, action, holder)
    assert visit.status == 1
    assert "expected `line 5`, another line is there" in visit.out
    assert visit.out.endswith("Nothing was changed.\n")
    assert snapshot(holder) == before
    assert holder.stat().st_mtime_ns == directory


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(action: str, holder: Path, root: Path) -> None:
    if action == "revert":
        run(root, "apply", holder)
    before, directory = snapshot(holder), holder.stat().st_mtime_ns
    visit = run(root, action, "--dry-run", holder)
    assert visit.status == 0
    word = {"apply": "applied", "revert": "reverted"}[action]
    counts = {"apply": "2 changed, 2 added, 1 removed", "revert": "2 changed, 1 added, 2 removed"}[action]
    assert visit.out.count(f"would be {word}") == 4
    assert f"3 patches would be {word} (files: {counts})." in visit.out
    assert (snapshot(holder), holder.stat().st_mtime_ns) == (before, directory)


# Two at once

_COUNT = """
import sys
from pathlib import Path
from sglang_warmstart.series import transaction, tree
place, counter = map(Path, sys.argv[1:])
for _ in range(25):
    with transaction.locked(tree.find(place), "apply", wait=60):
        count = int(counter.read_text())
        counter.write_text(str(count + 1))
"""


def test_the_lock_is_one_though_its_file_goes_each_time(holder: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", _COUNT, str(holder), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert counter.read_text() == "100"
    assert not list(holder.glob(".*"))


_REMOVED_MEANWHILE = """
import fcntl, os, sys
from pathlib import Path
from sglang_warmstart.series import transaction, tree
place = Path(sys.argv[1])
lock, others = place / transaction.LOCK, []
def hook(event, arguments):
    # Between its opening and its locking: the holder removes the file, and a third one makes it anew.
    if event == "fcntl.flock" and not others:
        lock.unlink()
        others.append(os.open(lock, os.O_RDWR | os.O_CREAT))
        fcntl.flock(others[0], fcntl.LOCK_EX)
sys.addaudithook(hook)
try:
    with transaction.locked(tree.find(place), "apply", wait=0.2):
        print("two of them")
except transaction.PatchesError:
    os.close(others[0])
    with transaction.locked(tree.find(place), "apply", wait=0.2):
        print("one of them")
"""


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(holder: Path) -> None:
    assert run_python(_REMOVED_MEANWHILE, str(holder)) == "one of them\n"


def test_who_cannot_have_the_lock_is_told_who_has_it(holder: Path, root: Path) -> None:
    tree = trees.find(holder)
    with transaction.locked(tree, "apply"):
        begin = time.monotonic()
        with pytest.raises(PatchesError) as caught, transaction.locked(tree, "revert", wait=0.3):
            pass
        assert 0.3 <= time.monotonic() - begin < 3
        process = start(root, "revert", holder)
        visit = end(process)
    who = f"patches apply, process {os.getpid()}"
    assert str(caught.value) == f"another command is at work on {tree.package}: {who}. Try again when it has ended"
    # Nothing is applied, so there is nothing that it would have to wait for.
    assert (visit.status, visit.err) == (0, "")
    with transaction.locked(tree, "revert", wait=0):
        pass


def test_commands_that_meet_wait_for_each_other(holder: Path, root: Path) -> None:
    with transaction.locked(trees.find(holder), "check"):
        both = [start(root, "apply", holder) for _ in range(2)]
        time.sleep(1)
        assert [process.poll() for process in both] == [None, None]
        assert contents(holder).items() >= BEFORE.items()
    visits = [end(process) for process in both]
    assert [visit.status for visit in visits] == [0, 0], visits
    did = [visit for visit in visits if "3 patches applied" in visit.out]
    assert len(did) == 1
    (other,) = (visit for visit in visits if visit not in did)
    assert "all of the 3 patches are applied already, nothing to do" in other.out
    assert contents(holder) == after(1, 2, 3)


def test_what_the_one_that_was_waited_for_left_half_done_is_put_back(holder: Path, root: Path) -> None:
    entry = f'{{"path":"{PACKAGE}","kind":"add"}}'
    journal = f'{{"action":"apply","process":1,"entries":[{entry}],"directories":["sglang/srt/added"]}}'
    with transaction.locked(trees.find(holder), "apply"):
        process = start(root, "apply", holder)
        time.sleep(1)
        write(holder, {f"{LEFT}/journal.json": journal.encode(), PACKAGE: b"half of it"})
    visit = end(process)
    assert visit.status == 0, visit
    assert visit.err.startswith("note: `patches apply` (process 1) was cut off at work on ")
    assert contents(holder) == after(1, 2, 3)


def test_a_lock_that_is_held_too_long_is_an_error(holder: Path, root: Path, tmp_path: Path) -> None:
    # What is half done, and by somebody who is at work, cannot even be looked at.
    half_done = write(tmp_path / "half done", {**BEFORE, f"{LEFT}/journal.json": b"{}"})
    before = contents(holder), contents(half_done)
    with transaction.locked(trees.find(holder), "revert"), transaction.locked(trees.find(half_done), "revert"):
        for visit in [end(process) for process in [start(root, "apply", holder), start(root, "check", half_done)]]:
            assert (visit.status, visit.out, visit.err.count("\n")) == (1, "", 1)
            assert f"patches revert, process {os.getpid()}" in visit.err
    assert (contents(holder), contents(half_done)) == before


# A disk that is full, or cannot be written

_VISIT = """
import sys
from pathlib import Path
from making import snapshot
from running import run
root, holder, *commands = sys.argv[1:]
for command in commands:
    before = snapshot(Path(holder))
    visit = run(Path(root), command, holder)
    print(visit.status, snapshot(Path(holder)) == before, (visit.err or visit.out).splitlines()[-1])
"""


def visit_elsewhere(prefix: tuple[str, ...], root: Path, holder: Path, *commands: str) -> list[str]:
    """What commands say in a process of its own: status, whether the tree is unchanged, last line."""
    here = Path(__file__).parent
    environment = {"PYTHONPATH": os.pathsep.join(map(str, [here.parent, here, *sys.path]))}
    return run_python(_VISIT, str(root), str(holder), *commands, prefix=prefix, environment=environment).splitlines()


def mounted(holder: Path, options: str = "", then: str = ":") -> tuple[str, ...]:
    """Where a tree lies on a file system of its own.

    Args:
        options: of the mount.
        then: in sh: what to do after the tree is there, in its directory.
    """
    original = shlex.quote(str(holder.rename(holder.with_name("original"))))
    holder.mkdir()
    place = shlex.quote(str(holder))
    return in_mount_namespace(f"mount -t tmpfs {options} none {place}; cp -a {original}/. {place}; cd {place}; {then}")


@needs_mounts
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path: Path, holder: Path) -> None:
    root = make_series(tmp_path / "patches", BEFORE, [Commit({"sglang/srt/large.py": numbered(30000)}, "large")])
    said = visit_elsewhere(mounted(holder, "-o size=200k"), root, holder, "check", "apply", "check")
    assert said == [
        "0 True 1 patch: 1 applies.",
        f"1 True {holder} cannot be written (No space left on device): make room; nothing was changed",
        "0 True 1 patch: 1 applies.",
    ]


@needs_mounts
def test_a_read_only_tree_can_be_looked_at(root: Path, holder: Path) -> None:
    run(root, "apply", holder)
    write(holder, {f"{LEFT}.lock": b"", f"{LEFT}/new/left.py": b"", B: BEFORE[B], MODULE: None, PACKAGE: None})
    prefix = mounted(holder, then="mount -o remount,ro .")
    assert visit_elsewhere(prefix, root, holder, "check", "apply", "revert") == [
        "0 True 3 patches: 1 applies, 2 are applied already.",
        *[f"1 True {holder} cannot be written (Read-only file system): make it writable; nothing was changed"] * 2,
    ]


@needs_mounts
def test_a_read_only_tree_that_is_half_done_cannot(root: Path, holder: Path) -> None:
    journal = b'{"action":"apply","process":1,"entries":[],"directories":[]}'
    write(holder, {f"{LEFT}/journal.json": journal})
    prefix = mounted(holder, then="mount -o remount,ro .")
    assert visit_elsewhere(prefix, root, holder, "check") == [
        f"1 True {holder}/sglang is half changed by another command: "
        f"{holder} cannot be written (Read-only file system): make it writable; nothing was changed"
    ]


@needs_mounts
def test_a_directory_on_another_file_system_is_one_line_and_changes_nothing(tmp_path: Path, holder: Path) -> None:
    # Only a rename finds that out, when a file is in place already.
    root = make_series(
        tmp_path / "patches", BEFORE, [Commit({"sglang/new.py": b"1\n", A: numbered(60, _9="x")}, "two")]
    )
    then = "mv sglang/srt ../srt; mkdir sglang/srt; mount -t tmpfs none sglang/srt; cp -a ../srt/. sglang/srt"
    said = visit_elsewhere(mounted(holder, then=then), root, holder, "apply")
    assert said == [f"1 True {holder}/{A} cannot be written (Invalid cross-device link): nothing was changed"]


def _why_no_users() -> str:
    command = [*_as_user(), "true"]
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not there"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no user namespaces here: {done.stderr.strip()}"


def _as_user() -> tuple[str, ...]:
    # Not root in there, so that permissions bind; our files are its own.
    return ("unshare", "--user", "--map-user=1000")


@pytest.mark.skipif(bool(_why_no_users()), reason=_why_no_users())
@pytest.mark.parametrize("closed", ["", "sglang/srt"])
def test_a_directory_that_may_not_be_written_is_named(closed: str, root: Path, holder: Path) -> None:
    (holder / closed).chmod(0o555)
    try:
        said = visit_elsewhere(_as_user(), root, holder, "check", "apply", "check")
    finally:
        (holder / closed).chmod(0o755)
    named = f"{holder}/sglang/srt/added" if closed else str(holder)
    assert said == [
        "0 True 3 patches: 3 apply.",
        f"1 True {named} cannot be written (Permission denied): make it writable; nothing was changed",
        "0 True 3 patches: 3 apply.",
    ]
