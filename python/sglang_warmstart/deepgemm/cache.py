"""DeepGEMM's cache of compiled kernels on disk, written as DeepGEMM itself writes it.

Source: DeepGEMM 0.1.x, ``csrc/jit/compiler.hpp`` (layout and order of writing) and ``csrc/jit/kernel_runtime.hpp`` (a
directory that lacks one of its two files makes DeepGEMM abort).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock

from sglang_warmstart.deepgemm import cubin, stub

SOURCE, CUBIN = "kernel.cu", "kernel.cubin"


class CacheError(Exception):
    """A kernel cannot be put into the cache; says where and why."""


class KernelFile(msgspec.Struct, frozen=True, order=True):
    """A kernel in the cache, as a marker remembers it.

    Args:
        directory: ``kernel.NAME.DIGEST``.
        size: bytes of the cubin.
        sha256: of the cubin, in hexadecimal digits.
    """

    directory: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KernelCache:
    """The cache under one root.

    Args:
        root: ``DG_JIT_CACHE_DIR``.
    """

    root: Path

    @property
    def own(self) -> Path:
        """Where this package keeps what is its own, beside DeepGEMM's directories."""
        return self.root / "warmstart"

    def path(self, directory: str) -> Path:
        """Where a kernel lies."""
        return self.root / "cache" / directory

    def has(self, directory: str) -> bool:
        """Whether both files of a kernel are there."""
        path = self.path(directory)
        return (path / SOURCE).is_file() and (path / CUBIN).is_file()

    def lock(self, directory: str) -> FileLock:
        """The lock of one kernel, among all that share the cache. It ends with its holder, however that ends."""
        locks = self.own / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error
        return FileLock(locks / f"{directory}.lock", thread_local=False)

    def describe(self, directory: str) -> KernelFile:
        """Size and checksum of a kernel.

        Raises:
            OSError: it is not there.
        """
        data = (self.path(directory) / CUBIN).read_bytes()
        return KernelFile(directory, len(data), hashlib.sha256(data).hexdigest())

    def publish(self, directory: str, source: str, data: bytes) -> None:
        """Make a kernel visible, whole or not at all. One that is there stays.

        Args:
            directory: ``kernel.NAME.DIGEST``.
            source: CUDA source.
            data: the cubin.

        Raises:
            CacheError: it is no whole cubin, or bears the stub's mark, or the cache cannot be written.
        """
        defect = "a recorder's stub" if stub.is_stub(data) else cubin.defect_of(data)
        if defect is not None:
            raise CacheError(f"{directory}: the cubin is not published: {defect}")
        temporary = self.root / "tmp" / f"warmstart-{uuid.uuid4()}"
        try:
            temporary.mkdir(parents=True)
            try:
                _write_synced(temporary / SOURCE, source.encode())
                _write_synced(temporary / CUBIN, data)
                _sync(temporary)
                target = self.path(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists() and not self.has(directory):
                    # Half a kernel would stay in the way, and DeepGEMM would abort.
                    self.set_aside(directory)
                try:
                    temporary.rename(target)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not self.has(directory):
                        raise
                else:
                    _sync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error

    def set_aside(self, directory: str) -> Path:
        """Move a kernel out of DeepGEMM's sight. Returns where it is now.

        Raises:
            CacheError: the cache cannot be written.
        """
        aside = self.own / "set-aside" / f"{directory}.{uuid.uuid4().hex[:8]}"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            self.path(directory).rename(aside)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error
        return aside

    def broken(self) -> list[str]:
        """The kernels that would make DeepGEMM abort: a directory that lacks one of the two files."""
        try:
            names = [path.name for path in (self.root / "cache").iterdir()]
        except OSError:
            return []
        return sorted(name for name in names if name.startswith("kernel.") and self._is_broken(name))

    def _is_broken(self, directory: str) -> bool:
        return self.path(directory).is_dir() and not self.has(directory)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(root: Path, error: OSError) -> str:
    hint = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
    return f"the kernel cache {root} cannot be written ({error.strerror or error}): {hint}, or set SGLANG_DG_CACHE_DIR"
