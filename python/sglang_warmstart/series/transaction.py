"""Write changes to a tree, all of them or none, whatever happens meanwhile.

All new content is on the disk before the first file of the tree changes. Each file is then replaced by a rename: the
files of an environment may be hard links into an installer's cache, so none is written in place. Until the journal is
gone, a run that was cut off can be rolled back from what lies beside the package.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.patchfile import is_plain_path
from sglang_warmstart.series.tree import Tree
from sglang_warmstart.series.view import Change

STAGING = ".sglang-warmstart-patches"
LOCK = f"{STAGING}.lock"
_JOURNAL, _NEW, _OLD = "journal.json", "new", "old"
# Seconds that a command waits for another one, which takes less than one.
WAIT = 5.0
_POLL = 0.05


class Entry(msgspec.Struct, frozen=True):
    """One file of a transaction.

    Args:
        path: as in a patch.
        kind: what happens to it.
    """

    path: str
    kind: Literal["add", "change", "remove"]


class Journal(msgspec.Struct, frozen=True):
    """What a transaction is about to do. It is there from before the first change until after the last one.

    Args:
        action: ``apply`` or ``revert``.
        process: who does it.
        entries: in this order.
        directories: those made for added files, the outer before the inner one, as paths of a patch.
    """

    action: str
    process: int
    entries: list[Entry]
    directories: list[str]


@contextlib.contextmanager
def locked(tree: Tree, action: str, wait: float = WAIT) -> Iterator[None]:
    """Keep other commands away from a tree. The lock ends with its holder, and no file of it is left.

    Not a ``FileLock``: that one leaves its file, and cannot tell whether it has locked one that was removed meanwhile.

    Args:
        tree: what is locked.
        action: what for; the one who waits is told.
        wait: seconds to wait for another command.

    Raises:
        PatchesError: another command holds the lock, or the tree cannot be written.
    """
    path = tree.holder / LOCK
    try:
        descriptor = _acquire(path, wait)
    except OSError as error:
        raise PatchesError(_unwritable(tree, error)) from error
    if descriptor is None:
        with contextlib.suppress(OSError):
            action = path.read_text(encoding="utf-8").strip() or action
        raise PatchesError(f"another command is at work on {tree.package}: {action}. Try again when it has ended")
    try:
        with contextlib.suppress(OSError):  # a full disk does not hinder the lock
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"patches {action}, process {os.getpid()}\n".encode())
        yield
    finally:
        # While it is held: whoever waits for this file finds out that it is gone.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, wait: float) -> int | None:
    deadline = time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL)


def is_unfinished(tree: Tree) -> bool:
    """Whether a command was cut off here, or is at work."""
    return any((tree.holder / name).exists() for name in (STAGING, LOCK))


def is_half_done(tree: Tree) -> bool:
    """Whether what lies beside the package has to be rolled back before the tree means anything."""
    return (tree.holder / STAGING / _JOURNAL).exists()


def roll_back(tree: Tree) -> Journal | None:
    """Undo what a command that was cut off has done, and clear away what it left. To be called under the lock.

    Returns:
        What was undone, if anything had begun.

    Raises:
        PatchesError: the tree cannot be written.
    """
    stage = tree.holder / STAGING
    try:
        journal = _read_journal(stage)
        if journal is not None:
            _undo(tree, stage, journal)
        if stage.exists():
            shutil.rmtree(stage)
    except OSError as error:
        raise PatchesError(_unwritable(tree, error)) from error
    return journal


def commit(tree: Tree, action: str, changes: Sequence[Change]) -> None:
    """Make changes, all or none. To be called under the lock, when there is nothing to roll back.

    Raises:
        PatchesError: the tree cannot be written. It is as it was.
    """
    stage = tree.holder / STAGING
    journal = _plan(tree, action, changes)
    try:
        _stage(tree, stage, journal, changes)
        _place(tree, stage, journal)
        _finish(stage)
    except BaseException as error:
        # Also when the user interrupts it.
        try:
            if _read_journal(stage) is not None:
                _undo(tree, stage, journal)
        except OSError as second:
            message = _unwritable(tree, second, "the tree is half changed, the next command will put it back")
            raise PatchesError(message) from error
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise PatchesError(_unwritable(tree, error)) from error
        raise
    shutil.rmtree(stage, ignore_errors=True)


def _plan(tree: Tree, action: str, changes: Sequence[Change]) -> Journal:
    # What is added is there before what may import it, and goes after it.
    order: list[Literal["add", "change", "remove"]] = ["add", "change", "remove"]
    entries = sorted((Entry(each.path, _kind(each)) for each in changes), key=lambda entry: order.index(entry.kind))
    directories: dict[str, None] = {}
    for entry in entries:
        if entry.kind == "add":
            parts = entry.path.split("/")
            for depth in range(2, len(parts)):
                directory = "/".join(parts[:depth])
                if not tree.locate(directory).exists():
                    directories[directory] = None
    return Journal(action, os.getpid(), entries, list(directories))


def _kind(change: Change) -> Literal["add", "change", "remove"]:
    if change.before is None:
        return "add"
    return "remove" if change.after is None else "change"


def _stage(tree: Tree, stage: Path, journal: Journal, changes: Sequence[Change]) -> None:
    by_path = {change.path: change for change in changes}
    stage.mkdir()
    for entry in journal.entries:
        target, new, old = tree.locate(entry.path), stage / _NEW / entry.path, stage / _OLD / entry.path
        for path in (new, old):
            path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "change":
            _keep(target, old)
        after = by_path[entry.path].after
        if after is not None:
            _write_synced(new, after.data)
            _set_mode(new, target if entry.kind == "change" else None, after.executable)
    for folder, _, _ in os.walk(stage):
        _sync(Path(folder))
    draft = stage / f"{_JOURNAL}.draft"
    _write_synced(draft, msgspec.json.encode(journal))
    draft.replace(stage / _JOURNAL)
    _sync(stage)


def _keep(target: Path, old: Path) -> None:
    """Keep the file itself where the file system lets us, so that rolled back it is the very same one."""
    try:
        old.hardlink_to(target)
    except OSError:
        shutil.copy2(target, old)
        _sync(old)


def _set_mode(new: Path, before: Path | None, executable: bool) -> None:
    if before is None:
        umask = os.umask(0)
        os.umask(umask)
        new.chmod((0o777 if executable else 0o666) & ~umask)
        return
    status, now = before.stat(), new.stat()
    if (status.st_uid, status.st_gid) != (now.st_uid, now.st_gid):
        with contextlib.suppress(PermissionError):  # as with any editor, it is then ours
            os.chown(new, status.st_uid, status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    if executable != bool(mode & stat.S_IXUSR):
        mode = mode | 0o111 if executable else mode & ~0o111
    new.chmod(mode)


def _place(tree: Tree, stage: Path, journal: Journal) -> None:
    for directory in journal.directories:
        tree.locate(directory).mkdir()
    for entry in journal.entries:
        target = tree.locate(entry.path)
        if entry.kind == "remove":
            target.replace(stage / _OLD / entry.path)
        else:
            (stage / _NEW / entry.path).replace(target)
    for entry in journal.entries:
        if entry.kind == "remove":
            target = tree.locate(entry.path)
            _remove_compiled(target)
            for parent in target.parents:
                if parent == tree.package or not _remove_if_empty(parent):
                    break
    _sync_parents(tree, journal)


def _finish(stage: Path) -> None:
    (stage / _JOURNAL).unlink()
    # From here on it is done; without this, at worst a power failure brings the journal back.
    with contextlib.suppress(OSError):
        _sync(stage)


def _undo(tree: Tree, stage: Path, journal: Journal) -> None:
    """Take back what has been done of a journal. It may be called again if it was cut off itself."""
    for entry in reversed(journal.entries):
        target, new, old = tree.locate(entry.path), stage / _NEW / entry.path, stage / _OLD / entry.path
        if entry.kind == "remove":
            if old.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                old.replace(target)
        elif not new.exists():  # then it has been put into place
            if entry.kind == "add":
                target.unlink(missing_ok=True)
                _remove_compiled(target)
            elif old.exists():
                old.replace(target)
    for directory in reversed(journal.directories):
        _remove_if_empty(tree.locate(directory))
    _sync_parents(tree, journal)
    _finish(stage)


def _remove_compiled(removed: Path) -> None:
    """Remove what Python compiled from a file that is gone."""
    cache = removed.parent / "__pycache__"
    for compiled in cache.glob(f"{removed.stem}.*.pyc"):
        compiled.unlink(missing_ok=True)
    _remove_if_empty(cache)


def _remove_if_empty(directory: Path) -> bool:
    """Remove a directory that holds nothing but what Python compiled. Returns whether it is gone."""
    cache = directory / "__pycache__"
    try:
        if cache.is_dir() and list(directory.iterdir()) == [cache]:
            if any(each.suffix != ".pyc" for each in cache.iterdir()):
                return False
            shutil.rmtree(cache)
        directory.rmdir()
    except FileNotFoundError:
        return not directory.exists()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _read_journal(stage: Path) -> Journal | None:
    path = stage / _JOURNAL
    try:
        journal = msgspec.json.decode(path.read_bytes(), type=Journal)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise PatchesError(f"{path} is not of this program ({error}): look at it, and remove {stage}") from error
    strange = [
        each for each in [*(entry.path for entry in journal.entries), *journal.directories] if not is_plain_path(each)
    ]
    if strange:
        raise PatchesError(f"{path} is not of this program (it names {strange[0]}): look at it, and remove {stage}")
    return journal


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_parents(tree: Tree, journal: Journal) -> None:
    for directory in {tree.locate(entry.path).parent for entry in journal.entries}:
        if directory.is_dir():
            _sync(directory)


def _unwritable(tree: Tree, error: OSError, outcome: str = "nothing was changed") -> str:
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "make room; "
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "make it writable; "
    # Of a rename it is the target. What is in the staging directory says nothing to the user.
    names = [Path(os.fsdecode(name)) for name in (error.filename2, error.filename) if isinstance(name, (str, bytes))]
    where = next((name for name in names if name.is_relative_to(tree.package)), tree.holder)
    return f"{where} cannot be written ({error.strerror or error}): {hint}{outcome}"
