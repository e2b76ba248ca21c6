"""What kit.cache_check is to find in a cache, put there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kit.cache_check import faults_of
from sglang_warmstart.deepgemm import stub
from sglang_warmstart.deepgemm.cache import KernelCache

_ELF = b"\x7fELF\x02\x01\x01" + bytes(57)


def half(cache: KernelCache, kernel: Path) -> None:
    (kernel / "kernel.cubin").unlink()


def cut_off(cache: KernelCache, kernel: Path) -> None:
    (kernel / "kernel.cubin").write_bytes(_ELF[:-1])


def a_stub(cache: KernelCache, kernel: Path) -> None:
    (kernel / "kernel.cubin").write_bytes(_ELF + stub.MARK)


def no_source(cache: KernelCache, kernel: Path) -> None:
    (kernel / "kernel.cu").write_bytes(b"")


def an_unfinished_file(cache: KernelCache, kernel: Path) -> None:
    (kernel / "kernel.cu.0123abcd").touch()


def an_unfinished_directory(cache: KernelCache, kernel: Path) -> None:
    (cache.scratch / "warmstart-1").mkdir(parents=True)


def a_damaged_marker(cache: KernelCache, kernel: Path) -> None:
    (cache.own / "markers" / "identity").mkdir(parents=True)
    (cache.own / "markers" / "identity" / "launch.json").write_text("{")


FAULTS = (half, cut_off, a_stub, no_source, an_unfinished_file, an_unfinished_directory, a_damaged_marker)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_is_found(fault: Callable[[KernelCache, Path], None], tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    name = "kernel.gemm." + 32 * "0"
    cache.publish(name, "source", _ELF)
    assert faults_of(cache) == []
    fault(cache, cache.path(name))
    assert len(faults_of(cache)) == 1
