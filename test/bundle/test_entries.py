"""An entry of a cache is there as a whole or not at all, whatever happens while it is put there."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kit.cache_entries import THEN, has_no_staging, in_memory, staged, tree_of, visible, write_tree
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from sglang_warmstart.bundle import entries
from sglang_warmstart.bundle.entries import Published, publish
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.libraries.cached import is_staging

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())

# Of one entry, of two that lie below a directory, and of a directory that has files and an entry below it.
FILES = {
    "one/a.cubin": b"cubin",
    "one/a.json": b"{}",
    "two/deep/x": b"x",
    "two/deep/y": b"",
    "two/other/x": b"x",
    "three/log": b"log",
    "three/op/so": b"so",
    "alone": b"alone",
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of syncs take long on a disk."""
    with in_memory() as path:
        yield path


def _publish(place: Path, files: Mapping[str, bytes] = FILES) -> Published:
    return publish(place / "root", *staged(place, files))


def test_all_files_are_there_with_their_times(place: Path) -> None:
    assert _publish(place) == Published(len(FILES), 0)
    root = place / "root"
    assert tree_of(root) == FILES
    for number, path in enumerate(FILES):
        status = (root / path).stat()
        assert status.st_mtime_ns == THEN + number
        assert stat.S_ISREG(status.st_mode)
    assert sorted(path.name for path in root.iterdir()) == ["alone", "one", "three", "two"]


def test_what_is_there_stays(place: Path) -> None:
    _publish(place)
    before = {path: (place / "root" / path).stat() for path in FILES}
    # Another machine's compiler may have written other bytes.
    other = {path: data + b" otherwise" for path, data in FILES.items()}
    assert _publish(place, other) == Published(0, len(FILES))
    assert {path: (place / "root" / path).stat() for path in FILES} == before
    assert tree_of(place / "root") == FILES


def test_no_files_make_no_root(place: Path) -> None:
    assert _publish(place, {}) == Published(0, 0)
    assert not (place / "root").exists()


@pytest.mark.parametrize("there", ["one/b", "one/a.json", "one/tmp.pid_1_x/a.json"])
def test_nothing_is_added_to_an_entry_that_is_there(there: str, place: Path) -> None:
    write_tree(place / "root", {there: b"theirs"})
    assert _publish(place) == Published(len(FILES) - 2, 2)
    assert tree_of(place / "root") == {there: b"theirs", **{path: FILES[path] for path in FILES if "one/" not in path}}


def test_an_empty_directory_is_no_entry_yet(place: Path) -> None:
    # Triton makes it before it compiles.
    (place / "root" / "one").mkdir(parents=True)
    assert _publish(place) == Published(len(FILES), 0)
    assert tree_of(place / "root") == FILES


def test_a_directory_that_holds_entries_gets_the_files_that_it_lacks(place: Path) -> None:
    there = {"three/log": b"their log", "three/other/so": b"so", "somebody's": b""}
    write_tree(place / "root", there)
    assert _publish(place) == Published(len(FILES) - 1, 1)
    assert tree_of(place / "root") == FILES | there
    assert (place / "root" / "alone").stat().st_nlink == 1


def test_what_appears_meanwhile_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(place)
    # As if nothing had been there when it looked.
    monkeypatch.setattr(entries, "_names", lambda _: set())
    assert _publish(place, {path: b"other" for path in FILES}) == Published(0, len(FILES))
    assert tree_of(place / "root") == FILES


def test_nothing_is_copied_for_what_is_there(place: Path) -> None:
    _publish(place)
    files, contents = staged(place, FILES)
    for content in contents.iterdir():
        content.write_bytes(b"")
    changes = _count_changes(lambda: publish(place / "root", files, contents))
    assert "os.utime" not in changes


# Links and files in the way

_IN_THE_WAY = ["two", "two/deep", "one", "three", "three/op"]


