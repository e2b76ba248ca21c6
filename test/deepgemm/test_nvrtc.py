"""NVRTC compiles what DeepGEMM would give to nvcc; where it cannot, it says so as nvcc does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest
import sglang_warmstart
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from kit.environment import python_path
from kit.recorded import real_cubin, recording
from kit.toolchain import ROOT, toolchain
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import cubin, digest, nvrtc
from sglang_warmstart.deepgemm.compiler import CompilerError

TRANSPOSE = "transpose_fp32"
TESTS = Path(__file__).parents[1]


@pytest.fixture
def bindings() -> None:
    """NVRTC's bindings can be imported here."""
    if not toolchain().fits_this_python:
        pytest.skip(f"NVRTC's bindings in {ROOT} are for another Python than this one")


# NVRTC is in the toolchain alone, and cannot be unloaded: it is tried in a process of its own.
_COMPILE = """
import sys
import msgspec
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import compiler as compilers
source, flags = sys.argv[1:]
compiler = compilers.find({"CUDA_HOME": str(toolchain().cuda_home)}, "nvrtc")
try:
    sys.stdout.buffer.write(compilers.compile_kernel(compilers.CompileJob(source, flags, compiler, 60)).hex().encode())
except compilers.CompilerError as error:
    print("CompilerError:", error)
"""


def _compile(source: str) -> str:
    flags = recording().named(TRANSPOSE, toolchain().include)[0].flags
    variables = toolchain().nvrtc_environment
    return run_python(_COMPILE, source, flags, environment=variables | {"PYTHONPATH": python_path(ROOT, TESTS)})


def _entry_points(data: bytes) -> set[bytes]:
    """The kernels of a cubin: each has a section of its own for its code."""
    return {word.removeprefix(b".text.") for word in data.split(b"\0") if word.startswith(b".text.")}


@pytest.mark.usefixtures("bindings")
def test_a_recorded_kernel_compiles_to_the_same_entry_point_as_by_nvcc() -> None:
    kernel = recording().named(TRANSPOSE, toolchain().include)[0]
    compiled = bytes.fromhex(_compile(kernel.source))
    assert cubin.defect_of(compiled) is None
    assert len(_entry_points(compiled)) == 1
    assert _entry_points(compiled) == _entry_points(real_cubin())


@pytest.mark.usefixtures("bindings")
def test_a_source_that_does_not_compile_fails_with_nvrtcs_own_words() -> None:
    said = _compile("__global__ void kernel() { no_such_thing(); }\n")
    assert said.startswith("CompilerError: NVRTC_ERROR_COMPILATION: ")
    assert 'identifier "no_such_thing" is undefined' in said


_FIND = """
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import compiler as compilers
print(compilers.find({"CUDA_HOME": str(toolchain().cuda_home)}, "nvrtc").version, end="")
"""


@pytest.mark.usefixtures("bindings")
def test_nvrtcs_own_version_is_a_line_after_that_of_nvcc() -> None:
    variables = toolchain().nvrtc_environment
    said = run_python(_FIND, environment=variables | {"PYTHONPATH": python_path(ROOT, TESTS)})
    assert said == f"{toolchain().compiler().version}NVRTC 13.0\n"
    assert digest.signature_of(said) == "NVCC13.0"


def test_bindings_that_are_not_there_are_missed_when_the_compiler_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # Python's own way to say that there is no such module
    with pytest.raises(CompilerError, match=r"NVRTC's Python bindings \(cuda-bindings\) cannot be imported"):
        compilers.find({"CUDA_HOME": str(toolchain().cuda_home)}, "nvrtc")
    compiler = msgspec.structs.replace(toolchain().compiler(), kind="nvrtc")
    with pytest.raises(CompilerError, match="cannot be imported"):
        compilers.compile_kernel(compilers.CompileJob("", "", compiler, 60))


_BINDINGS_ALONE = """
from sglang_warmstart.deepgemm import nvrtc
try:
    nvrtc.bindings()
except nvrtc.NvrtcError as error:
    print(error)
"""


@pytest.mark.by_plugin  # in SGLang's tree it could not be imported there
@pytest.mark.usefixtures("bindings")
@pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())
def test_bindings_without_the_library_are_missed_as_well(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    for part in ("bindings", "pathfinder"):
        (tmp_path / "cuda" / part).symlink_to(ROOT / "cuda" / part)
    # Without the packages of this environment, and without a CUDA that this machine may have.
    hide = 'for cuda in /usr/local/cuda*; do [ ! -d "$cuda" ] || mount -t tmpfs none "$(readlink -f "$cuda")"; done'
    path = os.pathsep.join((str(tmp_path), str(Path(sglang_warmstart.__file__).parents[1])))
    said = run_python(
        _BINDINGS_ALONE,
        prefix=in_mount_namespace(hide),
        options=("-S",),
        environment={"PYTHONPATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "LD_LIBRARY_PATH": ""},
    )
    assert said.startswith("NVRTC itself (nvidia-cuda-nvrtc) cannot be loaded: ")


def test_the_options_are_nvccs_that_nvrtc_knows_and_cudas_headers() -> None:
    include = toolchain().include
    flags = recording().named(TRANSPOSE, include)[0].flags
    cuda = toolchain().cuda_home / "include"
    assert nvrtc.options(flags, toolchain().cuda_home) == [
        "-std=c++20",
        "--diag-suppress=39,161,174,177,186,940",
        "--ptxas-options=--register-usage-level=10",
        f"-I{include}",
        "--gpu-architecture=sm_90a",
        f"-I{cuda}",
        f"-I{cuda / 'cccl'}",
        "-default-device",
        "--device-int128",
    ]
    assert (cuda / "cccl").is_dir()
