"""With several threads, ptxas makes the same machine code; where it cannot have them, nothing is said of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from kit.machine_code import machine_code
from kit.toolchain import toolchain
from sglang_warmstart.libraries import ptxas_threads
from sglang_warmstart.libraries.ptxas_threads import FLAGS, variables

KERNELS = """
template <int N> __global__ void scale(float* values) {
  __shared__ float shared[N];
  shared[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] += sinf(shared[i]) * shared[(i + 7) % N];
}
"""
SIZES = (32, 64, 128, 256)


def test_the_machine_code_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    uses = "".join(f"template __global__ void scale<{size}>(float*);\n" for size in SIZES)
    source.write_text(KERNELS + uses)
    environment = {**os.environ, "CUDA_HOME": str(toolchain().cuda_home)}
    made = []
    for threads in (1, 4):
        cubin = tmp_path / f"{threads}.cubin"
        command = [str(toolchain().nvcc), "-arch=sm_90a", "-cubin", str(source), "-o", str(cubin), "--dryrun"]
        own = {**environment, **variables(threads, environment)}
        said = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stderr
        assert ("--split-compile=4" in said) == (threads == 4)
        subprocess.run(command[:-1], env=own, capture_output=True, check=True)
        made.append(machine_code(cubin.read_bytes()))
    assert len(made[0]) == len(SIZES) and made[0] == made[1]


@pytest.mark.parametrize("help_", ["", "exit 1", "echo --split", "sleep 60"])
def test_a_ptxas_that_cannot_or_does_not_say_so_is_left_alone(
    help_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptxas_threads, "_HELP_LIMIT_S", 0.2)
    home = {"CUDA_HOME": str(tmp_path)}
    if help_:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ptxas").write_text(f"#!/bin/sh\n{help_}\n")
        (tmp_path / "bin" / "ptxas").chmod(0o755)
    assert variables(4, home) == {}


def test_what_a_user_has_said_counts() -> None:
    home = {"CUDA_HOME": str(toolchain().cuda_home)}
    assert variables(4, {**home, FLAGS: "--split-compile=2"}) == {}
    assert variables(4, {**home, "NVCC_PREPEND_FLAGS": "-Xptxas --split-compile=2"}) == {}
    assert variables(4, {**home, FLAGS: "-lineinfo"}) == {FLAGS: "-lineinfo -Xptxas --split-compile=4"}
    assert variables(1, home) == {}