@pytest.mark.parametrize("where", _IN_THE_WAY)
@pytest.mark.parametrize("what", ["a link", "a dangling link", "a relative link", "a file"])
def test_no_link_is_followed_out_of_the_root(where: str, what: str, place: Path) -> None:
    root, outside = place / "root", place / "outside"
    (root / where).parent.mkdir(parents=True)
    if what == "a file":
        (root / where).write_bytes(b"theirs")
    else:
        if what != "a dangling link":
            outside.mkdir()
        (root / where).symlink_to(os.path.relpath(outside, (root / where).parent) if "relative" in what else outside)
    before = tree_of(root)
    with pytest.raises(BundleError) as raised:
        _publish(place)
    assert str(raised.value) == (f"'{where}' in the cache {root} is a link or a file, and no directory: remove it")
    assert tree_of(root) == before
    assert has_no_staging(root)
    assert not outside.exists() or list(outside.iterdir()) == []


@pytest.mark.parametrize("where", _IN_THE_WAY)
def test_nor_one_that_is_made_meanwhile(where: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = place / "root", place / "outside"
    outside.mkdir()

    def make(*_: object) -> None:
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / where).symlink_to(outside)

    monkeypatch.setattr(entries, "_remove_left_behind", make)
    with pytest.raises(BundleError, match="is a link or a file"):
        _publish(place)
    assert list(outside.iterdir()) == []
    assert has_no_staging(root)


def test_a_link_in_the_place_of_a_file_stays(place: Path) -> None:
    root, outside = place / "root", place / "outside"
    root.mkdir()
    for target in ("alone", "three/log"):
        (root / target).parent.mkdir(exist_ok=True)
        (root / target).symlink_to(outside)
    assert _publish(place) == Published(len(FILES) - 2, 2)
    assert (root / "alone").is_symlink()
    assert not outside.exists()


def test_the_root_itself_may_be_a_link(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "root").symlink_to(place / "elsewhere")
    assert _publish(place) == Published(len(FILES), 0)
    assert tree_of(place / "elsewhere") == FILES


@pytest.mark.parametrize("path", ["../out", "one/../../out", "/out", "", "one//out", "./out", "one/", "a\nb"])
def test_a_path_that_is_none_is_refused(path: str, place: Path) -> None:
    files, contents = staged(place, {"one/a": b"a", path: b"b"})
    with pytest.raises(BundleError, match="is not put into the cache") as raised:
        publish(place / "root", files, contents)
    assert "\n" not in str(raised.value)
    assert not (place / "root").exists()


def test_a_file_without_content_is_refused(place: Path) -> None:
    files, contents = staged(place, FILES)
    (contents / files[-1].sha256).unlink()
    with pytest.raises(BundleError, match=r"'alone' is not put into the cache .*: there is no content for it"):
        publish(place / "root", files, contents)
    assert not (place / "root").exists()


# Many at once, and those that do not live to the end

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.utime"}


def _publish_until(number: int, act: Callable[[], None], place: Path) -> int:
    """Publish in a child in which something happens before its n-th change of the disk.

    Returns:
        Its status: 0 if it has published and made fewer changes, 1 for an error, 2 if it has published all the same.
    """
    child = os.fork()
    if child == 0:
        changes = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
                changes += 1
                if changes == number:
                    act()

        status = 99
        with contextlib.suppress(BaseException):
            files, contents = staged(place, FILES)
            sys.addaudithook(hook)
            try:
                publish(place / "root", files, contents)
                status = 0 if changes < number else 2
            except BundleError:
                status = 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count_changes(act: Callable[[], object]) -> list[str]:
    """The changes of the disk that a piece of work makes."""
    changes: list[str] = []
    counting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if counting and event in _CHANGES:
            changes.append(event)

    sys.addaudithook(hook)  # it cannot be taken back
    try:
        act()
    finally:
        counting = False
    return changes


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise OSError(28, "No space left on device")


THERE = {"one/b": b"theirs", "three/log": b"their log"}
MEANT = {**FILES, **THERE}
del MEANT["one/a.cubin"], MEANT["one/a.json"]


