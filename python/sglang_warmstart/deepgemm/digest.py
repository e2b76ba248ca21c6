"""Compute DeepGEMM's name for a kernel in its cache.

Source: DeepGEMM 0.1.x, ``csrc/jit/compiler.hpp`` (what is hashed) and ``csrc/utils/hash.hpp`` (how).
"""

from __future__ import annotations

import re

_MASK = (1 << 64) - 1
_PRIME = 0x100000001B3
_SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)


def hex_digest(data: bytes) -> str:
    """Two FNV-1a states of 64 bits, each finished by SplitMix64's mixer: 32 hexadecimal digits."""
    return "".join(f"{_mixed(_fnv1a(data, seed)):016x}" for seed in _SEEDS)


def _fnv1a(data: bytes, state: int) -> int:
    for byte in data:
        state = ((state ^ byte) * _PRIME) & _MASK
    return state


def _mixed(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def signature_of(version: str) -> str:
    """DeepGEMM's name for a compiler, from what that prints for ``--version``: ``NVCC13.0``.

    Raises:
        ValueError: there is no release in it.
    """
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise ValueError(f"no release in what the compiler prints for --version: {version.strip()[:200]!r}")
    return f"NVCC{int(release.group(1))}.{int(release.group(2))}"


def directory_of(name: str, signature: str, flags: str, source: str) -> str:
    """The directory in the cache of a kernel.

    Args:
        name: the kernel's name, such as ``sm90_fp8_gemm_1d2d``.
        signature: see :func:`signature_of`.
        flags: all flags in one line. They hold DeepGEMM's include path, so the name depends on where it is installed.
        source: the CUDA source.
    """
    return f"kernel.{name}.{hex_digest(f'{name}$${signature}$${flags}$${source}'.encode())}"


def name_of(directory: str) -> str:
    """The kernel's name in ``kernel.NAME.DIGEST``.

    Raises:
        ValueError: it is no such directory.
    """
    match = re.fullmatch(r"kernel\.([\w-]+)\.[0-9a-f]{32}", directory, re.ASCII)
    if match is None:
        raise ValueError(f"not a kernel's directory: {directory!r}")
    return match.group(1)
