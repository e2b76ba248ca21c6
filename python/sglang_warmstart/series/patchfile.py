"""Read one patch as ``git format-patch`` writes it."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from io import StringIO
from pathlib import Path

from unidiff import errors as unidiff_errors
from unidiff import patch as unidiff

from sglang_warmstart.series.errors import PatchesError
from sglang_warmstart.series.hunks import Hunk

# Where git itself ends the message: at the line before the diffstat, or where a diff begins.
_END_OF_MESSAGE = re.compile(rb"^(?:---\r?$|diff -)", re.MULTILINE)
_DIFF = re.compile(rb"^diff --git ", re.MULTILINE)
_PREFIX = re.compile(r"^(?:\[[^]]*\]\s*)+")
_UPSTREAM = re.compile(r"^Upstream:[ \t]*(\S.*?)\s*$", re.MULTILINE)
# Between the head of a file and its hunks. All else is a rename, a copy, a change of mode or something binary.
_KNOWN = re.compile(r"index [0-9a-f]+\.\.[0-9a-f]+(?: 100(?:644|755))?|(?:new|deleted) file mode 100(?:644|755)")
_SIGNATURE = "-- "


class Kind(Enum):
    """What a patch does to a file."""

    CHANGE = "changed"
    ADD = "added"
    DELETE = "deleted"

    def reversed(self) -> Kind:
        """What the opposite does."""
        return {Kind.ADD: Kind.DELETE, Kind.DELETE: Kind.ADD}.get(self, self)


@dataclass(frozen=True)
class FileChange:
    """What a patch does to one file.

    Args:
        path: relative to the directory that holds the package, with ``/``.
        kind: whether the file is there before and after.
        hunks: its changes, in the order of the file. One at most if it is added or deleted.
        executable: the mode of a file that is added or deleted.
    """

    path: str
    kind: Kind
    hunks: tuple[Hunk, ...]
    executable: bool = False

    @property
    def content(self) -> bytes:
        """All of a file that is added or deleted."""
        return b"".join(line for hunk in self.hunks for line in hunk.new or hunk.old)

    def reversed(self) -> FileChange:
        """The change that takes this one back."""
        hunks = tuple(hunk.reversed() for hunk in self.hunks)
        return FileChange(self.path, self.kind.reversed(), hunks, self.executable)


@dataclass(frozen=True)
class Patch:
    """One patch of a series.

    Args:
        number: place in the series, from 1.
        source: the file it was read from.
        subject: first line of its message, without ``[PATCH 1/6]``.
        upstream: what its message says after ``Upstream:``.
        files: what it does.
        added, removed: lines.
    """

    number: int
    source: Path
    subject: str
    upstream: str | None
    files: tuple[FileChange, ...]
    added: int
    removed: int


def is_plain_path(path: str) -> bool:
    """Whether a path lies in the package, and is spelled in the one way that git does not quote."""
    package, *parts = path.split("/")
    plain = re.fullmatch(r"[ -~]+", path) is not None and not set(path) & set('"\\')
    return package == "sglang" and bool(parts) and plain and not {"", ".", ".."} & set(parts)


def read(source: Path, number: int) -> Patch:
    """Read a patch.

    Raises:
        PatchesError: it cannot be read, or does something that is not done here (see ``_KNOWN``).
    """
    try:
        data = source.read_bytes()
    except OSError as error:
        raise PatchesError(f"{source}: the patch cannot be read ({error.strerror or error})") from error
    end = _END_OF_MESSAGE.search(data)
    start = _DIFF.search(data, end.start()) if end else None
    if end is None or start is None:
        raise PatchesError(f"{source}: no diff in it: it has to be as `git format-patch` writes it")
    message = email.message_from_bytes(data[: end.start()], policy=email.policy.default)
    subject = " ".join(str(message["subject"] or source.stem).split())
    body = data[: end.start()].decode("utf-8", "replace").partition("\n\n")[2]
    upstream = _UPSTREAM.findall(body)
    # Latin-1 takes every byte for a character, and gives it back.
    text = data[start.start() :].decode("latin-1")
    try:
        diff = unidiff.PatchSet(StringIO(text))
    except unidiff_errors.UnidiffParseError as error:
        raise PatchesError(f"{source}: the patch cannot be read ({str(error).strip()})") from error
    return Patch(
        number=number,
        source=source,
        subject=_PREFIX.sub("", subject),
        upstream=", ".join(each for each in upstream if each != "none") or None,
        files=tuple(_file_change(source, each) for each in diff),
        added=diff.added,
        removed=diff.removed,
    )


def _file_change(source: Path, file: unidiff.PatchedFile) -> FileChange:
    head, *info = [line.rstrip("\r\n") for line in file.patch_info or [""]]
    if _SIGNATURE in info:
        # Of a file without hunks, what follows the diff is taken for more of its head.
        info = info[: info.index(_SIGNATURE)]
    unknown = [line for line in info if line and not _KNOWN.fullmatch(line)]
    if file.is_binary_file or unknown:
        what = unknown[0] if unknown else "binary"
        raise PatchesError(f"{source}: `{head}`: `{what}`: only text is patched, without renames and changes of mode")
    kind = Kind.CHANGE
    if "/dev/null" in (file.source_file, file.target_file):
        kind = Kind.ADD if file.source_file == "/dev/null" else Kind.DELETE
    path = (file.source_file if kind is Kind.DELETE else file.target_file)[2:]
    if not is_plain_path(path) or head != f"diff --git a/{path} b/{path}":
        raise PatchesError(f"{source}: `{head}`: not a file in `sglang/`, or not one file under one plain name")
    hunks = tuple(_hunk(number, each) for number, each in enumerate(file, 1))
    whole = {Kind.ADD: [hunk.old for hunk in hunks], Kind.DELETE: [hunk.new for hunk in hunks]}.get(kind, [])
    if len(whole) > 1 or any(whole) or (kind is Kind.CHANGE and not hunks):
        raise PatchesError(f"{source}: {path}: its hunks do not fit a file that is {kind.value}")
    return FileChange(path, kind, hunks, executable=any(line.endswith("file mode 100755") for line in info))


def _hunk(number: int, hunk: unidiff.Hunk) -> Hunk:
    old: list[bytes] = []
    new: list[bytes] = []
    last: Iterable[list[bytes]] = ()
    trailing = 0
    for line in hunk:
        if line.line_type == "\\":  # No newline at end of file
            for side in last:
                side[-1] = side[-1].removesuffix(b"\n")
        elif line.line_type in " +-" and line.line_type:
            last = {" ": (old, new), "-": (old,), "+": (new,)}[line.line_type]
            trailing = trailing + 1 if line.line_type == " " else 0
            for side in last:
                side.append(line.value.encode("latin-1"))
    return Hunk(number, hunk.source_start, hunk.target_start, tuple(old), tuple(new), trailing)
