"""An archive is what its manifest says to the byte, or it is refused and nothing of it is written."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.bundles import (
    Bundle,
    Member,
    block,
    bomb,
    bundle_of,
    bundles,
    compressed,
    cubin,
    member,
    padded,
    sha256,
    small_bundle,
    tar_of,
    tiny_plan,
)
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError, Manifest
from sglang_warmstart.bundle.signature import PrivateKey, PublicKey

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())

SMALL = small_bundle()
NAMES = [f"files/{name}" for name in sorted(SMALL.contents)]
# By RFC 8032, 7.1, test 1.
PRIVATE = PrivateKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
PUBLIC = PublicKey(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
OTHER = PublicKey(bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes an empty directory, as often as a property test asks for one."""
    root, numbers = tmp_path_factory.mktemp("fresh"), itertools.count()

    def make() -> Path:
        path = root / str(next(numbers))
        path.mkdir()
        return path

    return make


def _read(data: bytes, *, is_signed_by: PublicKey | None = None) -> Manifest:
    return archive.read(io.BytesIO(data), is_signed_by=is_signed_by)


def _refusal(data: bytes, *, is_signed_by: PublicKey | None = None, limit_bytes: int = 1 << 30) -> str:
    with pytest.raises(BundleError) as caught:
        archive.read(io.BytesIO(data), is_signed_by=is_signed_by, limit_bytes=limit_bytes)
    assert str(caught.value).isprintable()
    return str(caught.value)


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*")}


# Round trips


@settings(max_examples=50)
@given(bundles(), st.booleans())
def test_what_is_written_is_read_and_extracted(fresh: Callable[[], Path], bundle: Bundle, signed: bool) -> None:
    directory = fresh()
    path = directory / "a.tar.zst"
    archive.write(path, bundle.manifest, bundle.open, sign=PRIVATE.sign if signed else None, level=3)
    assert [each.name for each in directory.iterdir()] == ["a.tar.zst"]
    with path.open("rb") as stream:
        assert archive.read(stream, is_signed_by=PUBLIC if signed else None) == bundle.manifest
        into = fresh()
        archive.extract(stream, bundle.manifest, into)
    assert _content(into) == bundle.contents


