"""Real libraries of DeepGEMM on top of the stand-ins: recorded from, and called on a cache."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import msgspec
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.nogpu.host import PLACE
from sglang_warmstart.deepgemm.record.child import RecordingOrder, record
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.stub import MARK
from sglang_warmstart.deepgemm.target import Target

from kit.environment import child_environment
from kit.toolchain import toolchain

# Of each of its JITs, and of each way in which tensors get in. `make .toolchain/.complete` installs them.
RELEASES = ("0.1.7", "0.2.0", "0.2.3.post2", "0.2.5")

# Like those of DeepSeek-V3 on one GPU, one of each kernel type; of few Ms.
_DENSE = Target(
    kernel_type="GEMM_NT_F8F8BF16",
    n=2112,
    k=7168,
    num_groups=1,
    num_sms=132,
    m_max=512,
    lhs_scale="k",
    rhs_scale="k",
)
_GROUPED = msgspec.structs.replace(_DENSE, n=4096, num_groups=32, lhs_scale="tma")
TARGETS = (
    _DENSE,
    msgspec.structs.replace(_GROUPED, kernel_type="GROUPED_GEMM_NT_F8F8BF16_CONTIG", m_max=1024, m_alignment=128),
    msgspec.structs.replace(_GROUPED, kernel_type="GROUPED_GEMM_NT_F8F8BF16_MASKED", m_max=128),
    Target(
        kernel_type="TF32_HC_PRENORM_GEMM",
        n=24,
        k=28672,
        num_groups=4,
        num_sms=132,
        m_max=256,
        out_dtype="float32",
    ),
)

_CONTIGUOUS, _MASKED = (
    msgspec.structs.replace(each, m_max=m_max, num_groups=8) for each, m_max in zip(TARGETS[1:3], (128, 8), strict=True)
)
_BF16 = {"lhs_scale": "", "rhs_scale": ""}
_PACKED = {"lhs_scale": "packed", "rhs_scale": "packed"}
_FP4 = {**_PACKED, "rhs_type": "fp4", "recipe_a": (1, 128), "recipe_b": (1, 32)}
_MXFP8 = {**_PACKED, "recipe_a": (1, 32), "recipe_b": (1, 32)}
# As SGLang calls them on Blackwell, each with what its kernel has in its source: how many columns share a scale of the
# left and of the right operand, which rows it takes, and their types.
BLACKWELL: Mapping[str, tuple[Target, tuple[str, ...]]] = {
    name: (msgspec.structs.replace(each, m_max=min(each.m_max, 128), **changed), seen)
    for name, each, changed, seen in (
        ("dense", _DENSE, _PACKED, ("128, 128, 128,", "Normal", "float_e4m3_t, cutlass::float_e4m3_t")),
        ("contiguous", _CONTIGUOUS, _PACKED, ("128, 128, 128,", "Contiguous", "float_e4m3_t, cutlass::float_e4m3_t")),
        ("masked", _MASKED, _PACKED, ("128, 128, 128,", "Masked", "float_e4m3_t, cutlass::float_e4m3_t")),
        ("contiguous FP4", _CONTIGUOUS, _FP4, ("128, 32, 128,", "Contiguous", "detail::float_e2m1_unpacksmem_t")),
        ("masked FP4", _MASKED, _FP4, ("128, 32, 128,", "Masked", "detail::float_e2m1_unpacksmem_t")),
        (
            "MXFP8",
            _DENSE,
            {**_MXFP8, "function": "fp8_fp4_gemm_nt", "disable_ue8m0_cast": True},
            ("32, 32, 32,", "Normal", "float_e4m3_t, cutlass::float_e4m3_t"),
        ),
        ("contiguous MXFP8", _CONTIGUOUS, _MXFP8, ("32, 32, 32,", "Contiguous", "float_e4m3_t, cutlass::float_e4m3_t")),
        (
            "block 32",
            _DENSE,
            {"kernel_type": "GEMM_NT_F8F8BF16_BLOCK32", "recipe": (1, 32, 32), "lhs_scale": "packed"},
            ("32, 32, 32,", "Normal", "float_e4m3_t, cutlass::float_e4m3_t"),
        ),
        (
            "contiguous bf16",
            _CONTIGUOUS,
            {**_BF16, "kernel_type": "GROUPED_GEMM_NT_BF16_CONTIG"},
            ("bf16_gemm_impl", "Contiguous"),
        ),
        ("masked bf16", _MASKED, {**_BF16, "kernel_type": "GROUPED_GEMM_NT_BF16_MASKED"}, ("bf16_gemm_impl", "Masked")),
    )
}


class Recorder:
    """Records with one release.

    Args:
        version: of DeepGEMM.
        directory: for its private files.
        library: the module that calls DeepGEMM.
    """

    def __init__(self, version: str, directory: Path, library: str = "sglang_warmstart.deepgemm.nogpu.library") -> None:
        self.deep_gemm = toolchain().deep_gemm_of(version)
        self._library = library
        self._directory = directory
        self._stub = directory / "stub.cubin"
        self._stub.write_bytes(MARK)
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")

    def record(self, target: Target, gpu: Gpu | None = None, **environment: str) -> list[RecordedKernel]:
        """The kernels of a target.

        Raises:
            RecordingProblem: they cannot be recorded.
        """
        order = RecordingOrder(
            target=target,
            gpu=gpu or gpu_of("h200"),
            environment={PLACE: str(self.deep_gemm), **environment},
            version=toolchain().compiler().version,
            stub=str(self._stub),
            directory=str(self._directory),
            library=self._library,
            jit=dialects.dialect_of(self.deep_gemm).name,
        )
        return list(record(self._context, order, 120, lambda: False))


_EINSUM = """
import sys
from sglang_warmstart.deepgemm.nogpu import library
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of

