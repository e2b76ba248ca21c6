"""Where compiled kernels go: into a bundle, or into a cache that DeepGEMM uses as it is."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sglang_warmstart.base import trust
from sglang_warmstart.bundle import archive, packing, toolchain
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.restore import has_good, mark
from sglang_warmstart.bundle.signature import PrivateKey
from sglang_warmstart.deepgemm.cache import CacheError
from sglang_warmstart.deepgemm.dialects.dialect import CUBIN
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.libraries.cached import LibraryCache

_BUNDLE_SUFFIX = ".zst"


class Output(Protocol):
    """Where compiled kernels go.

    Args:
        failed: why a kernel could not be compiled, by its name.
    """

    failed: dict[str, str]

    def open(self, directory: Path) -> set[str]:
        """See that it can be written, and take over what an earlier run has left. Returns the kernels that are there.

        Args:
            directory: for its files.

        Raises:
            BundleError: it cannot be written, or is of something else.
        """

    def put(self, name: str, data: bytes) -> None:
        """Take a kernel.

        Raises:
            BundleError: it cannot be written.
        """

    def write(self) -> None:
        """Have on disk what there is.

        Raises:
            BundleError: it cannot be written.
        """

    def close(self) -> None:
        """There is no more to come.

        Raises:
            BundleError: it cannot be written.
        """

    @property
    def bytes(self) -> int:
        """What it takes on disk."""


def output_of(path: Path, plan: Plan, key: PrivateKey | None, deep_gemm: str | None) -> Output:
    """A bundle if ``path`` is a file or ends as a bundle's does, else a cache.

    Args:
        key: that signs a bundle.
        deep_gemm: the directory of the package, if it was named.

    Raises:
        BundleError: a cache is to be signed, or there is no DeepGEMM to make one for.
    """
    # Not by any suffix: a directory may be called after a release, such as kernels-0.2.3.
    if not path.is_dir() and (path.suffix == _BUNDLE_SUFFIX or path.is_file()):
        return Bundle(path, plan, key)
    if key is not None:
        raise BundleError(f"{path} is to be a cache, and a cache bears no signature: write a bundle (FILE.tar.zst)")
    package = Path(deep_gemm).absolute() if deep_gemm else toolchain.installed_deep_gemm()
    if package is None:
        raise BundleError("DeepGEMM is not installed here: install sgl-deep-gemm, or name it with --deep-gemm")
    return CacheRoot(path, plan, package)


@dataclass
class CacheRoot:
    """A root of DeepGEMM's cache.

    DeepGEMM 0.2.x uses it wherever it is installed, also read-only: ``DG_JIT_CACHE_DIR=WRITABLE:ROOT``. In 0.1.x the
    names of kernels depend on where DeepGEMM is installed: it is for a DeepGEMM in the same place as the one here.

    Args:
        path: of the root.
        plan: that it is made from.
        deep_gemm: the directory of the package, as the server will see it.
    """

    path: Path
    plan: Plan
    deep_gemm: Path
    failed: dict[str, str] = field(default_factory=dict)
    _new: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._include = self.deep_gemm / "include"
        self._cache = self.plan.cache_in(self.path.absolute())
        self._names = self.plan.directories(self._include)

    def open(self, directory: Path) -> set[str]:
        """See :class:`Output`."""
        try:
            trust.check_caches((self._cache.root,), os.environ)
            self._cache.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._cache.root).close()
            return {name for name, entry in self._names.items() if has_good(self._cache, entry)}
        except trust.UntrustedError as error:
            raise BundleError(str(error)) from error
        except OSError as error:
            what = error.strerror or error
            raise BundleError(f"{self.path} cannot be written ({what}): name another place") from error
        except CacheError as error:
            raise BundleError(str(error)) from error

    def put(self, name: str, data: bytes) -> None:
        """See :class:`Output`."""
        entry, flags = self._names[name], self.plan.flags_of(name, self._include)
        try:
            self._cache.publish(entry, self.plan.kernels[name].source, data, flags)
        except CacheError as error:
            raise BundleError(str(error)) from error
        self._new.add(entry)

    def write(self) -> None:
        """See :class:`Output`. Each kernel is there since it was put."""

    def close(self) -> None:
        """See :class:`Output`. Leaves the markers of the plan's launches: a server on this root asks for nothing."""
        try:
            mark(self._cache, self.plan, self.deep_gemm, self.plan.compiler, self._names, self._new)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written ({error.strerror or error})") from error
        except CacheError as error:
            raise BundleError(str(error)) from error

    @property
    def bytes(self) -> int:
        """See :class:`Output`. Of its kernels."""
        entries = {name for name in self._names.values() if self._cache.has(name)}
        return sum((self._cache.path(name) / CUBIN).stat().st_size for name in entries)


@dataclass
class Bundle:
    """The bundle that is being made.

    Args:
        path: where it goes.
        plan: that it is made from.
        key: that signs it.
    """

    path: Path
    plan: Plan
    key: PrivateKey | None
    cubins: dict[str, bytes | Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    caches: list[tuple[LibraryCache, dict[str, Path]]] = field(default_factory=list)

    def open(self, directory: Path) -> set[str]:
        """See :class:`Output`."""
        self._see_place()
        if self.path.exists():
            self._resume(directory)
        return set(self.cubins)

    def put(self, name: str, data: bytes) -> None:
        """See :class:`Output`."""
        self.cubins[name] = data

    def close(self) -> None:
        """See :class:`Output`."""

    @property
    def bytes(self) -> int:
        """See :class:`Output`."""
        return self.path.stat().st_size

    def _resume(self, directory: Path) -> None:
        try:
            with self.path.open("rb") as stream:
                # What is taken over is signed with the rest: so it has to be this key's own.
                manifest = archive.read(stream, is_signed_by=self.key.public_key if self.key else None)
                old = manifest.plan
                if any(getattr(old, part) != getattr(self.plan, part) for part in ("compiler", "kind", "headers")):
                    raise BundleError("of another compiler or another DeepGEMM")
                if manifest.cubins and not manifest.cubins.keys() & self.plan.kernels.keys():
                    raise BundleError("of another plan, it has no kernel of this one")
                archive.extract(stream, manifest, directory)
        except (BundleError, OSError) as error:
            raise BundleError(f"{self.path} is there, and is not gone on with: {error}: remove it first") from error
        self.cubins = {
            name: directory / sha256 for name, sha256 in manifest.cubins.items() if name in self.plan.kernels
        }
        self.caches = [
            (cache, {file.sha256: directory / file.sha256 for file in cache.files}) for cache in manifest.caches
        ]

    def _see_place(self) -> None:
        # Before compilers work for it.
        try:
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise BundleError(
                f"{self.path} cannot be written ({error.strerror or error}): name another place"
            ) from error

    def write(self) -> None:
        """See :class:`Output`. Whole or not at all."""
        contents = packing.contents_of(self.plan, self.cubins, failed=self.failed, caches=self.caches)
        archive.write(self.path, contents.manifest, contents.open, sign=self.key.sign if self.key else None)