def test_the_same_contents_give_the_same_bytes_whoever_writes_them_and_when(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from kit.bundles import small_bundle
from sglang_warmstart.bundle import archive
os.umask(int(sys.argv[2], 8))
archive.write(Path(sys.argv[1]), small_bundle().manifest, small_bundle().open)
"""
    for umask, hash_seed in (("022", "1"), ("077", "2")):
        run_python(code, str(tmp_path / umask), umask, environment={"PYTHONHASHSEED": hash_seed, "USER": "somebody"})
    assert (tmp_path / "022").read_bytes() == (tmp_path / "077").read_bytes()
    assert (tmp_path / "022").stat().st_mode & 0o777 == 0o644


def test_tar_and_zstd_can_open_it(tmp_path: Path) -> None:
    archive.write(tmp_path / "a", SMALL.manifest, SMALL.open, sign=PRIVATE.sign)
    plain = zstandard.ZstdDecompressor().stream_reader((tmp_path / "a").read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert tar.getnames() == ["manifest.json", "manifest.sig", *NAMES]
        for info in tar:
            assert (info.mode, info.uid, info.gid, info.mtime) == (0o644, 0, 0, 0)
            assert (info.uname, info.gname, info.isreg()) == ("", "", True)
    # And what tar makes of the same files, others can read.
    assert plain == tar_of(SMALL.members(PRIVATE.sign(manifests.encode(SMALL.manifest))))


def test_an_archive_in_gnus_format_and_without_padding_is_one_too() -> None:
    members = b"".join(block(info, tar_format=tarfile.GNU_FORMAT) + padded(data) for info, data in SMALL.members())
    assert _read(compressed(members + bytes(1024))) == SMALL.manifest


def test_only_what_is_wanted_is_extracted(tmp_path: Path) -> None:
    one = max(SMALL.contents)
    archive.extract(io.BytesIO(SMALL.archive()), SMALL.manifest, tmp_path, {one})
    assert _content(tmp_path) == {one: SMALL.contents[one]}
    with pytest.raises(BundleError, match=f"{'0' * 64} is not in the bundle"):
        archive.extract(io.BytesIO(SMALL.archive()), SMALL.manifest, tmp_path, ["0" * 64])


# Writing


def _written(tmp_path: Path, bundle: Bundle, contents: Callable[[str], BinaryIO] | None = None) -> str:
    """Why it is not written. The file that is there stays, and nothing else is there."""
    path = tmp_path / "a.tar.zst"
    path.write_bytes(b"before")
    with pytest.raises(BundleError) as caught:
        archive.write(path, bundle.manifest, contents or bundle.open)
    assert _content(tmp_path) == {"a.tar.zst": b"before"}
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda data: data + b"x", lambda data: data[:-1] or b"x", lambda data: data[:-1] + b"x"]
)
@pytest.mark.parametrize("name", sorted(SMALL.contents))
def test_a_content_that_is_not_what_the_manifest_says_is_not_written(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    changed = Bundle(SMALL.manifest, {**SMALL.contents, name: change(SMALL.contents[name])})
    assert _written(tmp_path, changed).startswith(f"{name}: the file is not what the manifest says")


def test_a_content_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    said = _written(tmp_path, SMALL, lambda name: Path("/nowhere", name).open("rb"))  # noqa: SIM115
    assert said.startswith(f"/nowhere/{min(SMALL.contents)} cannot be read (No such file or directory)")
    # Opened, it fails when it is read.
    said = _written(tmp_path, SMALL, lambda name: open("/proc/self/mem", "rb", buffering=0))  # noqa: PTH123, SIM115
    assert said.startswith(f"{min(SMALL.contents)} cannot be read (Input/output error)")


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    torn = Bundle(msgspec.structs.replace(SMALL.manifest, files={}), {})
    assert "its files do not agree" in _written(tmp_path, torn)
    huge = bundle_of(tiny_plan(), [b""])
    huge = Bundle(msgspec.structs.replace(huge.manifest, files={sha256(b""): 8 << 30}), huge.contents)
    assert "too large for a bundle" in _written(tmp_path, huge)
    assert "its manifest has" in _written(tmp_path, bundle_of(tiny_plan(), [], failed="x" * (64 << 20)))


def test_a_signature_is_of_the_one_kind_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a signature of 5 bytes, expected 64"):
        archive.write(tmp_path / "a", SMALL.manifest, SMALL.open, sign=lambda data: data[:5])


@pytest.mark.parametrize("name", [".", "/dev/null/a"])
def test_what_is_no_name_of_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="cannot be written"):
        archive.write(Path(name), SMALL.manifest, SMALL.open)
    assert _content(tmp_path) == {}


def test_whoever_interrupts_it_finds_what_was_there(tmp_path: Path) -> None:
    def interrupted(name: str) -> BinaryIO:
        if name == max(SMALL.contents):
            raise KeyboardInterrupt
        return SMALL.open(name)

    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        archive.write(tmp_path / "a", SMALL.manifest, interrupted)
    assert _content(tmp_path) == {"a": b"before"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("missing/a", "(No such file or directory): make its directory"),
        ("directory", "(Is a directory): make it writable"),
    ],
)
def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(BundleError) as caught:
        archive.write(tmp_path / place, SMALL.manifest, SMALL.open)
    assert str(caught.value) == f"{tmp_path}/{place} cannot be written {said}, or name another place"
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


# A disk that is full, or cannot be written

_WRITE = """
import io, os, resource, sys
from pathlib import Path
from kit.bundles import bundle_of, tiny_plan
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.manifest import BundleError
what, directory, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
bundle = bundle_of(tiny_plan(), [os.urandom(300_000), os.urandom(300_000)])
stream = io.BytesIO(bundle.archive())
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if what == "write":
        archive.write(directory / "a", bundle.manifest, bundle.open)
    else:
        archive.extract(stream, archive.read(stream), directory)
except BundleError as error:
    print(error)
left = [path for path in directory.iterdir()]
print("left", len(left), all(path.stat().st_size == 300_000 for path in left))
"""


def test_a_file_that_may_not_grow_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    room = "cannot be written (File too large): make room, or name another place"
    assert run_python(_WRITE, "write", str(tmp_path), "200000") == f"{tmp_path}/a {room}\nleft 0 True\n"
    assert run_python(_WRITE, "extract", str(tmp_path), "200000") == f"{tmp_path} {room}\nleft 0 True\n"


@needs_mounts
@pytest.mark.parametrize("what", ["write", "extract"])
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, what: str) -> None:
    mount = f"mount -t tmpfs -o size=400k none {shlex.quote(str(tmp_path))}"
    said, left = run_python(_WRITE, what, str(tmp_path), "0", prefix=in_mount_namespace(mount)).splitlines()
    assert said.endswith("cannot be written (No space left on device): make room, or name another place")
    # What was extracted before is whole.
    assert left == ("left 0 True" if what == "write" else "left 1 True")


@needs_mounts
@pytest.mark.parametrize("what", ["write", "extract"])
def test_a_read_only_disk_is_an_error_that_says_what_to_do(tmp_path: Path, what: str) -> None:
    mount = f"mount -t tmpfs -o ro none {shlex.quote(str(tmp_path))}"
    said, _ = run_python(_WRITE, what, str(tmp_path), "0", prefix=in_mount_namespace(mount)).splitlines()
    assert said.endswith("cannot be written (Read-only file system): make it writable, or name another place")


# Between the passes


def test_an_archive_that_is_another_now_is_not_extracted(tmp_path: Path) -> None:
    other = bundle_of(tiny_plan(), [cubin()])
    with pytest.raises(BundleError, match="it is not what it was when it was checked"):
        archive.extract(io.BytesIO(other.archive()), SMALL.manifest, tmp_path)
    assert _content(tmp_path) == {}


def test_a_content_that_has_changed_is_not_left(tmp_path: Path) -> None:
    last = max(SMALL.contents)
    members = [*SMALL.members()[:-1], member(f"files/{last}", SMALL.contents[last][:-1] + b"x")]
    with pytest.raises(BundleError, match=f"files/{last} is damaged, its SHA-256 is "):
        archive.extract(io.BytesIO(compressed(tar_of(members))), SMALL.manifest, tmp_path)
    assert _content(tmp_path) == {name: data for name, data in SMALL.contents.items() if name != last}


def test_a_file_that_is_there_is_not_overwritten_and_a_link_not_followed(tmp_path: Path) -> None:
    into, name = tmp_path / "into", min(SMALL.contents)
    into.mkdir()
    (into / name).symlink_to(tmp_path / "victim")
    with pytest.raises(BundleError, match=r"cannot be written \(File exists\)"):
        archive.extract(io.BytesIO(SMALL.archive()), SMALL.manifest, into)
    assert not (tmp_path / "victim").exists()
    assert (into / name).is_symlink()


# What is refused


def _first_as(**fields: object) -> list[Member]:
    """The first file's header is another."""
    manifest, (info, data), *others = SMALL.members()
    for field, value in fields.items():
        setattr(info, field, value)
    return [manifest, (info, data), *others]


def _before_first(info: tarfile.TarInfo, data: bytes = b"") -> list[Member]:
    manifest, *others = SMALL.members()
    return [manifest, (info, data), *others]


def _reordered(*order: int) -> list[Member]:
    members = SMALL.members()
    return [members[at] for at in order]


A_FILE = {"linkname": "/etc/passwd"}
SIZE = SMALL.manifest.files[min(SMALL.contents)]
REFUSED: dict[str, tuple[list[Member], str]] = {
    "absolute path": (_first_as(name="/etc/passwd"), "'/etc/passwd' is where files/"),
    "parent": (_first_as(name="files/../../etc/passwd"), r"'files/../../etc/passwd' is where files/"),
    "unprintable name": (_first_as(name="files/\n\x1b[31m"), r"'files/\\n\\x1b\[31m' is where files/"),
    "name that is no text": (_first_as(name="files/\udcff"), "no tar header at byte"),
    "long name": (_first_as(name="files/" + "0" * 90), "is where files/"),
    "symbolic link": (_first_as(type=tarfile.SYMTYPE, **A_FILE), "a tar member of type b'2'"),
    "hard link": (_first_as(type=tarfile.LNKTYPE, **A_FILE), "a tar member of type b'1'"),
    "character device": (_first_as(type=tarfile.CHRTYPE, devmajor=1, devminor=1), "a tar member of type b'3'"),
    "block device": (_first_as(type=tarfile.BLKTYPE), "a tar member of type b'4'"),
    "directory": (_before_first(member("files", b"", type=tarfile.DIRTYPE)[0]), "a tar member of type b'5'"),
    "fifo": (_first_as(type=tarfile.FIFOTYPE), "a tar member of type b'6'"),
    "contiguous file": (_first_as(type=tarfile.CONTTYPE), "a tar member of type b'7'"),
    "file of old": (_first_as(type=tarfile.AREGTYPE), r"a tar member of type b'\\x00'"),
    "sparse file": (_first_as(type=tarfile.GNUTYPE_SPARSE), "a tar member of type b'S'"),
    "pax header": (_before_first(*member("x", b"14 size=100000\n", type=tarfile.XHDTYPE)), "a tar member of type b'x'"),
    "global pax header": (_before_first(*member("x", b"", type=tarfile.XGLTYPE)), "a tar member of type b'g'"),
    "GNU long name": (
        _before_first(*member("x", b"/etc\0", type=tarfile.GNUTYPE_LONGNAME)),
        "a tar member of type b'L'",
    ),
    "GNU long link": (
        _before_first(*member("x", b"/etc\0", type=tarfile.GNUTYPE_LONGLINK)),
        "a tar member of type b'K'",
    ),
    "unknown type": (_first_as(type=b"Z"), "a tar member of type b'Z'"),
    "another order": (_reordered(0, 2, 1, 3, 4), f"'{NAMES[1]}' is where {NAMES[0]} should be"),
    "twice": (_reordered(0, 1, 1, 2, 3, 4), f"'{NAMES[0]}' is where {NAMES[1]} should be"),
    "manifest twice": (_reordered(0, 0, 1, 2, 3, 4), f"'manifest.json' is where {NAMES[0]} should be"),
    "last twice": (_reordered(0, 1, 2, 3, 4, 4), f"'{NAMES[3]}' is in it, which its manifest does not know"),
    "manifest not first": (_reordered(1, 0, 2, 3, 4), "its first file is not manifest.json"),
    "no manifest": (_reordered(1, 2, 3, 4), "its first file is not manifest.json"),
    "no member": ([], "its first file is not manifest.json"),
    "manifest alone": (_reordered(0), f"{NAMES[0]} is missing"),
    "one missing": (_reordered(0, 1, 3, 4), f"'{NAMES[2]}' is where {NAMES[1]} should be"),
    "last missing": (_reordered(0, 1, 2, 3), f"{NAMES[3]} is missing"),
    "one more": ([*SMALL.members(), member("files/x", b"x")], "'files/x' is in it, which its manifest does not know"),
    "signature late": ([*SMALL.members(), member("manifest.sig", bytes(64))], "'manifest.sig' is in it, which"),
    "signature too short": (_before_first(*member("manifest.sig", bytes(63))), "a signature of 63 bytes, expected 64"),
    "signature twice": (
        [*SMALL.members(bytes(64))[:2], *SMALL.members(bytes(64))[1:]],
        f"'manifest.sig' is where {NAMES[0]} should be",
    ),
    "smaller": (_first_as(size=SIZE - 1), f"{NAMES[0]} has {SIZE - 1} bytes, its manifest says {SIZE}"),
    "larger": (_first_as(size=SIZE + 1), f"{NAMES[0]} has {SIZE + 1} bytes, its manifest says {SIZE}"),
    "negative": (_first_as(size=-1), f"{NAMES[0]} has -1 bytes"),
    "of 2**95 bytes": (_first_as(size=1 << 87), f"{NAMES[0]} has {1 << 87} bytes"),
    "manifest of 2 GiB": (
        [member("manifest.json", b"", size=2 << 30)],
        "its manifest has 2147483648 bytes, more than 67108864",
    ),
    "manifest of 2**87 bytes": ([member("manifest.json", b"", size=1 << 87)], "more than 67108864"),
    "negative manifest": ([member("manifest.json", b"", size=-512)], "its manifest has -512 bytes"),
    "manifest of zeros": (
        [member("manifest.json", bytes(1000)), *SMALL.members()[1:]],
        "its manifest: JSON is malformed",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_as_it_should_be_is_refused_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    members, said = REFUSED[what]
    data = compressed(tar_of(members, tar_format=tarfile.GNU_FORMAT))
    assert re.search(said, _refusal(data))
    with pytest.raises(BundleError):
        archive.extract(io.BytesIO(data), SMALL.manifest, tmp_path)
    # What came before is whole, and nothing is anywhere else.
    assert _content(tmp_path).items() <= SMALL.contents.items()


def _tar(change: Callable[[bytearray], object]) -> bytes:
    tar = bytearray(tar_of(SMALL.members()))
    change(tar)
    return compressed(bytes(tar))


def test_a_tar_file_has_nothing_in_its_gaps() -> None:
    whole = tar_of(SMALL.members())
    end = len(whole.rstrip(b"\0"))
    assert _read(compressed(whole)) == SMALL.manifest
    assert "something between its files" in _refusal(_tar(lambda tar: tar.__setitem__(end + 1, 1)))
    assert "something after its last file" in _refusal(_tar(lambda tar: tar.__setitem__(-1, 1)))
    assert "something after its last file" in _refusal(_tar(lambda tar: tar.extend(bytes(512))))
    assert "something after its last file" in _refusal(_tar(lambda tar: tar.extend(whole)))
    assert "bad checksum" in _refusal(_tar(lambda tar: tar.__setitem__(0, 0)))


def test_a_tar_file_has_an_end() -> None:
    whole = tar_of(SMALL.members())
    end = len(padded(whole.rstrip(b"\0")))
    for length in range(0, end + 1024, 256):
        assert "cut off" in _refusal(compressed(whole[:length]))


def test_zstd_is_one_whole_frame_and_nothing_else() -> None:
    whole = SMALL.archive()
    skippable = b"\x50\x2a\x4d\x18\4\0\0\0more"
    for more in (b"\0", b"x", whole, compressed(b""), compressed(b"more"), skippable, bytes(1 << 21)):
        assert "something after its end" in _refusal(whole + more)
    assert "cut off" in _refusal(b"")
    assert "Unknown frame descriptor" in _refusal(b"hello world")
    assert "Unknown frame descriptor" in _refusal(tar_of(SMALL.members()))
    assert "cut off" in _refusal(skippable + whole)
    split = tar_of(SMALL.members())
    assert "cut off" in _refusal(compressed(split[:5120]) + compressed(split[5120:]))
    assert "checksum" in _refusal(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("piece", [1 << 10, 1 << 20])
def test_what_follows_is_seen_where_the_reading_pauses(piece: int) -> None:
    frame = bomb(tar_of(SMALL.members()), 0)
    # Blocks of nothing, of 3 bytes each, until the frame ends where a piece that is read at once does.
    nothing = next(count for count in range(piece) if (len(frame) + 3 * count) % piece == 0)
    frame = frame[:6] + nothing * bytes(3) + frame[6:]
    assert _read(frame) == SMALL.manifest
    assert "something after its end" in _refusal(frame + b"x")


def test_it_is_cut_off_wherever_it_is_cut() -> None:
    whole = bundle_of(tiny_plan(), [cubin()]).archive()
    for length in range(len(whole)):
        assert "cut off" in _refusal(whole[:length])


def test_what_zstd_would_keep_in_memory_has_a_limit() -> None:
    tar = tar_of(SMALL.members())
    for log, refused in ((27, False), (28, True), (31, True)):
        # The third field of the frame: its window.
        frame = bytearray(bomb(tar, 0))
        frame[5] = (log - 10) << 3
        if refused:
            assert "Frame requires too much memory" in _refusal(bytes(frame))
        else:
            assert _read(bytes(frame)) == SMALL.manifest


def test_a_stream_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    with open(read_end, "rb") as pipe, pytest.raises(BundleError, match="it cannot be read from its beginning"):  # noqa: PTH123
        archive.read(pipe)
    # A directory can be opened by nobody, a memory file can, and cannot be read at its beginning.
    with open("/proc/self/mem", "rb", buffering=0) as memory, pytest.raises(BundleError, match="Input/output error"):  # noqa: PTH123
        archive.read(memory)


# Signatures

SIGNED = SMALL.archive(PRIVATE.sign(manifests.encode(SMALL.manifest)))


def test_who_has_to_have_signed_it_has() -> None:
    assert _read(SIGNED, is_signed_by=PUBLIC) == SMALL.manifest
    assert "it is not signed" in _refusal(SMALL.archive(), is_signed_by=PUBLIC)
    assert "its signature is not by this key" in _refusal(SIGNED, is_signed_by=OTHER)
    assert "its signature is not by this key" in _refusal(SMALL.archive(bytes(64)), is_signed_by=PUBLIC)


def test_a_signature_by_anybody_is_as_good_as_none_where_none_is_required(tmp_path: Path) -> None:
    for data in (SIGNED, SMALL.archive(bytes(64))):
        assert _read(data) == SMALL.manifest
    archive.extract(io.BytesIO(SIGNED), SMALL.manifest, tmp_path)
    assert _content(tmp_path) == SMALL.contents


def test_a_signature_is_of_this_manifest() -> None:
    other = bundle_of(tiny_plan(), [cubin()])
    moved = other.archive(PRIVATE.sign(manifests.encode(SMALL.manifest)))
    assert "its signature is not by this key" in _refusal(moved, is_signed_by=PUBLIC)


def test_a_manifest_that_nobody_has_signed_is_not_even_decoded() -> None:
    unsigned = compressed(tar_of([member("manifest.json", b"no JSON")]))
    assert "its manifest: JSON is malformed" in _refusal(unsigned)
    assert "it is not signed" in _refusal(unsigned, is_signed_by=PUBLIC)


# Bombs

GIB = 1 << 30


def _declared(size: int, name: str = "0" * 64) -> tuple[Manifest, bytes]:
    """A bundle of one file of this size, up to where its content begins."""
    manifest = bundle_of(tiny_plan(), [b""]).manifest
    manifest = msgspec.structs.replace(manifest, cubins=dict.fromkeys(manifest.cubins, name), files={name: size})
    info, data = member("manifest.json", manifests.encode(manifest))
    header = block(member(f"files/{name}", b"", size=size)[0], tar_format=tarfile.GNU_FORMAT)
    return manifest, block(info) + padded(data) + header


def _bombs() -> Iterator[tuple[str, bytes, str]]:
    manifest, _ = member("manifest.json", b"", size=10 * GIB)
    yield "a manifest of 10 GiB", bomb(block(manifest, tar_format=tarfile.GNU_FORMAT), 10 * GIB), "its manifest has"
    manifest, _ = member("manifest.json", b"", size=archive.MANIFEST_LIMIT)
    yield "a manifest of 64 MiB, and more", bomb(block(manifest), 10 * GIB), "its manifest: JSON is malformed"
    yield "a file of 10 GiB", bomb(_declared(10 * GIB)[1], 10 * GIB), "it unpacks to 10737418752 bytes"
    yield "a file of 2**80 bytes", bomb(_declared(1 << 80)[1], 10 * GIB), "it unpacks to 12089"
    yield "a file of 1 GiB", bomb(_declared(GIB - 1024)[1], 10 * GIB), "is damaged"
    small, info = SMALL.members(), member(NAMES[0], b"", size=SIZE)[0]
    start = tar_of(small[:1]).rstrip(b"\0")
    yield "zeros for a file", bomb(padded(start) + block(info), 10 * GIB), "is damaged"
    yield "zeros after the end", bomb(tar_of(small), 10 * GIB), "something after its last file"
    yield "zeros alone", bomb(b"", 10 * GIB), "its first file is not manifest.json"


BOMBS = {name: (data, said) for name, data, said in _bombs()}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_refused_in_the_memory_that_a_manifest_may_take(tmp_path: Path, what: str) -> None:
    data, said = BOMBS[what]
    (tmp_path / "a").write_bytes(data)
    code = """
import resource, sys
from pathlib import Path
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.manifest import BundleError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with open(sys.argv[1], "rb") as stream:
        archive.read(stream, limit_bytes=1 << 30)
except BundleError as error:
    print(error)
"""
    assert said in run_python(code, str(tmp_path / "a"))


def test_where_there_is_no_memory_for_a_manifest_it_is_said(tmp_path: Path) -> None:
    manifest, _ = member("manifest.json", b"", size=archive.MANIFEST_LIMIT)
    (tmp_path / "a").write_bytes(bomb(block(manifest), 10 * GIB))
    code = """
import resource, sys
from pathlib import Path
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.manifest import BundleError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (48 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with open(sys.argv[1], "rb") as stream:
        archive.read(stream)
except BundleError as error:
    print(error)
"""
    assert "memory" in run_python(code, str(tmp_path / "a"))


def test_what_it_unpacks_to_has_a_limit() -> None:
    data = SMALL.archive()
    size = sum(512 + -(-size // 512) * 512 for size in SMALL.manifest.files.values())
    assert archive.read(io.BytesIO(data), limit_bytes=size) == SMALL.manifest
    assert f"it unpacks to {size} bytes, and {size - 1} is the limit" in _refusal(data, limit_bytes=size - 1)


# Whatever it may be


def _whole_or_refused(fresh: Callable[[], Path], data: bytes) -> None:
    """Either it is refused and nothing written, or all that is written is what its manifest says."""
    into = fresh()
    stream = io.BytesIO(data)
    try:
        manifest = archive.read(stream)
    except BundleError as error:
        assert str(error).isprintable()
        with pytest.raises(BundleError):
            archive.extract(stream, SMALL.manifest, into)
        assert _content(into).items() <= SMALL.contents.items()
    else:
        archive.extract(stream, manifest, into)
        found = _content(into)
        assert {name: len(content) for name, content in found.items()} == manifest.files
        assert all(hashlib.sha256(content).hexdigest() == name for name, content in found.items())
    assert {path.name for path in into.iterdir()} <= SMALL.contents.keys()


@settings(max_examples=100)
@given(st.data())
def test_with_other_bits_it_is_the_same_or_refused(fresh: Callable[[], Path], data: st.DataObject) -> None:
    whole = bytearray(SMALL.archive())
    for bit in data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3)):
        whole[bit // 8] ^= 1 << bit % 8
    _whole_or_refused(fresh, bytes(whole))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    _refusal(data)
    _refusal(compressed(data))
