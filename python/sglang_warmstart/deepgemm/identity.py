"""The identity: everything that could change which kernels a target needs, or what they compile to."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.dialects import FIRST_JIT, dialect_of, named


class Gpu(msgspec.Struct, frozen=True):
    """A GPU as a rank sees it.

    Args:
        name: by its driver.
        num_sms: its SMs.
        capability: compute capability.
        ordinal: its number among the devices that are visible to the rank.
        visible: the rank's CUDA_VISIBLE_DEVICES, None where that is not set.
    """

    name: str
    num_sms: int
    capability: tuple[int, int]
    ordinal: int
    visible: str | None = None

    @property
    def device(self) -> str:
        """Which GPU of the node it is, for ranks that see different ones as their first."""
        visible = (self.visible or "").split(",")
        return visible[self.ordinal].strip() if self.visible and self.ordinal < len(visible) else str(self.ordinal)


class Identity(msgspec.Struct, frozen=True):
    """The key of everything that is remembered of a cache.

    Args:
        gpu, num_sms, capability: which GPU.
        deep_gemm: hash of the build of DeepGEMM, and where it is installed: that is in the compiler's flags.
        compiler: its version in its own words, and its kind.
        settings: DeepGEMM's environment variables.
        jit: the dialect's name.
    """

    gpu: str
    num_sms: int
    capability: tuple[int, int]
    deep_gemm: str
    installed_in: str
    compiler: str
    kind: str
    settings: dict[str, str]
    jit: str = "0.1"

    @property
    def digest(self) -> str:
        """A name for it: 16 hexadecimal digits."""
        parts = msgspec.to_builtins(self)
        if self.jit == FIRST_JIT.name:
            del parts["jit"]  # what was left before there was another is still found
        if named(self.jit).is_relocatable:
            del parts["installed_in"]
        return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]


def identity_of(gpu: Gpu, compiler: Compiler, deep_gemm: Path, environment: Mapping[str, str]) -> Identity:
    """The identity of what a rank compiles with.

    Args:
        deep_gemm: the directory of the package ``deep_gemm``.
        environment: of the rank.

    Raises:
        UnknownJitError: that DeepGEMM fits no dialect.
    """
    dialect = dialect_of(deep_gemm)
    return Identity(
        gpu=gpu.name,
        num_sms=gpu.num_sms,
        capability=gpu.capability,
        deep_gemm=build_hash(deep_gemm),
        installed_in=str(deep_gemm),
        compiler=compiler.version,
        kind=compiler.kind,
        settings=dialect.settings(environment),
        jit=dialect.name,
    )


def build_hash(deep_gemm: Path) -> str:
    """A hash of DeepGEMM's build: its library and its headers.

    Args:
        deep_gemm: the directory of the package.
    """
    return _hash(deep_gemm, "*.so", "VERSION", "include/deep_gemm/**/*")


def headers_hash(deep_gemm: Path) -> str:
    """A hash of the headers that come with DeepGEMM: they decide what a source is compiled to, wherever that is done.

    Args:
        deep_gemm: the directory of the package.
    """
    return _hash(deep_gemm, "include/**/*")


def distribution_of(deep_gemm: Path) -> str:
    """The distribution that brought DeepGEMM, and its version, such as ``sgl-deep-gemm 0.1.0``; empty if none is known.

    Args:
        deep_gemm: the directory of the package.
    """
    for each in importlib.metadata.distributions(path=[str(deep_gemm.parent)]):
        name = each.metadata["Name"] or ""
        if name.lower().replace("_", "-").endswith("deep-gemm"):
            return f"{name} {each.version}"
    return ""


def _hash(directory: Path, *patterns: str) -> str:
    total = hashlib.sha256()
    files = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    for path in sorted(files):
        total.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
