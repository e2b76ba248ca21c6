"""DeepGEMM's cache of compiled kernels on disk, which we write as DeepGEMM itself does (:mod:`.dialects`)."""

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
from sglang_warmstart.deepgemm.dialects import FIRST_JIT, Dialect
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN

# How long a kernel that another machine has published is looked for: clients of NFS remember what was not there.
VISIBLE_S = 5.0
_LOOK_AGAIN_S = 0.05


class CacheError(Exception):
    """A kernel cannot be put into the cache; says where and why."""


class KernelFile(msgspec.Struct, frozen=True, order=True):
    """A kernel in the cache, as a marker remembers it.

    Args:
        directory: its name, such as ``kernel.NAME.DIGEST``.
        size: bytes of the cubin.
        sha256: of the cubin, in hexadecimal digits.
    """

    directory: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KernelCache:
    """A cache.

    Args:
        root: where kernels are put: the first of ``DG_JIT_CACHE_DIR``.
        dialect: of the DeepGEMM that uses it.
        read_only: further roots, where DeepGEMM looks for kernels too.
    """

    root: Path
    dialect: Dialect = FIRST_JIT
    read_only: tuple[Path, ...] = ()

    @classmethod
    def of(cls, value: str | Path, dialect: Dialect, *, below: str = "") -> KernelCache:
        """That of a value of ``DG_JIT_CACHE_DIR``.

        Args:
            below: a directory in each root, instead of the root itself.
        """
        first, *others = (root / below for root in dialect.roots(str(value)))
        return cls(first, dialect, tuple(others))

    @property
    def own(self) -> Path:
        """Where this package keeps what is its own, beside DeepGEMM's directories."""
        return self.root / "warmstart"

    @property
    def scratch(self) -> Path:
        """Where kernels are built before they are put into their places, as DeepGEMM does it."""
        return self.root / "tmp"

    @property
    def all_own(self) -> tuple[Path, ...]:
        """The same in each root, first that which is written."""
        return tuple(root / "warmstart" for root in (self.root, *self.read_only))

    def path(self, directory: str) -> Path:
        """Where a kernel lies, or is to lie."""
        own = self.root / "cache" / directory
        if self.read_only and not self.dialect.is_whole(own):
            for root in self.read_only:
                if self.dialect.is_whole(path := root / "cache" / directory):
                    return path
        return own

    def has(self, directory: str) -> bool:
        """Whether all files of a kernel are there."""
        return self.dialect.is_whole(self.path(directory))

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

    def publish(self, directory: str, source: str, data: bytes, flags: str = "") -> None:
        """Make a kernel visible, whole or not at all. One that is there stays; half of one is completed.

        Args:
            directory: its name.
            source: CUDA source.
            data: the cubin.
            flags: with which it was compiled.

        Raises:
            CacheError: it is no whole cubin, or bears the stub's mark, or the cache cannot be written.
        """
        defect = "a recorder's stub" if stub.is_stub(data) else cubin.defect_of(data)
        if defect is not None:
            raise CacheError(f"{directory}: the cubin is not published: {defect}")

        def build(place: Path) -> None:
            for name, content in self.dialect.entry(source, data, flags):
                files.write_synced(place / name, content)

        path = self.path(directory)
        try:
            if not path.exists():
                if files.publish(path, build, self.scratch):
                    return
                # Somebody was faster: theirs is used, as soon as this machine's view of a shared cache has it.
                end = time.monotonic() + VISIBLE_S
                while not path.exists() and time.monotonic() < end:
                    time.sleep(_LOOK_AGAIN_S)
            if path.exists() and not self.has(directory):
                # DeepGEMM would abort on half a kernel. It is completed where it is, not moved: a DeepGEMM of 2025 may
                # be filling it just now, and aborts if it goes.
                for name, content in self.dialect.entry(source, data, flags):
                    files.write_atomically(path / name, content)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error

    def set_aside(self, directory: str) -> Path:
        """Move a kernel out of DeepGEMM's sight. Returns where it is now.

        Raises:
            CacheError: the cache cannot be written.
        """
        path = self.path(directory)
        if path.parent.parent != self.root:
            raise CacheError(f"{path} cannot be set aside: that cache is only read")
        aside = self.own / "set-aside" / f"{directory}.{uuid.uuid4().hex[:8]}"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
        except OSError as error:
            raise CacheError(_unwritable(self.root, error)) from error
        return aside


def _unwritable(root: Path, error: OSError) -> str:
    what = error.strerror or error
    return f"the kernel cache {root} cannot be written ({what}): {files.hint(error)}, or set SGLANG_DG_CACHE_DIR"
