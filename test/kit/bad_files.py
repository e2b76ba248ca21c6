"""A file system that delays, refuses or lies, for the processes that have :attr:`BadFiles.environment`.

A library that is loaded before the C library (bad_files.c) looks at each call against the rules that a test has set.
All of them share one map of memory, so a rule holds from the moment in which it is set until it is lifted, also in the
middle of a start. What the linker and the kernel do by themselves is not seen, nor what C's buffered files write.
"""

from __future__ import annotations

import errno
import mmap
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

SOURCE = Path(__file__).with_suffix(".c")

# In the order of bad_files.c. "open" is for reading, "create" each other way of opening; "change" is of times or modes.
CALLS = (
    *("look", "open", "create", "tmpfile", "read", "write", "close", "sync", "sync_directory", "lock", "rename"),
    *("link", "mkdir", "rmdir", "unlink", "list", "change"),
)
# What needs a file system that can be written; all that there is; and what fails where a mount or a permission is gone.
WRITES = tuple(CALLS[each] for each in (2, 3, 5, 7, 8, 10, 11, 12, 13, 14, 16))
CHANGES = tuple(each for each in WRITES if each not in ("write", "sync", "sync_directory"))
EVERY = CALLS
LOST = tuple(each for each in EVERY if each != "close")

Effect = Literal["refuse", "delay", "hang", "kill", "hide", "tear", "clock"]
_EFFECTS = ("", "refuse", "delay", "hang", "kill", "hide", "tear", "clock")

_RULE = struct.Struct("=IIQQQQQiIII448s")
_RULES_AT, _RULES = 16 + 64 * 16, 64
_FOR_EVER = (1 << 63) - 1


@cache
def layer() -> Path:
    """The library, built once in this process. A test that needs it is skipped where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = Path(tempfile.mkdtemp(prefix="bad-files-")) / "bad_files.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-pthread", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Rule:
    """A rule that was set."""

    files: BadFiles
    number: int

    @property
    def met(self) -> int:
        """How many calls it was about, in all processes."""
        return self.files.counts(self.number)[0]

    @property
    def fired(self) -> int:
        """In how many of them it took effect."""
        return self.files.counts(self.number)[1]

    def lift(self) -> None:
        """From now on it does nothing. Calls that hang by it go on."""
        self.files.activate(self.number, False)


class BadFiles:
    """The rules of the processes of one test.

    Args:
        directory: for the file with the rules; no rule is to be about it.
        is_new: whether there are no rules yet.
    """

    def __init__(self, directory: Path, is_new: bool = True) -> None:
        self._path = directory / "bad-files"
        if is_new:
            self._path.write_bytes(bytes(_RULES_AT + _RULES * _RULE.size))
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._next = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be under the rules, with all that it starts."""
        return {"LD_PRELOAD": str(layer()), "KIT_BAD_FILES": str(self._path)}

    def seed(self, number: int) -> None:
        """Have what is left to chance be the same for the same numbers of processes."""
        struct.pack_into("=Q", self._map, 8, number)

    def refuse(self, calls: tuple[str, ...], below: Path, number: int, **when: int) -> Rule:
        """Have calls fail with an errno. ``when``: as of :meth:`set`."""
        return self.set("refuse", calls, below, number=number, **when)

    def vanish(self, below: Path, number: int = errno.ESTALE) -> Rule:
        """From now on nothing is there."""
        return self.refuse(LOST, below, number)

    def set(
        self,
        effect: Effect,
        calls: tuple[str, ...],
        below: Path,
        *,
        number: int = 0,
        ms: int = 0,
        first: int = 1,
        last: int = _FOR_EVER,
        per_mille: int = 0,
    ) -> Rule:
        """Set a rule.

        Args:
            effect: "refuse" (with an errno), "delay", "hang" (no signal but SIGKILL ends it), "kill" (the process),
                "hide" (after a rename onto a path, look-ups say ENOENT for a while), "tear" (a rename shows its files
                one by one, or an empty one first), "clock" (of another host).
            calls: kinds of calls, of ``CALLS``.
            below: the path, with all below it.
            number: an errno, or the seconds by which a clock goes ahead.
            ms: milliseconds of a delay (the most, if it is left to chance), or of being hidden or torn.
            first, last: the calls in which it takes effect, counted from 1 and from now, in all processes together.
            per_mille: in how many of a thousand of them, at random; 0 for all.
        """
        known = {*calls, "rename"} if effect == "hide" else set(calls)
        bits = sum(1 << CALLS.index(call) for call in known)
        slot = self._next % _RULES
        self._next += 1
        self.activate(slot, False)
        where = str(below).encode()
        values = (_EFFECTS.index(effect), bits, first, last, 0, 0, number, ms, per_mille, 0, where)
        at = _RULES_AT + slot * _RULE.size
        _RULE.pack_into(self._map, at, 0, *values)
        self.activate(slot, True)
        return Rule(self, slot)

    def lift_all(self) -> None:
        """Have a file system that is as it should be."""
        for slot in range(_RULES):
            self.activate(slot, False)

    def activate(self, slot: int, value: bool) -> None:
        """Of a rule."""
        struct.pack_into("=I", self._map, _RULES_AT + slot * _RULE.size, int(value))

    def counts(self, slot: int) -> tuple[int, int]:
        """Of a rule: calls that it was about, and those in which it took effect."""
        values = _RULE.unpack_from(self._map, _RULES_AT + slot * _RULE.size)
        return values[5], values[6]
