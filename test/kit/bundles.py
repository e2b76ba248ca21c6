"""Small bundles, whole ones and others: as this package writes them, and put together block by block."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard
from hypothesis import strategies as st
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import Manifest
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.plan import Plan, Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries.cached import CachedFile, LibraryCache

from kit.recorded import recording

LAUNCH = {"model": "deepseek", "rank": "0"}
Member = tuple[tarfile.TarInfo, bytes]
TarFormat = Literal[0, 1, 2]  # tarfile's USTAR_FORMAT, GNU_FORMAT and PAX_FORMAT


def identity() -> Identity:
    """That of the ranks that the plans are for."""
    return Identity(
        gpu="NVIDIA H200",
        num_sms=132,
        capability=(9, 0),
        deep_gemm="0123",
        installed_in=recording().installed_in,
        compiler=recording().compiler,
        kind="nvcc",
        settings={"DG_JIT_USE_NVRTC": "0"},
    )


@cache
def recorded_plan() -> Plan:
    """A plan of three kernels that DeepGEMM asked for."""
    include = Path(recording().installed_in, "include")
    shapes = (("GROUPED_GEMM_NT_F8F8BF16_MASKED", 7168, 2048), ("TF32_HC_PRENORM_GEMM", 24, 28672))
    targets = [recording().of_target(*shape, include) for shape in shapes]
    return _plan_of(targets)


@cache
def tiny_plan() -> Plan:
    """A plan of two kernels in as few bytes as may be."""
    target = Target(kernel_type="GEMM", n=1, k=1, num_groups=1, num_sms=1, m_max=2)
    kernels = [RecordedKernel(f"kernel.{name}.{'0' * 32}", f"// {name}", "-O3", m) for m, name in enumerate("ab", 1)]
    return _plan_of([(target, kernels)])


def _plan_of(targets: Iterable[tuple[Target, list[RecordedKernel]]]) -> Plan:
    planner = Planner(identity(), "sgl-deep-gemm 0.1.0", "4567")
    planner.add(identity(), LAUNCH, targets)
    return planner.plan()


def cubin(payload: bytes = b"") -> bytes:
    """The smallest file that counts as a whole cubin, and something behind its header."""
    return b"\x7fELF\x02".ljust(64, b"\0") + payload


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A manifest and the contents of its files, by SHA-256."""

    manifest: Manifest
    contents: Mapping[str, bytes]

    def open(self, name: str) -> BinaryIO:
        """A content, as the archive's writer wants it."""
        return io.BytesIO(self.contents[name])

    def members(self, signature: bytes | None = None) -> list[Member]:
        """What is in its archive."""
        members = [member("manifest.json", manifests.encode(self.manifest))]
        if signature is not None:
            members.append(member("manifest.sig", signature))
        return members + [member(f"files/{name}", self.contents[name]) for name in sorted(self.contents)]

    def archive(self, signature: bytes | None = None) -> bytes:
        """Its archive, made without this package's writer."""
        return compressed(tar_of(self.members(signature)))


def bundle_of(
    plan: Plan, cubins: Iterable[bytes], cached: Mapping[str, bytes] | None = None, failed: str = "no reason"
) -> Bundle:
    """A bundle of a plan.

    Args:
        cubins: of its first kernels. The others have failed.
        cached: files of Triton's cache, by path.
        failed: why they have.
    """
    by_kernel = dict(zip(plan.kernels, cubins, strict=False))
    contents = {sha256(data): data for data in (*by_kernel.values(), *(cached or {}).values())}
    files = tuple(CachedFile(path, sha256(data), 1_700_000_000_000_000_000) for path, data in (cached or {}).items())
    manifest = Manifest(
        made_by="0.1.0",
        plan=plan,
        cubins={kernel: sha256(data) for kernel, data in by_kernel.items()},
        failed={kernel: failed for kernel in plan.kernels if kernel not in by_kernel},
        caches=(LibraryCache("triton", {"triton": "3.4.0"}, files),) if cached is not None else (),
        files={name: len(data) for name, data in contents.items()},
    )
    return Bundle(manifest, contents)


def small_bundle() -> Bundle:
    """Two cubins, a kernel that failed, and two files of Triton's cache, of which one is empty."""
    cached = {"AB/kernel.cubin": cubin(b"triton" * 100), "AB/__init__.py": b""}
    return bundle_of(recorded_plan(), [cubin(b"one" * 300), cubin(b"two")], cached)


def bundles() -> st.SearchStrategy[Bundle]:
    """Bundles of all kinds."""
    names = st.text(st.characters(exclude_characters="/", exclude_categories=("C", "Z")), min_size=1, max_size=8)
    paths = st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3)
    contents = st.binary(max_size=2000) | st.integers(0, 300_000).map(bytes)
    # A digit in front of the last name and a letter before the others: no file is where a directory is.
    cached = st.dictionaries(
        paths.map(lambda path: "/".join([*(f"d{x}" for x in path[:-1]), f"0{path[-1]}"])), contents
    )
    plans = st.sampled_from([recorded_plan(), tiny_plan()])
    return st.builds(bundle_of, plans, st.lists(contents, max_size=3), st.none() | cached, st.text())


# Archives of all kinds


def member(name: str, data: bytes, **fields: object) -> Member:
    """A member of a tar file, a regular file unless its fields say otherwise."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def block(info: tarfile.TarInfo, *, tar_format: TarFormat = tarfile.USTAR_FORMAT) -> bytes:
    """The header of a member, or its headers where the format needs several."""
    return info.tobuf(tar_format, "utf-8", "surrogateescape")


def padded(data: bytes, size: int = tarfile.BLOCKSIZE) -> bytes:
    """Zeros up to a whole block."""
    return data + bytes(-len(data) % size)


def tar_of(members: Iterable[Member], *, tar_format: TarFormat = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file. What a member's header says need not be so."""
    blocks = b"".join(block(info, tar_format=tar_format) + padded(data) for info, data in members)
    return padded(blocks + bytes(2 * tarfile.BLOCKSIZE), tarfile.RECORDSIZE)


def compressed(data: bytes) -> bytes:
    """One frame of zstd."""
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)


def bomb(start: bytes, zeros: int) -> bytes:
    """A frame of zstd that unpacks to some bytes and then very many zeros: 4 bytes for each 128 KiB."""
    # Magic number; no checksum, no size; a window of 128 KiB: by RFC 8878, 3.1.1.
    frame = bytearray(struct.pack("<IBB", 0xFD2FB528, 0, 7 << 3))
    for at in range(0, len(start), 1 << 17):
        piece = start[at : at + (1 << 17)]
        frame += struct.pack("<I", len(piece) << 3)[:3] + piece
    full, rest = divmod(zeros, 1 << 17)
    frame += struct.pack("<I", 1 << 1 | 1 << 17 << 3) * full
    return bytes(frame + struct.pack("<I", 1 | 1 << 1 | rest << 3))
