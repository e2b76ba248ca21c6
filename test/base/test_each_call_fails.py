"""Whichever call of the file system fails, or is the last one of a process: what was there stays, or what is new is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.bad_files import BadFiles
from kit.confined import run_python

# Run under the rules, all in one process: each operation, with each of its calls failing by each errno. It prints, for
# each operation, the calls that it makes, and what was wrong after one of them.
_SEARCH = """
import errno, itertools, json, os, shutil, sys
from pathlib import Path
from kit.bad_files import EVERY, BadFiles
from kit.bundles import identity
from sglang_warmstart.base import files
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache
from sglang_warmstart.deepgemm.marker import Markers, TargetKernels
from sglang_warmstart.deepgemm.target import KernelUse, Target

how, place = sys.argv[1], Path(sys.argv[2])
bad, root = BadFiles(place, is_new=False), place / "root"
cubin = b"\\x7fELF\\x02\\x01\\x01" + bytes(57)
name = "kernel.gemm." + 32 * "0"
cache = KernelCache(root / "cache")
target = Target(kernel_type="GEMM", n=1, k=1, num_groups=1, num_sms=1, m_max=1)

def nothing():
    pass

def directory():
    files.publish(root / "deep" / "place", lambda it: [files.write_synced(it / each, b"new") for each in "ab"], root / "tmp")

def old_file():
    root.mkdir()
    (root / "file").write_bytes(b"old")

def file():
    files.write_atomically(root / "file", b"new")

def kernel():
    cache.publish(name, "source", cubin)

def half():
    cache.path(name).mkdir(parents=True)
    (cache.path(name) / "kernel.cu").write_bytes(b"source")

def old_marker():
    kernel()
    Markers(cache, identity()).add({"rank": "0"}, ())

def marker():
    Markers(cache, identity()).add({"rank": "0"}, [TargetKernels(target, (KernelUse(1, name),))])

def tree():
    # Locks are of no account.
    found = {str(path.relative_to(root)): path.read_text("latin-1") for path in root.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if "/locks/" not in path}

def settle():
    # What a process that was ended has left out of sight.
    for tmp in root.rglob("tmp"):
        shutil.rmtree(tmp)
    for path in root.rglob("*.????????"):
        path.unlink()

def fresh(before):
    shutil.rmtree(root, ignore_errors=True)
    before()

found = {}
for title, before, operation in (
    ("a directory", nothing, directory), ("a file", nothing, file), ("a file again", old_file, file),
    ("a kernel", nothing, kernel), ("half a kernel", half, kernel), ("a marker", old_marker, marker),
):
    fresh(before)
    old = tree()
    operation()
    new = tree()
    # Of half a kernel, each file by itself.
    states = [old, new] if title != "half a kernel" else [{**old, **dict(part)} for count in range(len(new) + 1)
        for part in itertools.combinations(new.items(), count)]
    wrong, calls = [], 0
    numbers = ("ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EIO", "EPERM") if how != "kill" else ("EPERM",)
    for number in numbers:
        for n in itertools.count(1):
            fresh(before)
            last = {"last": n} if how == "once" else {}
            rule = bad.set("kill" if how == "kill" else "refuse", EVERY, root, number=getattr(errno, number), first=n, **last)
            raised = ""
            try:
                if how != "kill":
                    operation()
                elif (child := os.fork()) == 0:
                    operation()
                    os._exit(0)
                else:
                    os.waitpid(child, 0)
            except (OSError, CacheError):
                raised = "an error"
            rule.lift()
            if not rule.fired:
                break
            calls = max(calls, n)
            if how != "once":
                settle()
            if (is_now := tree()) not in states:
                wrong.append((number, n, raised, sorted(is_now)))
            elif raised and is_now == new != old:
                wrong.append((number, n, "an error, and it is there", sorted(is_now)))
            elif not raised and how != "kill" and is_now != new:
                wrong.append((number, n, "no error, and it is not there", sorted(is_now)))
    found[title] = (calls, wrong)
print(json.dumps(found))
"""


@pytest.mark.parametrize("how", ["once", "from then on", "kill"])
def test_what_is_published_is_old_or_new(how: str, tmp_path: Path) -> None:
    found = json.loads(run_python(_SEARCH, how, str(tmp_path), environment=BadFiles(tmp_path).environment))
    for title, (calls, wrong) in found.items():
        assert calls >= 5, f"{title}: the calls were not seen"
        assert wrong == [], title
