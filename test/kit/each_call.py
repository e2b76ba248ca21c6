"""Have each operation that publishes something fail in each of its calls, in turn, in a process under rules.

It prints, for each operation, how many calls it makes, and what was wrong after one of them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.base import files
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache
from sglang_warmstart.deepgemm.marker import Markers, TargetKernels
from sglang_warmstart.deepgemm.target import KernelUse, Target

from kit.bad_files import EVERY, LOST, BadFiles, Rule
from kit.bundles import identity

NUMBERS = ("ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EIO", "EPERM")
NAME = "kernel.gemm." + 32 * "0"
TARGET = Target(kernel_type="GEMM", n=1, k=1, num_groups=1, num_sms=1, m_max=1)

Tree = dict[str, bytes]


@dataclass
class Operations:
    """What is done in an empty directory, ``root``: methods with "before" in their name make the old state."""

    root: Path

    @property
    def cache(self) -> KernelCache:
        return KernelCache(self.root / "cache")

    def nothing_before(self) -> None:
        """The directory itself need not be there."""

    def a_directory(self) -> None:
        def build(place: Path) -> None:
            for name in "ab":
                files.write_synced(place / name, b"new")

        files.publish(self.root / "deep" / "place", build, self.root / "tmp")

    def a_file_before(self) -> None:
        self.root.mkdir()
        (self.root / "file").write_bytes(b"old")

    def a_file(self) -> None:
        files.write_atomically(self.root / "file", b"new")

    def a_kernel(self) -> None:
        self.cache.publish(NAME, "source", b"\x7fELF\x02\x01\x01" + bytes(57))

    def half_a_kernel_before(self) -> None:
        self.cache.path(NAME).mkdir(parents=True)
        (self.cache.path(NAME) / "kernel.cu").write_bytes(b"source")

    def a_marker_before(self) -> None:
        self.a_kernel()
        Markers(self.cache, identity()).add({"rank": "0"}, ())

    def a_marker(self) -> None:
        known = TargetKernels(TARGET, (KernelUse(1, NAME),))
        Markers(self.cache, identity()).add({"rank": "0"}, [known])

    def tree(self) -> Tree:
        """What others see: not the files of locks, nor what a process that was ended has not brought to its place."""
        found = (path for path in self.root.rglob("*") if path.is_file() and path.parent.name != "locks")
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def settle(self) -> None:
        """Remove what a process that was ended has left out of sight."""
        for scratch in list(self.root.rglob("tmp")):
            shutil.rmtree(scratch)
        for path in list(self.root.rglob("*.????????")):
            path.unlink()


def search(
    how: str, bad: BadFiles, at: Operations, kinds: tuple[str, ...], before: Callable[[], None], run: Callable[[], None]
) -> tuple[int, list[object]]:
    """One operation. Returns the number of its calls, and what was wrong."""

    def fresh() -> None:
        shutil.rmtree(at.root, ignore_errors=True)
        before()

    def attempt(rule: Rule) -> bool:
        """Returns whether it said that it failed."""
        try:
            if how != "kill":
                run()
            elif (child := os.fork()) == 0:
                run()
                os._exit(0)
            else:
                os.waitpid(child, 0)
        except (OSError, CacheError):
            return True
        finally:
            rule.lift()
        return False

    fresh()
    old = at.tree()
    run()
    new = at.tree()
    # Half a kernel is completed file by file: each is there or not.
    parts = [part for count in range(len(new) + 1) for part in itertools.combinations(new.items(), count)]
    states = [{**old, **dict(part)} for part in parts] if before == at.half_a_kernel_before else [old, new]
    wrong: list[object] = []
    calls = 0
    for number in NUMBERS if how != "kill" else NUMBERS[:1]:
        for n in itertools.count(1):
            fresh()
            last = {"last": n} if how == "once" else {}
            effect = "kill" if how == "kill" else "refuse"
            rule = bad.set(effect, kinds, at.root, number=getattr(errno, number), first=n, **last)
            failed = attempt(rule)
            if not rule.fired:
                break
            calls = max(calls, n)
            if how != "once":
                at.settle()
            now = at.tree()
            problem = (
                "it is neither"
                if now not in states
                else "it is there, and an error was raised"
                if failed and now == new != old
                else "it is not there, and no error was raised"
                if not failed and how != "kill" and now != new
                else ""
            )
            if problem:
                wrong.append((number, n, problem, sorted(now)))
    return calls, wrong


def main() -> None:
    """How: "once", "from then on" or "kill"; and a directory, in which the rules are."""
    how, place = sys.argv[1], Path(sys.argv[2])
    bad, at = BadFiles(place, is_new=False), Operations(place / "root")
    operations = (
        ("a directory", EVERY, at.nothing_before, at.a_directory),
        ("a file", EVERY, at.nothing_before, at.a_file),
        ("a file again", EVERY, at.a_file_before, at.a_file),
        ("a kernel", EVERY, at.nothing_before, at.a_kernel),
        ("half a kernel", EVERY, at.half_a_kernel_before, at.a_kernel),
        # The last thing of all is to close the file of its lock.
        ("a marker again", LOST, at.a_marker_before, at.a_marker),
    )
    print(json.dumps({title: search(how, bad, at, kinds, before, run) for title, kinds, before, run in operations}))
