"""SGLang's own wrapper, and behind the service the library of the DeepGEMM that this release pins: no GPU is needed.

`make test-matrix` installs that DeepGEMM, so that these tests run only there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from kit.environment import python_path
from kit.gpu_standins import CudaRuntime
from kit.node import Node
from kit.release import installed_release
from kit.served_rank import ServedRank
from kit.toolchain import toolchain
from kit.wheels import deep_gemm_of_the_release, pinned_deep_gemm, torch_2_11
from kit.wrapped_gemms import CALLS, DENSE, MASKED, K, target
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.nogpu.host import KNOWN, Known
from sglang_warmstart.deepgemm.record.way import WITHOUT_GPU

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

FEATURE = "exact-warmup"


@pytest.fixture
def known() -> Known:
    """What is known of the library."""
    library = deep_gemm_of_the_release() / "_C.so"
    return KNOWN[hashlib.sha256(library.read_bytes()).hexdigest()[:16]]


@pytest.fixture
def recording(known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Node]:
    """A node whose service records with the library."""
    monkeypatch.delenv("SGLANG_WARMSTART_STRICT", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    torch = [torch_2_11()] if "2.11" in known.torch else []
    path = python_path(*torch, Path(__file__).parents[2])
    with Node(tmp_path, library=WITHOUT_GPU, PYTHONPATH=path) as node:
        yield node


def test_the_release_pins_a_known_library(known: Known) -> None:
    assert known.version == pinned_deep_gemm()


@pytest.mark.parametrize("kernel_type", [DENSE, MASKED])
def test_a_gemm_of_its_wrapper_is_recorded_by_its_library_and_warmed(
    kernel_type: str,
    recording: Node,
    cuda: CudaRuntime,
    runner: ModelRunner,
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rank = ServedRank(tmp_path, recording, cuda, monkeypatch)
    # What the rank itself calls is a stand-in.
    package = deep_gemm_of_the_release()
    monkeypatch.setattr(rank.deep_gemm.module, "__file__", str(package / "__init__.py"))
    rank.connect(runner)
    assert CALLS[kernel_type]().unique().tolist() == [K]
    (marker,) = rank.markers
    (found,) = marker.targets
    assert found.target == target(kernel_type), recording.log
    dialect, names = dialects.dialect_of(package), {use.directory for use in found.kernels}
    assert (dialect is dialects.DEEPJIT) is installed_release().since("0.5.20")
    gemms = {dialect.kernel_name(name) for name in names} - {"transpose_fp32"}
    assert gemms <= {"sm90_fp8_gemm_1d2d", "sm90_fp8_m_grouped_gemm_masked_1d2d"} and len(gemms) == 1, recording.log
    entries = rank.cache / "cache"
    assert names and all(dialect.is_whole(entries / name) for name in names)
    assert "stub" not in rank.nvcc.runs
