"""The kit's toolchain is what `make` installs, and where it is not, a test says what to do."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from kit.toolchain import Toolchain, ToolchainMissingError, checked, toolchain


def _copy(root: Path) -> Toolchain:
    """As large as what is looked at."""
    found = Toolchain(root)
    (found.include / "deep_gemm").mkdir(parents=True)
    for program in ("bin/nvcc", "bin/ptxas", "nvvm/bin/cicc"):
        path = found.cuda_home / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o700)
    (root / ".complete").write_text("Python 3.11\n")
    return found


def test_it_has_everything_that_its_compiler_needs() -> None:
    found = toolchain()
    assert checked(found) is found
    assert "release 13.0, V13.0.88" in subprocess.check_output([found.nvcc, "--version"], text=True)
    assert (found.include / "deep_gemm" / "impls" / "sm90_fp8_gemm_1d2d.cuh").is_file()


def test_it_is_kept_out_of_the_environment_that_sglang_runs_in() -> None:
    # With a library that needs a GPU's driver, SGLang would take this machine for one that has DeepGEMM.
    assert importlib.util.find_spec("deep_gemm") is None


def test_a_checkout_without_one_is_told_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ToolchainMissingError, match=r"no CUDA compiler in .*: run `make .toolchain/.complete`"):
        checked(Toolchain(tmp_path))


@pytest.mark.parametrize("program", ["bin/nvcc", "bin/ptxas", "nvvm/bin/cicc"])
def test_a_program_that_is_missing_or_cannot_be_run_is_named(tmp_path: Path, program: str) -> None:
    found = _copy(tmp_path)
    assert checked(found) is found
    (found.cuda_home / program).unlink()
    with pytest.raises(ToolchainMissingError, match=rf"{program} is not there .* run `make .toolchain/.complete`"):
        checked(found)


def test_headers_that_are_missing_are_named(tmp_path: Path) -> None:
    found = _copy(tmp_path)
    (found.include / "deep_gemm").rmdir()
    with pytest.raises(ToolchainMissingError, match="has no headers of DeepGEMM"):
        checked(found)
