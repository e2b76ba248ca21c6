"""A kernel's name in the cache is the one that DeepGEMM itself gives it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import digest

TEXT = st.text(max_size=200)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,40}", fullmatch=True)


@pytest.mark.parametrize("directory", recording().kernels)
def test_deep_gemm_gave_the_same_name_where_the_kernel_was_recorded(directory: str) -> None:
    include = Path(recording().installed_in, "include")
    assert recording().relocated(directory, include).directory == directory


def test_another_install_path_of_deep_gemm_gives_every_kernel_another_name() -> None:
    here, there = (
        {recording().relocated(directory, Path(root, "include")).directory for directory in recording().kernels}
        for root in ("/opt/a/deep_gemm", "/opt/b/deep_gemm")
    )
    assert len(here) == len(there) == len(recording().kernels)
    assert not here & there


def _fnv1a_with_splitmix64(data: bytes, offset_basis: int) -> int:
    """Both algorithms as their authors give them in C, with C's own 64-bit numbers."""
    state = ctypes.c_uint64(offset_basis)
    for byte in data:
        state.value ^= byte
        state.value *= 1099511628211
    state.value = (state.value ^ (state.value >> 30)) * 0xBF58476D1CE4E5B9
    state.value = (state.value ^ (state.value >> 27)) * 0x94D049BB133111EB
    return state.value ^ (state.value >> 31)


@given(st.binary(max_size=500))
def test_the_digest_is_two_finished_fnv1a_states(data: bytes) -> None:
    first, second = (_fnv1a_with_splitmix64(data, seed) for seed in (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15))
    assert digest.hex_digest(data) == f"{first:016x}{second:016x}"


@given(NAMES, TEXT, TEXT, TEXT)
def test_a_directory_hashes_name_compiler_flags_and_source_in_this_order(
    name: str, signature: str, flags: str, source: str
) -> None:
    directory = digest.directory_of(name, signature, flags, source)
    hashed = "$$".join((name, signature, flags, source))
    assert directory == f"kernel.{name}.{digest.hex_digest(hashed.encode())}"
    assert digest.name_of(directory) == name


@pytest.mark.parametrize(
    "directory",
    [
        "",
        "kernel.a",
        "kernel..0123456789abcdef0123456789abcdef",
        "kernel.a.0123",
        "gemm.0123456789abcdef0123456789abcdef",
    ],
)
def test_what_is_no_kernels_directory_has_no_name(directory: str) -> None:
    with pytest.raises(ValueError, match="not a kernel's directory"):
        digest.name_of(directory)


def test_the_signature_of_the_compiler_at_hand_is_that_of_the_recording() -> None:
    signature = digest.signature_of(toolchain().compiler().version)
    assert signature == digest.signature_of(recording().compiler) == "NVCC13.0"


@given(st.integers(1, 99), st.integers(0, 99))
def test_a_signature_is_the_release_that_the_compiler_prints(major: int, minor: int) -> None:
    said = f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {major}.{minor}, V{major}.{minor}.1"
    assert digest.signature_of(said) == f"NVCC{major}.{minor}"


def test_a_compiler_that_prints_no_release_has_no_signature() -> None:
    with pytest.raises(ValueError, match=r"no release in .*'gcc 12'"):
        digest.signature_of("gcc 12\n")
