"""Whatever could change a kernel changes the identity that it is remembered under, and what could not does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from kit.confined import run_python
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.dialects import FIRST_JIT
from sglang_warmstart.deepgemm.identity import Gpu, Identity, build_hash, identity_of

GPU = Gpu(name="NVIDIA H200", num_sms=132, capability=(9, 0), ordinal=0, visible="3")
COMPILER = Compiler("/usr/local/cuda/bin/nvcc", recording().compiler)
ENVIRONMENT = {"DG_JIT_USE_NVRTC": "0", "HOME": "/home/a"}


@pytest.fixture
def deep_gemm(tmp_path: Path) -> Path:
    """A copy of DeepGEMM's own package, without the headers of others."""
    copy = tmp_path / "site" / "deep_gemm"
    shutil.copytree(toolchain().deep_gemm / "include" / "deep_gemm", copy / "include" / "deep_gemm")
    for name in ("_C.so", "VERSION"):
        shutil.copy(toolchain().deep_gemm / name, copy)
    return copy


def _identity(
    deep_gemm: Path, gpu: Gpu = GPU, compiler: Compiler = COMPILER, environment: dict[str, str] = ENVIRONMENT
) -> Identity:
    return identity_of(gpu, compiler, deep_gemm, environment)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: {"gpu": msgspec.structs.replace(GPU, name="NVIDIA H100 80GB HBM3")},
        lambda path: {"gpu": msgspec.structs.replace(GPU, num_sms=78)},
        lambda path: {"gpu": msgspec.structs.replace(GPU, capability=(10, 0))},
        lambda path: {"compiler": Compiler(COMPILER.path, COMPILER.version.replace("V13.0.88", "V13.0.48"))},
        lambda path: {"compiler": Compiler(COMPILER.path, COMPILER.version, "nvrtc")},
        lambda path: {"environment": ENVIRONMENT | {"DG_JIT_PTXAS_VERBOSE": "1"}},
        lambda path: {"environment": ENVIRONMENT | {"DG_JIT_USE_NVRTC": "1"}},
        lambda path: {"environment": {}},
    ],
    ids=["GPU", "SMs", "capability", "compiler's version", "NVRTC", "a setting more", "another setting", "no setting"],
)
def test_what_could_change_a_kernel_changes_the_identity(
    deep_gemm: Path, change: Callable[[Path], dict[str, object]]
) -> None:
    changed = _identity(deep_gemm, **change(deep_gemm))  # type: ignore[arg-type]
    assert changed != _identity(deep_gemm)
    assert changed.digest != _identity(deep_gemm).digest


@pytest.mark.parametrize(
    "change",
    [
        lambda path: {"gpu": msgspec.structs.replace(GPU, ordinal=1, visible=None)},
        lambda path: {"compiler": Compiler("/opt/cuda/bin/nvcc", COMPILER.version)},
        lambda path: {"environment": ENVIRONMENT | {"HOME": "/home/b", "SGLANG_PORT": "1"}},
        lambda path: {"environment": ENVIRONMENT | {"DG_JIT_CACHE_DIR": "/c", "DG_JIT_NVCC_COMPILER": "/n"}},
        lambda path: {"environment": dict(reversed(ENVIRONMENT.items()))},
    ],
    ids=["which of the GPUs", "compiler's place", "other variables", "places", "their order"],
)
def test_what_could_not_does_not(deep_gemm: Path, change: Callable[[Path], dict[str, object]]) -> None:
    changed = _identity(deep_gemm, **change(deep_gemm))  # type: ignore[arg-type]
    assert changed == _identity(deep_gemm)
    assert changed.digest == _identity(deep_gemm).digest


@pytest.mark.parametrize("name", ["_C.so", "VERSION", "include/deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh"])
def test_another_build_of_deep_gemm_is_another_identity(deep_gemm: Path, name: str) -> None:
    before = _identity(deep_gemm)
    path = deep_gemm / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # its length stays
    path.write_bytes(data)
    assert _identity(deep_gemm).digest != before.digest


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(path.with_name("smxx_layouts.cuh"))])
def test_a_header_that_is_gone_or_renamed_is_another_build(deep_gemm: Path, change: Callable[[Path], object]) -> None:
    before = build_hash(deep_gemm)
    change(deep_gemm / "include" / "deep_gemm" / "impls" / "smxx_layout.cuh")
    assert build_hash(deep_gemm) != before


def test_the_same_build_elsewhere_has_the_same_hash_but_is_another_identity(deep_gemm: Path, tmp_path: Path) -> None:
    # The kernels' names depend on where DeepGEMM's headers are.
    elsewhere = tmp_path / "elsewhere" / "deep_gemm"
    shutil.copytree(deep_gemm, elsewhere)
    assert build_hash(elsewhere) == build_hash(deep_gemm)
    assert _identity(elsewhere).digest != _identity(deep_gemm).digest


def test_an_identity_has_the_same_name_in_every_process(deep_gemm: Path) -> None:
    code = """
import sys
import msgspec
from sglang_warmstart.deepgemm.dialects import FIRST_JIT
from sglang_warmstart.deepgemm.identity import Identity
print(msgspec.json.decode(sys.argv[1], type=Identity).digest)
"""
    identity = _identity(deep_gemm)
    assert run_python(code, msgspec.json.encode(identity).decode()) == f"{identity.digest}\n"


def test_settings_are_deep_gemms_own_but_not_its_places() -> None:
    environment = {"DG_B": "1", "DG_A": "", "DG_JIT_CACHE_DIR": "/c", "DG_JIT_NVCC_COMPILER": "/n", "XDG_A": "1"}
    assert FIRST_JIT.settings(environment) == {"DG_A": "", "DG_B": "1"}