library.open_device(gpu_of("h200"))
import deep_gemm
import torch
from sglang_warmstart.deepgemm.nogpu.room import CpuRoom

room, (tokens, groups, rank, width) = CpuRoom(), (8, 4, 512, 128)
x = (
    room.operand((tokens, groups, rank), torch.float8_e4m3fn),
    room.touched((tokens, groups, rank // 128), torch.float32),
)
y = (
    room.operand((groups, width, rank), torch.float8_e4m3fn),
    room.touched((groups, width // 128, rank // 128), torch.float32),
)
deep_gemm.fp8_einsum("bhr,hdr->bhd", x, y, room.operand((tokens, groups, width), torch.bfloat16))
print("it was called")
"""


def call_einsum(cache: str, version: str, compiler: Path, **environment: str) -> None:
    """Have the library call `fp8_einsum`, as DeepSeek-V4's output projection does, on a cache.

    Args:
        compiler: what it finds in nvcc's place.
    """
    done = subprocess.run(
        [sys.executable, "-c", _EINSUM],
        env=child_environment(
            {
                PLACE: str(toolchain().deep_gemm_of(version)),
                "DG_JIT_CACHE_DIR": cache,
                "DG_JIT_NVCC_COMPILER": str(compiler),
                "CUDA_HOME": str(toolchain().cuda_home),
                **environment,
            }
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "it was called\n", done.stderr


_CALL = """
import json, os, sys
from pathlib import Path
import msgspec
from sglang_warmstart.deepgemm.nogpu import library
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target

library.open_device(gpu_of("h200"))
for target in msgspec.json.decode(sys.argv[1], type=list[Target]):
    call = library.prepare(target, target.m_max)
    for m in target.m_values:
        call(m)
print("all were called")
"""


def call_on(cache: str, version: str, targets: Sequence[Target], directory: Path) -> list[str]:
    """Have the library call every M of targets on a cache (a value of DG_JIT_CACHE_DIR), with a compiler that refuses.

    Returns:
        The commands that the compiler was asked to run. The library ends at the first.
    """
    command, asked = directory / "refuses", directory / "asked"
    (directory / "version").write_text(toolchain().compiler().version, encoding="utf-8")
    asked.touch()
    command.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec cat {directory}/version\necho "$@" >> {asked}\nexit 1\n',
        encoding="utf-8",
    )
    command.chmod(0o755)
    environment = {
        PLACE: str(toolchain().deep_gemm_of(version)),
        "DG_JIT_CACHE_DIR": cache,
        "DG_JIT_NVCC_COMPILER": str(command),
        "CUDA_HOME": str(directory),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CALL, msgspec.json.encode(list(targets)).decode()],
        env=child_environment(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    asked_for = asked.read_text(encoding="utf-8").splitlines()
    assert asked_for or done.stdout.endswith("all were called\n"), done.stderr
    return asked_for
