"""Whatever ends a command, and wherever: the tree is as it was before, or as it was meant to be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path

import pytest
from making import BEFORE, MODULE, PACKAGE, A, B, after, contents, snapshot, write
from running import kill, run, run_until

PLAIN, PATCHED = BEFORE, after(1, 2, 3)
ACTIONS = {"apply": (PLAIN, PATCHED), "revert": (PATCHED, PLAIN)}
LEFT = ".sglang-warmstart-patches"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of syncs take long on a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def again(place: Path) -> Callable[[dict[str, bytes]], Path]:
    """Makes the same tree again, with the same times."""

    def make(files: dict[str, bytes]) -> Path:
        template, holder = place / "template", place / "holder"
        if not template.exists():
            write(template, files)
        shutil.rmtree(holder, ignore_errors=True)
        return Path(shutil.copytree(template, holder))

    return make


Again = Callable[[dict[str, bytes]], Path]


# Some file systems have no hard links; then a copy is kept.
@pytest.mark.parametrize(
    ("action", "refused"), [("apply", ""), ("revert", "os.link")], ids=["apply", "revert, no links"]
)
def test_a_command_that_is_killed_is_put_back_by_the_next_one(
    action: str, refused: str, root: Path, again: Again
) -> None:
    before, meant = ACTIONS[action]
    outcomes, half_done = [], 0
    for number in range(1, 1000):
        holder = again(before)
        as_it_was, files = snapshot(holder), {name: (holder / name).stat().st_ino for name in before}
        visit = run_until(number, kill, root, action, holder, refused=refused)
        if visit.status >= 0:
            break
        found = {name: content for name, content in contents(holder).items() if not name.startswith(LEFT)}
        half_done += found not in (before, meant)
        # What a patched file may import is there as long as that file is.
        if any(found[name] == PATCHED[name] for name in (A, B)):
            assert {PACKAGE, MODULE} <= found.keys(), number

        checked = run(root, "check", holder)
        assert checked.status == 0, checked
        assert not list(holder.glob(f"{LEFT}*"))
        back = snapshot(holder) == as_it_was
        assert back or contents(holder) == meant, number
        if back and not refused:
            assert files == {name: (holder / name).stat().st_ino for name in before}, "it is a copy"
        said = [line for line in checked.err.splitlines() if "was cut off" in line]
        assert len(said) <= 1
        assert back or not said
        assert found in (before, meant) or said
        outcomes.append(back)
    assert (visit.status, contents(holder)) == (0, meant)
    assert run(root, "check", holder).err == ""
    assert outcomes == sorted(outcomes, reverse=True), "once it is done it stays done"
    assert outcomes[0] is True
    assert outcomes[-1] is False
    assert half_done >= 4, "no kill hit it half way"


def test_putting_back_can_be_cut_off_as_well(root: Path, again: Again, place: Path) -> None:
    as_it_was = snapshot(again(PLAIN))
    for number in range(1, 1000):
        holder = again(PLAIN)
        run_until(number, kill, root, "apply", holder)
        if contents(holder).items() >= PATCHED.items():
            break
    assert (holder / LEFT / "journal.json").exists()
    half = holder.rename(place / "half")
    for number in range(1, 1000):
        holder = shutil.copytree(half, again(PLAIN), dirs_exist_ok=True)
        if run_until(number, kill, root, "check", holder).status >= 0:
            break
        assert run(root, "revert", holder).status == 0
        assert snapshot(holder) == as_it_was, number
    assert number > 10


def no_room() -> None:
    """What a full disk does."""
    raise OSError(ENOSPC, "No space left on device")


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", [no_room, interrupt])
@pytest.mark.parametrize("action", ACTIONS)
def test_an_error_anywhere_leaves_the_tree_as_it_was(
    action: str, what: Callable[[], None], root: Path, again: Again
) -> None:
    before, meant = ACTIONS[action]
    changes = run_until(0, what, root, action, again(before)).changes
    failed = 0
    for number in range(1, changes + 1):
        holder = again(before)
        as_it_was = snapshot(holder)
        visit = run_until(number, what, root, action, holder)
        assert "Traceback" not in visit.out + visit.err
        left = {name: text for name, text in contents(holder).items() if not name.startswith(LEFT)}
        if left == meant:
            # It may fail to say who holds the lock before, and to clear up afterwards.
            assert visit.status == (0 if what is no_room else 130)
            continue
        failed += 1
        assert snapshot(holder) == as_it_was, number
        if what is no_room:
            said = f"{holder} cannot be written (No space left on device): make room; nothing was changed\n"
            assert (visit.status, visit.err) == (1, said)
        else:
            assert visit.status == 130
    assert failed > 30
    assert run(root, "check", holder).status == 0
    assert not list(holder.glob(f"{LEFT}*"))


def test_a_journal_that_is_not_ours_is_left_alone(root: Path, again: Again) -> None:
    holder = again(PLAIN)
    for content in (
        b"{",
        b'{"action":"apply","process":1,"entries":[{"path":"sglang/../../x","kind":"add"}],"directories":[]}',
        b'{"action":"apply","process":1,"entries":[],"directories":["/tmp"]}',
    ):
        write(holder, {f"{LEFT}/journal.json": content})
        before = snapshot(holder)
        visit = run(root, "apply", holder)
        assert visit.status == 1
        assert f"{LEFT}/journal.json is not of this program" in visit.err
        assert snapshot(holder) == before
