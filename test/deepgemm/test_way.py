"""The way to record: without the GPU only where that was shown to give the same kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.nogpu.host import KNOWN
from sglang_warmstart.deepgemm.record.way import ON_GPU, Way, way_for

RESULTS = Path(__file__).parents[1] / "gpu" / "results"


def way(version: str = "0.2.3.post2", gpu: str = "h200", **environment: str) -> Way:
    return way_for(toolchain().deep_gemm_of(version), gpu_of(gpu), {**os.environ, **environment})


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_release_that_was_compared_is_recorded_without_the_gpu(gpu: str) -> None:
    assert not way(gpu=gpu).takes_gpu


@pytest.mark.parametrize(
    ("version", "gpu", "reason"),
    [
        ("0.2.5", "h200", "for sgl-deep-gemm 0.2.5 it was not compared with a GPU such as NVIDIA H200"),
        ("0.2.3.post2", "h20", "not compared with a GPU such as NVIDIA H20"),
        ("0.2.3.post2", "h200:120", "not compared with a GPU such as NVIDIA H200"),
        ("0.2.3.post2", "b200", "not compared with a GPU such as NVIDIA B200"),
    ],
)
def test_what_was_not_compared_is_recorded_on_the_gpu(version: str, gpu: str, reason: str) -> None:
    found = way(version, gpu)
    assert found.library == ON_GPU
    assert reason in found.reason


def test_without_a_c_compiler_it_is_recorded_on_the_gpu(tmp_path: Path) -> None:
    found = way(XDG_CACHE_HOME=str(tmp_path), CC="no-such-compiler")
    assert found.takes_gpu
    assert "CC=no-such-compiler is not there" in found.reason


def test_an_unknown_library_is_recorded_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"of a fork")
    found = way_for(tmp_path, Gpu("NVIDIA H200", 132, (9, 0), 0), os.environ)
    assert found.takes_gpu
    assert "none of the releases" in found.reason


def compared() -> dict[str, bool]:
    """Releases that were recorded both ways on a Hopper GPU of 132 SMs, and whether all was the same."""
    first = json.loads((RESULTS / "nogpu.json").read_text())["releases"]
    found = {version: each["same"] for version, each in first.items()}
    for path in (RESULTS / "releases").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["about"]["sms"] == 132
        found[result["version"]] = result["recorded"]["same"] and result["recorded"]["same_as_plan"]
    return found


def test_the_table_says_what_was_measured() -> None:
    assert {each.version for each in KNOWN.values() if each.same_on} == {
        version for version, same in compared().items() if same
    }
