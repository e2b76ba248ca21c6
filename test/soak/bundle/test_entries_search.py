"""Entries are put into a cache by many processes at once, and into any tree. Short: test/bundle/test_entries.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.cache_entries import Tree, has_no_staging, in_memory, staged, tree_of, write_tree
from kit.environment import python_path
from sglang_warmstart.bundle.entries import Published, publish
from sglang_warmstart.bundle.manifest import BundleError


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory."""
    with in_memory() as path:
        yield path


def _publish(place: Path, files: Mapping[str, bytes]) -> Published:
    return publish(place / "root", *staged(place, files))


_PUBLISHER = """
import sys
from pathlib import Path
import msgspec
from sglang_warmstart.bundle.entries import publish
from sglang_warmstart.libraries.cached import CachedFile
files = msgspec.json.decode(sys.stdin.buffer.readline(), type=list[CachedFile])
contents = Path(sys.argv[1])
for root in sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline()
    published = publish(Path(root), files, contents)
    print(published.new, published.kept, flush=True)
"""


def test_processes_at_once_give_whole_entries(place: Path) -> None:
    # Each process has bytes of its own, and no entry may have those of two.
    names = [f"{entry}/{name}" for entry in "abcdefgh" for name in "xyz"]
    roots = [place / f"root{number}" for number in range(8)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(4):
            (place / str(number)).mkdir()
            files, contents = staged(place / str(number), {name: b"%d" % number * 10_000 for name in names})
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _PUBLISHER, str(contents), *map(str, roots)],
                    env={**os.environ, "PYTHONPATH": python_path(Path(__file__).parents[2])},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(files) + b"\n")
            process.stdin.flush()
            processes.append(process)
        for root in roots:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
            # Whoever looks meanwhile sees whole entries as well.
            while not all((root / entry).is_dir() for entry in "abcdefgh"):
                assert all(process.poll() is None for process in processes)
                for entry in root.glob("[a-z]"):
                    assert _is_whole(entry)
            outcomes = []
            for process in processes:
                assert process.stdout is not None
                outcomes.append(tuple(map(int, process.stdout.readline().split())))
            assert sum(new for new, _ in outcomes) == len(names)
            assert all(new + kept == len(names) for new, kept in outcomes)
            assert sorted(path.name for path in root.iterdir()) == list("abcdefgh")
            assert all(map(_is_whole, root.iterdir()))


def _is_whole(entry: Path) -> bool:
    files = sorted(entry.iterdir())
    return [file.name for file in files] == list("xyz") and len({file.read_bytes() for file in files}) == 1


# All of it, for any trees

_names = st.sampled_from(["a", "b", "c"])
_paths = st.lists(_names, min_size=1, max_size=4).map("/".join)


@st.composite
def _trees(draw: st.DrawFn) -> tuple[Tree, list[str]]:
    """Files, and directories that may be empty."""
    tree: Tree = {}
    for path in draw(st.lists(_paths, max_size=8, unique=True)):
        if not any(path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in tree):
            tree[path] = draw(st.binary(max_size=2))
    directories = [
        path
        for path in draw(st.lists(_paths, max_size=4))
        if not any(f"{path}/".startswith(f"{other}/") for other in tree)
    ]
    return tree, directories


def _meant(bundle: Tree, there: Tree, directories: list[str]) -> Tree | None:
    """What has to be there afterwards; None where it has to be refused."""
    after = dict(there)
    parents = {path.rpartition("/")[0] for path in bundle}
    for path, data in bundle.items():
        parent = path.rpartition("/")[0]
        if any(f"{parent}/".startswith(f"{other}/") for other in there):
            return None
        holds_others = not parent or any(other.startswith(f"{parent}/") for other in parents)
        place = path if holds_others else parent
        if any(f"{other}/".startswith(f"{place}/") for other in there):
            continue
        if any(other.startswith(f"{place}/") or (holds_others and other == place) for other in directories):
            continue
        after[path] = data
    return after


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_trees(), _trees())
def test_any_tree_is_put_into_any_other_as_it_is_meant(
    bundle: tuple[Tree, list[str]], there: tuple[Tree, list[str]]
) -> None:
    with in_memory() as place:
        root = place / "root"
        root.mkdir()
        write_tree(root, there[0])
        for directory in there[1]:
            (root / directory).mkdir(parents=True, exist_ok=True)
        before = {path: (root / path).stat() for path in there[0]}
        meant = _meant(bundle[0], *there)
        if meant is None:
            with pytest.raises(BundleError, match="is a link or a file"):
                _publish(place, bundle[0])
            meant = there[0]
        else:
            new = len(meant) - len(there[0])
            assert _publish(place, bundle[0]) == Published(new, len(bundle[0]) - new)
            assert _publish(place, bundle[0]) == Published(0, len(bundle[0]))
        assert tree_of(root) == meant
        for path, status in before.items():
            now = (root / path).stat()
            assert (now.st_ino, now.st_mtime_ns, now.st_size) == (status.st_ino, status.st_mtime_ns, status.st_size)
        assert has_no_staging(root)