@pytest.mark.parametrize(("act", "status"), [(_kill, -signal.SIGKILL), (_fail, 1)], ids=["killed", "no room"])
def test_a_process_that_is_cut_off_leaves_no_half_entry(act: Callable[[], None], status: int, place: Path) -> None:
    root, half_done = place / "root", 0
    for number in range(1, 1000):
        write_tree(root, THERE)
        ended = _publish_until(number, act, place)
        if ended == 0:
            break
        found = visible(root)
        # To make a root that is there and to clear up afterwards may fail.
        assert ended == status or (ended == 2 and act is _fail and found == MEANT), number
        assert THERE.items() <= found.items() <= MEANT.items()
        for entry in ("two/deep/", "two/other/", "three/op/"):
            there = {path for path in found if path.startswith(entry)}
            assert there in (set(), {path for path in MEANT if path.startswith(entry)}), number
        half_done += found not in (THERE, MEANT)

        left = [path for path in root.iterdir() if is_staging(path.name)]
        assert len(left) <= 1
        _publish(place)
        assert visible(root) == MEANT
        for path in left:
            os.utime(path, (time.time() - 4000,) * 2)
        assert _publish(place).new == 0
        assert tree_of(root) == MEANT
        shutil.rmtree(root)
    assert number > 30
    assert half_done > 5


def test_only_what_was_left_long_ago_is_removed(place: Path) -> None:
    root = place / "root"
    (place / "outside").mkdir()
    old, young, link = (root / f".warmstart-{digit * 32}" for digit in "abc")
    others = [root / ".warmstart-notes", root / "old"]
    for path in (old, young, *others):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    link.symlink_to(place / "outside")
    for path in (old, *others):
        os.utime(path, (time.time() - 4000,) * 2)
    os.utime(link, (time.time() - 4000,) * 2, follow_symlinks=False)
    _publish(place)
    assert not old.exists()
    assert all(path.exists() for path in (young, link, *others))


# A disk that is full, or cannot be written

_PUBLISH = """
import resource, sys
from pathlib import Path
import msgspec
from sglang_warmstart.bundle.entries import publish
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.libraries.cached import CachedFile
root, contents, listed, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    print(publish(Path(root), msgspec.json.decode(listed, type=list[CachedFile]), Path(contents)))
except BundleError as error:
    print(error)
print("left", sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()))
"""


def _publish_elsewhere(place: Path, *, prefix: tuple[str, ...] = (), limit: int = 0) -> list[str]:
    files, contents = staged(place, {"a/small": b"small", "b/1": b"x" * 10, "b/2": b"x" * 100_000})
    (place / "root").mkdir()
    arguments = (str(place / "root"), str(contents), msgspec.json.encode(files).decode(), str(limit))
    return run_python(_PUBLISH, *arguments, prefix=prefix).splitlines()


def test_a_file_that_may_not_grow_is_an_error_that_says_what_to_do(place: Path) -> None:
    said, left = _publish_elsewhere(place, limit=50_000)
    assert said == f"the cache {place}/root cannot be written (File too large): make room"
    assert left == "left ['a/small']"


@needs_mounts
def test_a_full_disk_is_an_error_that_says_what_to_do(place: Path) -> None:
    mount = f"mount -t tmpfs -o size=50000 none {shlex.quote(str(place / 'root'))}"
    said, left = _publish_elsewhere(place, prefix=in_mount_namespace(mount))
    assert said == f"the cache {place}/root cannot be written (No space left on device): make room"
    assert left == "left ['a/small']"


@needs_mounts
def test_a_read_only_cache_is_an_error_that_says_what_to_do(place: Path) -> None:
    mount = f"mount -t tmpfs -o ro none {shlex.quote(str(place / 'root'))}"
    said, left = _publish_elsewhere(place, prefix=in_mount_namespace(mount))
    assert said == f"the cache {place}/root cannot be written (Read-only file system): make it writable"
    assert left == "left []"


def test_a_root_that_cannot_be_a_directory_is_an_error(place: Path) -> None:
    (place / "root").write_text("a file")
    with pytest.raises(BundleError, match=r"the cache .* cannot be written \(File exists\): make it writable"):
        _publish(place)
