"""What a series of patches makes of a tree, worked out in memory."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from sglang_warmstart.series import hunks
from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.patchfile import FileChange, Kind, Patch
from sglang_warmstart.series.series import Series
from sglang_warmstart.series.tree import Tree


@dataclass(frozen=True)
class File:
    """A file that is there."""

    data: bytes
    executable: bool


# Files by their path in a patch; None where there is no file.
Files = Mapping[str, File | None]


class Status(Enum):
    """How a patch stands to a tree."""

    APPLIES = "applies"
    APPLIED = "already applied"
    FAILS = "does not apply"


@dataclass(frozen=True)
class Failure:
    """Why a patch does not apply.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
        hunk: the number of the hunk that does not fit, if it is one.
        line: number of the line where it was expected.
        expected: the first line of it that is not there.
    """

    path: str
    reason: str
    hunk: int | None = None
    line: int | None = None
    expected: str | None = None


@dataclass(frozen=True)
class PatchState:
    """One patch and how it stands. It has failures if it does not apply."""

    patch: Patch
    status: Status
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Change:
    """A file that is to become another one. None is no file."""

    path: str
    before: File | None
    after: File | None


@dataclass(frozen=True)
class Report:
    """How a series stands to a tree.

    Args:
        tree, series: what was looked at.
        states: of each patch, in order.
        applying: what changes if all that are not applied yet are applied. Complete only if ``ok``.
        reverting: what changes if all that are applied are taken back.
    """

    tree: Tree
    series: Series
    states: tuple[PatchState, ...]
    applying: tuple[Change, ...]
    reverting: tuple[Change, ...]

    @property
    def ok(self) -> bool:
        """Whether each patch applies or is applied."""
        return not self.having(Status.FAILS)

    def having(self, status: Status) -> list[Patch]:
        """The patches that stand so."""
        return [state.patch for state in self.states if state.status is status]


class _NoPlainFileError(Exception):
    """Something that no patch may write to; says what."""


class _View:
    """The files of a tree as they would be. Those that nobody has changed are read from the disk when asked for."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._read: dict[str, File | None] = {}
        self._written: dict[str, File | None] = {}

    def copy(self) -> _View:
        copy = _View(self._tree)
        copy._read = self._read  # one reading for all: the disk is not looked at twice
        copy._written = dict(self._written)
        return copy

    def get(self, path: str) -> File | None:
        return self._written[path] if path in self._written else self._on_disk(path)

    def write(self, files: Files) -> None:
        self._written.update(files)

    def changes(self) -> tuple[Change, ...]:
        """What is to be written to the disk, by path."""
        changes = (Change(path, self._on_disk(path), self._written[path]) for path in sorted(self._written))
        return tuple(change for change in changes if change.before != change.after)

    def _on_disk(self, path: str) -> File | None:
        if path not in self._read:
            self._read[path] = _read(self._tree, path)
        return self._read[path]


def _read(tree: Tree, path: str) -> File | None:
    at = tree.package
    *directories, _ = path.split("/")[1:]
    try:
        # What lies behind a link is not in the tree, and a link in the place of a file would be replaced by a file.
        for name in directories:
            at = at / name
            if at.is_symlink() or (at.exists() and not at.is_dir()):
                raise _NoPlainFileError(f"{at} is not a plain directory")
        at = tree.locate(path)
        mode = at.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
            raise _NoPlainFileError(f"it is {kind}")
        return File(at.read_bytes(), bool(mode & stat.S_IXUSR))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PatchesError(f"{at} cannot be read ({error.strerror or error})") from error


def examine(tree: Tree, series: Series) -> Report:
    """Find out how each patch stands.

    Raises:
        PatchesError: a file cannot be read.
    """
    unpatched = _View(tree)
    applied: list[Patch] = []
    for patch in reversed(series.patches):
        files, failures = _attempt(unpatched, patch.files, reverse=True)
        if not failures:
            unpatched.write(files)
            applied.insert(0, patch)

    # The patches below an applied one are tried without it, as the series means them. But where the applied ones
    # would not come back to the very same lines, they stay, and the others are tried on top of them.
    replayed = unpatched.copy()
    faithful = not any(_attempt_and_write(replayed, patch) for patch in applied) and not replayed.changes()
    patched = unpatched.copy() if faithful else _View(tree)

    states = []
    for patch in series.patches:
        if patch in applied and not faithful:
            states.append(PatchState(patch, Status.APPLIED))
            continue
        failures = _attempt_and_write(patched, patch)
        fits = Status.APPLIED if patch in applied else Status.APPLIES
        states.append(PatchState(patch, Status.FAILS if failures else fits, tuple(failures)))
    return Report(tree, series, tuple(states), patched.changes(), unpatched.changes())


def _attempt_and_write(view: _View, patch: Patch) -> list[Failure]:
    files, failures = _attempt(view, patch.files, reverse=False)
    if not failures:
        view.write(files)
    return failures


def _attempt(view: _View, changes: Sequence[FileChange], *, reverse: bool) -> tuple[Files, list[Failure]]:
    """What a patch, or its opposite, would make of the files it names. All of it counts or nothing."""
    files: dict[str, File | None] = {}
    failures: list[Failure] = []
    for change in [each.reversed() for each in reversed(changes)] if reverse else changes:
        try:
            before = files[change.path] if change.path in files else view.get(change.path)
        except _NoPlainFileError as error:
            failures.append(Failure(change.path, str(error)))
            continue
        files[change.path], wrong = _change(change, before)
        failures += wrong
    return files, failures


def _change(change: FileChange, before: File | None) -> tuple[File | None, list[Failure]]:
    if change.kind is Kind.ADD:
        if before is None:
            return File(change.content, change.executable), []
        same = before.data == change.content
        return before, [
            Failure(change.path, "file is already there" if same else "file is already there and different")
        ]
    if before is None:
        return None, [Failure(change.path, "file is not there")]
    after, misfits = hunks.apply(before.data, change.hunks)
    if change.kind is Kind.DELETE and after and not misfits:
        return before, [Failure(change.path, "file has more lines than the patch removes")]
    failures = [_failure(change, before, misfit) for misfit in misfits]
    return (None if change.kind is Kind.DELETE else File(after, before.executable)), failures


def _failure(change: FileChange, before: File, misfit: hunks.Misfit) -> Failure:
    _, there = hunks.apply(before.data, [misfit.hunk.reversed()])
    reason = misfit.reason if there else "this hunk is applied already"
    expected = None
    if there and misfit.expected is not None:
        expected = misfit.expected.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return Failure(change.path, reason, misfit.hunk.number, misfit.line, expected)
