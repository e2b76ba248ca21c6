"""A bundle as one file (``.tar.zst``): the manifest, its signature if it has one, and each file under its SHA-256.

A bundle may come from anybody. So it is read block by block, and only the expected next member is accepted. The names
and sizes of all members follow from the manifest. Nothing else in the archive becomes a path or a size.
"""

from __future__ import annotations

import errno
import hashlib
import io
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import zstandard

from sglang_warmstart.base import files
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError, Manifest
from sglang_warmstart.bundle.signature import SIGNATURE_SIZE, PublicKey

MANIFEST, SIGNATURE, FILES = "manifest.json", "manifest.sig", "files/"
MANIFEST_LIMIT = 64 << 20  # bytes
WINDOW_LIMIT = 128 << 20  # bytes that zstd may keep in memory
_MEMBER_LIMIT = 8 << 30  # bytes: a USTAR header has eleven octal digits for them
_CHUNK = 1 << 20
# zstd packs 128 KiB of zeros into 4 bytes: what is given to it at once bounds what comes out of it at once.
_PACKED_CHUNK = 1 << 10
_DAMAGED = "fetch it again, or ask who made it"

Sink = Callable[[bytes], object]


def write(
    path: Path,
    manifest: Manifest,
    contents: Callable[[str], BinaryIO],
    *,
    sign: Callable[[bytes], bytes] | None = None,
    level: int = 10,
) -> None:
    """Write a bundle, whole or not at all. The same contents give the same bytes, by the same release of zstd.

    Args:
        path: of the archive; one that is there is replaced.
        manifest: what is in it.
        contents: opens a file of it, by SHA-256.
        sign: gives the signature of the manifest's bytes.
        level: of zstd's compression.

    Raises:
        BundleError: the manifest does not hold together, a content is not what the manifest says, or the archive
            cannot be written.
    """
    data = manifests.encode(manifest)
    if len(data) > MANIFEST_LIMIT:
        raise BundleError(f"its manifest has {len(data)} bytes, more than {MANIFEST_LIMIT}: make several bundles of it")
    manifests.decode(data)
    for sha256, size in manifest.files.items():
        if size >= _MEMBER_LIMIT:
            raise BundleError(f"{sha256}: a file of {size} bytes is too large for a bundle: leave it out")
    signature = None if sign is None else sign(data)
    if signature is not None and len(signature) != SIGNATURE_SIZE:
        raise BundleError(f"a signature of {len(signature)} bytes, expected {SIGNATURE_SIZE}")
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    try:
        with (
            files.replacing(path) as file,
            compressor.stream_writer(file, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        ):
            tar.addfile(_member(MANIFEST, len(data)), io.BytesIO(data))
            if signature is not None:
                tar.addfile(_member(SIGNATURE, len(signature)), io.BytesIO(signature))
            for sha256, size in sorted(manifest.files.items()):
                _add(tar, sha256, size, contents)
    except OSError as error:
        raise BundleError(_unwritable(path, error)) from error


def read(stream: BinaryIO, *, limit_bytes: int = 32 << 30, is_signed_by: PublicKey | None = None) -> Manifest:
    """Check all of an archive. Nothing is written.

    Memory does not grow with what the archive says of itself, but for a manifest of up to 64 MiB.

    Args:
        stream: the archive; it can be sought in, and is read from its beginning.
        limit_bytes: of the archive unpacked.
        is_signed_by: who has to have signed it. Without, it may bear a signature by anybody.

    Returns:
        Its manifest.

    Raises:
        BundleError: it is no bundle, not whole, too large, or not signed by that key.
    """
    return _scan(stream, lambda _: nullcontext(_ignore), limit_bytes=limit_bytes, key=is_signed_by)


def extract(stream: BinaryIO, manifest: Manifest, directory: Path, wanted: Collection[str] | None = None) -> None:
    """Write files of an archive that has been read, each under its SHA-256. All is checked once more.

    Args:
        stream: the archive; it can be sought in, and is read from its beginning.
        manifest: of that archive, by :func:`read`.
        directory: an empty one that nobody else writes to.
        wanted: the SHA-256 of those to write; None for all.

    Raises:
        BundleError: it is not the archive that was read, or the directory cannot be written. Files that were written
            before that stay; each of them is whole.
    """
    chosen = manifest.files.keys() if wanted is None else frozenset(wanted)
    if strange := chosen - manifest.files.keys():
        raise BundleError(f"{min(strange)} is not in the bundle")

    def sink(sha256: str) -> AbstractContextManager[Sink]:
        return _new_file(directory, sha256) if sha256 in chosen else nullcontext(_ignore)

    _scan(stream, sink, limit_bytes=_unpacked_size(manifest), expected=manifest)


class _Unpacked:
    """The decompressed bytes of a stream, in order. Everything that is wrong with the stream is a BundleError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._packed = memoryview(b"")
        self._bytes = bytearray()
        self._zstd = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT).decompressobj()
        self.position = 0
        try:
            stream.seek(0)
        except (OSError, ValueError) as error:
            raise BundleError(
                f"it cannot be read from its beginning ({error}): copy it to a file on this machine"
            ) from error

    def some(self, count: int) -> bytes:
        """The next bytes: fewer than ``count`` only at the end."""
        while len(self._bytes) < count and self._unpack_more():
            pass
        found = bytes(self._bytes[:count])
        del self._bytes[:count]
        self.position += len(found)
        return found

    def exactly(self, count: int) -> bytes:
        """The next bytes."""
        found = self.some(count)
        if len(found) < count:
            raise BundleError(f"it is cut off: {_DAMAGED}")
        return found

    def chunks(self, count: int) -> Iterator[bytes]:
        """The next bytes, piece by piece, and past what pads them to whole blocks."""
        for left in range(count, 0, -_CHUNK):
            yield self.exactly(min(left, _CHUNK))
        if any(self.exactly(-count % tarfile.BLOCKSIZE)):
            raise BundleError(f"not a bundle: there is something between its files: {_DAMAGED}")

    def header(self) -> tarfile.TarInfo | None:
        """The next member's, None at the end of the archive.

        Only regular files are let through. Of no other type is the name or the size so much as looked at: those of the
        headers of pax and GNU, for instance, have other headers in their contents.
        """
        block = self.exactly(tarfile.BLOCKSIZE)
        if not any(block):
            return None
        if (kind := block[156:157]) != tarfile.REGTYPE:
            raise BundleError(f"not a bundle: a tar member of type {kind!r}, only regular files are in one")
        try:
            return tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise BundleError(f"not a bundle: no tar header at byte {self.position - len(block)}: {error}") from error

    def end(self) -> None:
        """See that nothing but the padding of the last record is left."""
        # The first of two blocks of zeros has been read as a header.
        most = tarfile.BLOCKSIZE + -(self.position + tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
        padding = self.some(most + 1)
        if len(padding) < tarfile.BLOCKSIZE:
            raise BundleError(f"it is cut off: {_DAMAGED}")
        if len(padding) > most or any(padding):
            raise BundleError(f"not a bundle: there is something after its last file: {_DAMAGED}")
        # By now all of its bytes are out, but maybe not the checksum of zstd.
        while self._unpack_more():
            pass
        if not self._zstd.eof:
            raise BundleError(f"it is cut off: {_DAMAGED}")
        if self._bytes or self._zstd.unused_data or self._packed or self._read():
            raise BundleError(f"not a bundle: there is something after its end: {_DAMAGED}")

    def _unpack_more(self) -> bool:
        if self._zstd.eof:
            return False
        if not self._packed:
            self._packed = memoryview(self._read())
        if not self._packed:
            return False
        try:
            self._bytes += self._zstd.decompress(self._packed[:_PACKED_CHUNK])
        except zstandard.ZstdError as error:
            raise BundleError(f"not a bundle, or a damaged one: {error}: {_DAMAGED}") from error
        self._packed = self._packed[_PACKED_CHUNK:]
        return True

    def _read(self) -> bytes:
        try:
            return self._stream.read(_CHUNK)
        except OSError as error:
            raise BundleError(f"it cannot be read ({error.strerror or error}): copy it again") from error


def _scan(
    stream: BinaryIO,
    sink: Callable[[str], AbstractContextManager[Sink]],
    *,
    limit_bytes: int,
    key: PublicKey | None = None,
    expected: Manifest | None = None,
) -> Manifest:
    """Check all of an archive, and give each of its files to what ``sink`` opens for it."""
    try:
        unpacked = _Unpacked(stream)
        data = _read_manifest(unpacked)
        header = unpacked.header()
        if header is not None and header.name == SIGNATURE:
            if header.size != SIGNATURE_SIZE:
                raise BundleError(f"not a bundle: a signature of {header.size} bytes, expected {SIGNATURE_SIZE}")
            signature = b"".join(unpacked.chunks(SIGNATURE_SIZE))
            if key is not None:
                key.check(data, signature)
            header = unpacked.header()
        elif key is not None:
            raise BundleError("it is not signed: get a signed one, or require no key if you trust who made it")
        # What nobody has vouched for is not even decoded.
        manifest = manifests.decode(data)
        del data
        if expected is not None and expected != manifest:
            raise BundleError("it is not what it was when it was checked: unpack it where nobody writes to it")
        if (size := _unpacked_size(manifest)) > limit_bytes:
            raise BundleError(f"it unpacks to {size} bytes, and {limit_bytes} is the limit: raise that if you trust it")
        for sha256, size in sorted(manifest.files.items()):
            _expect(header, FILES + sha256, size)
            with sink(sha256) as take:
                _copy(unpacked, sha256, size, take)
            header = unpacked.header()
        if header is not None:
            raise BundleError(f"not a bundle: {header.name!r} is in it, which its manifest does not know")
        unpacked.end()
    except MemoryError as error:
        raise BundleError("there is not enough memory to read it") from error
    return manifest


def _read_manifest(unpacked: _Unpacked) -> bytes:
    header = unpacked.header()
    if header is None or header.name != MANIFEST:
        raise BundleError(f"not a bundle: its first file is not {MANIFEST}")
    if not 0 <= header.size <= MANIFEST_LIMIT:
        raise BundleError(f"not a bundle: its manifest has {header.size} bytes, more than {MANIFEST_LIMIT}")
    return b"".join(unpacked.chunks(header.size))


def _expect(header: tarfile.TarInfo | None, name: str, size: int) -> None:
    if header is None:
        raise BundleError(f"{name} is missing: {_DAMAGED}")
    if header.name != name:
        raise BundleError(f"not a bundle: {header.name!r} is where {name} should be")
    if header.size != size:
        raise BundleError(f"{name} has {header.size} bytes, its manifest says {size}: {_DAMAGED}")


def _copy(unpacked: _Unpacked, sha256: str, size: int, take: Sink) -> None:
    found = hashlib.sha256()
    for chunk in unpacked.chunks(size):
        found.update(chunk)
        take(chunk)
    if found.hexdigest() != sha256:
        raise BundleError(f"{FILES}{sha256} is damaged, its SHA-256 is {found.hexdigest()}: {_DAMAGED}")


def _unpacked_size(manifest: Manifest) -> int:
    blocks = sum(1 + -(-size // tarfile.BLOCKSIZE) for size in manifest.files.values())
    return blocks * tarfile.BLOCKSIZE


def _ignore(_: bytes) -> None:
    return None


@contextmanager
def _new_file(directory: Path, name: str) -> Iterator[Sink]:
    path = directory / name
    try:
        file = path.open("xb")
        try:
            with file:
                yield file.write
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BundleError(_unwritable(directory, error)) from error


class _Content(io.RawIOBase):
    """A content on its way into an archive: it has to be what the manifest says."""

    def __init__(self, file: BinaryIO, sha256: str) -> None:
        super().__init__()
        self._file, self._sha256, self._found = file, sha256, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._read(size)
        self._found.update(data)
        if len(data) < size:
            raise BundleError(self._changed)
        return data

    def end(self) -> None:
        """See that there is no more of it."""
        if self._read(1) or self._found.hexdigest() != self._sha256:
            raise BundleError(self._changed)

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise BundleError(_unreadable(self._sha256, error)) from error

    @property
    def _changed(self) -> str:
        return f"{self._sha256}: the file is not what the manifest says: it has changed meanwhile, so try again"


def _add(tar: tarfile.TarFile, sha256: str, size: int, contents: Callable[[str], BinaryIO]) -> None:
    try:
        file = contents(sha256)
    except OSError as error:
        raise BundleError(_unreadable(sha256, error)) from error
    with file:
        content = _Content(file, sha256)
        tar.addfile(_member(FILES + sha256, size), content)
        content.end()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _unreadable(sha256: str, error: OSError) -> str:
    return f"{error.filename or sha256} cannot be read ({error.strerror or error}): see that it is there and readable"


def _unwritable(path: Path, error: OSError) -> str:
    hint = "make its directory" if error.errno in (errno.ENOENT, errno.ENOTDIR) else files.hint(error)
    return f"{path} cannot be written ({error.strerror or error}): {hint}, or name another place"
