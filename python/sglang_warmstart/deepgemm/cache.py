"""DeepGEMM's cache of compiled kernels on disk, which we write as DeepGEMM itself does.

Source: DeepGEMM 0.1.x, ``csrc/jit/compiler.hpp`` (layout and order of writing) and ``csrc/jit/kernel_runtime.hpp`` (a
directory that lacks one of its two files makes DeepGEMM abort).
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from sglang_warmstart.base import files
from sglang_warmstart.base.locks import Held, Locks
from sglang_warmstart.deepgemm import cubin, stub

SOURCE, CUBIN = "kernel.cu", "kernel.cubin"

# How long a kernel that another machine has published is looked for: clients of NFS remember what was not there.
VISIBLE_S = 5.0
_LOOK_AGAIN_S = 0.05


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

    @cached_property
    def locks(self) -> Locks:
        """Among all that share the cache."""
        return Locks(self.own / "locks")

    def take_lock(self, directory: str) -> Held | None:
        """The lock of a kernel, or None while another process holds it (see :meth:`Locks.take`).

        Raises:
            CacheError: the cache cannot be written.
        """
        try:
            return self.locks.take(directory)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error

    def describe(self, directory: str) -> KernelFile:
        """Size and checksum of a kernel.

        Raises:
            OSError: it is not there.
        """
        data = (self.path(directory) / CUBIN).read_bytes()
        return KernelFile(directory, len(data), hashlib.sha256(data).hexdigest())

    def publish(self, directory: str, source: str, data: bytes) -> None:
        """Make a kernel visible, whole or not at all. One that is there stays; half of one is completed.

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

        def build(place: Path) -> None:
            files.write_synced(place / SOURCE, source.encode())
            files.write_synced(place / CUBIN, data)

        path = self.path(directory)
        try:
            if not path.exists() and not files.publish(path, build, self.root / "tmp"):
                # Somebody was faster: theirs is used, as soon as this machine's view of a shared cache has it.
                end = time.monotonic() + VISIBLE_S
                while not path.exists() and time.monotonic() < end:
                    time.sleep(_LOOK_AGAIN_S)
            if path.exists() and not self.has(directory):
                # DeepGEMM would abort on half a kernel. It is completed where it is, not moved: a DeepGEMM of 2025 may
                # be filling it just now, and aborts if it goes.
                files.write_atomically(path / SOURCE, source.encode())
                files.write_atomically(path / CUBIN, data)
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


def _unwritable(root: Path, error: OSError) -> str:
    what = error.strerror or error
    return f"the kernel cache {root} cannot be written ({what}): {files.hint(error)}, or set SGLANG_DG_CACHE_DIR"
