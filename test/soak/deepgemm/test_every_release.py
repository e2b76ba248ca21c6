"""Each release of DeepGEMM, recorded without a GPU: it is known, and its kernels are those of a GPU.

Installs the releases, and torch 2.11 without NVIDIA's libraries, into directories of this test: 1.4 GB.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from kit import torch_without_cuda
from kit.environment import child_environment, python_path
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.nogpu.host import KNOWN, PLACE
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target

RESULTS = Path(__file__).parents[2] / "gpu" / "results" / "nogpu.json"
TARGETS = [each.target for each in recording().targets]

_RECORD = """
import json, multiprocessing, sys
import msgspec
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.record.child import RecordingOrder, record
from sglang_warmstart.deepgemm.target import Target

if __name__ == "__main__":
    library = "sglang_warmstart.deepgemm.nogpu.library"
    gpu, targets, version, directory, jit, place = json.loads(sys.argv[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([library, record.__module__])
    found = []
    for target in msgspec.convert(targets, list[Target]):
        environment = {"SGLANG_WARMSTART_NOGPU_DEEP_GEMM": place}
        order = RecordingOrder(
            target, gpu_of(gpu), environment, version, directory + "/stub", directory, library, jit
        )
        found.append([msgspec.to_builtins(each) for each in record(context, order, 300, lambda: False)])
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def old_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Python finds torch 2.11."""
    site = tmp_path_factory.mktemp("torch-2.11")
    _install(site, "torch==2.11.0")
    torch_without_cuda.complete(site / "torch")
    return site


def _install(site: Path, requirement: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), requirement]
    subprocess.run(command, check=True)


def record(
    deep_gemm: Path, torch: Path | None, gpu: str, targets: list[Target], compiler: str, directory: Path
) -> list[list[RecordedKernel]]:
    (directory / "stub").write_bytes(b"sglang_warmstart_stub")
    jit = dialects.dialect_of(deep_gemm).name
    words = json.dumps([gpu, msgspec.to_builtins(targets), compiler, str(directory), jit, str(deep_gemm)])
    program = directory / "record.py"
    program.write_text(_RECORD)
    environment = {PLACE: str(deep_gemm), "PYTHONPATH": python_path(*filter(None, [torch]))}
    done = subprocess.run(
        [sys.executable, program, words], env=child_environment(environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return msgspec.convert(json.loads(done.stdout), list[list[RecordedKernel]])


@pytest.mark.parametrize("version", [each.version for each in KNOWN.values()])
def test_it_is_known_to_the_byte_and_records_every_kernel_type(version: str, tmp_path: Path, old_torch: Path) -> None:
    _install(tmp_path / "site", f"sgl-deep-gemm=={version}")
    deep_gemm = tmp_path / "site" / "deep_gemm"
    known = KNOWN[hashlib.sha256((deep_gemm / "_C.so").read_bytes()).hexdigest()[:16]]
    assert known.version == version
    torch = old_torch if "2.11" in known.torch else None
    found = record(deep_gemm, torch, "h100", TARGETS, recording().compiler, tmp_path)
    assert all(found) or dialects.dialect_of(deep_gemm) is dialects.DEEPJIT  # there cuBLAS has bf16
    truth = json.loads(RESULTS.read_text())["releases"].get(version)
    if truth is not None:
        assert truth["same"], "the GPU host has seen a difference"
        there = Path(truth["include"])
        assert [
            [[each.m, _named(each, deep_gemm, there, truth["compiler"])] for each in kernels] for kernels in found
        ] == list(truth["entries"].values())


def _named(kernel: RecordedKernel, deep_gemm: Path, include: Path, compiler: str) -> str:
    """The name of a kernel where DeepGEMM's headers are in `include`."""
    flags = kernel.flags.replace(str(deep_gemm / "include"), str(include))
    dialect = dialects.dialect_of(deep_gemm)
    return dialect.directory_of(kernel.directory, compiler, flags, kernel.source)


def test_the_kernels_of_0_1_0_are_those_that_an_h200_had(tmp_path: Path, old_torch: Path) -> None:
    deep_gemm, truth = toolchain().deep_gemm, recording()
    found = record(deep_gemm, old_torch, "h200", TARGETS, truth.compiler + "\n", tmp_path)
    here = Path(truth.installed_in) / "include"
    for target, kernels in zip(truth.targets, found, strict=True):
        named = [(each.m, _named(each, deep_gemm, here, truth.compiler)) for each in kernels]
        assert named == [(use.m, use.directory) for use in target.kernels], target.target
