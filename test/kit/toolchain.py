"""The CUDA compiler and DeepGEMM's headers in `.toolchain`, which `make` installs: neither CUDA nor a GPU is needed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm.compiler import Compiler

from kit.environment import python_path

ROOT = Path(__file__).parents[2] / ".toolchain"
_MAKE = "run `make .toolchain/.complete`, or `make test`, which does that first"


class ToolchainMissingError(RuntimeError):
    """The toolchain is not there or not whole; says what to do."""


@dataclass(frozen=True)
class Toolchain:
    """A toolchain that was found whole.

    Args:
        root: the directory that holds its packages.
    """

    root: Path

    @property
    def cuda_home(self) -> Path:
        """What `CUDA_HOME` would name."""
        return self.root / "nvidia" / "cu13"

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.cuda_home / "bin" / "nvcc"

    @property
    def deep_gemm(self) -> Path:
        """The directory of the package. It is here for its headers; its library needs CUDA's own."""
        return self.root / "deep_gemm"

    def deep_gemm_of(self, version: str) -> Path:
        """The directory of the package of another release, whose library can be loaded without CUDA's own."""
        return self.root / "deep-gemm" / version / "deep_gemm"

    @property
    def include(self) -> Path:
        """DeepGEMM's headers, and CUTLASS's beside them."""
        return self.deep_gemm / "include"

    @property
    def flashinfers(self) -> dict[str, Path]:
        """Where Python finds FlashInfer: the release of SGLang 0.5.12, and each later form of its JIT.

        The later ones are without the sources of their kernels.
        """
        return {"0.6.11": self.root / "jit", **{each: self.root / "flashinfer" / each for each in ("0.6.17", "0.7.2")}}

    @property
    def cute_dsl(self) -> tuple[Path, ...]:
        """Where Python finds CuTe DSL, and what it imports."""
        place = self.root / "cute-dsl"
        return place / "nvidia_cutlass_dsl" / "dsl_packages", place, self.root

    @property
    def fits_this_python(self) -> bool:
        """Whether its Python bindings of NVRTC are for the Python that runs."""
        return (self.root / ".complete").read_text(encoding="ascii").strip() == "Python {}.{}".format(*sys.version_info)

    @property
    def nvrtc_environment(self) -> dict[str, str]:
        """The variables by which Python finds NVRTC's bindings, and they NVRTC: it is in no environment of Python."""
        return {"PYTHONPATH": python_path(self.root), "LD_LIBRARY_PATH": str(self.cuda_home / "lib")}

    def compiler(self) -> Compiler:
        """nvcc as the service finds it."""
        return compilers.find({"CUDA_HOME": str(self.cuda_home)})


@cache
def toolchain() -> Toolchain:
    """The toolchain of this checkout.

    Raises:
        ToolchainMissingError: `make` has not installed it.
    """
    return checked(Toolchain(ROOT))


def checked(found: Toolchain) -> Toolchain:
    """The toolchain, if it is whole.

    Raises:
        ToolchainMissingError: it is not; says what is missing.
    """
    if not (found.root / ".complete").is_file():
        raise ToolchainMissingError(f"there is no CUDA compiler in {found.root}: {_MAKE}")
    # nvcc starts the others, and says little when one of them is missing.
    programs = (found.nvcc, found.nvcc.with_name("ptxas"), found.cuda_home / "nvvm" / "bin" / "cicc")
    for program in programs:
        if not os.access(program, os.X_OK):
            raise ToolchainMissingError(f"{program} is not there or not executable: remove {found.root} and {_MAKE}")
    if not (found.include / "deep_gemm").is_dir():
        raise ToolchainMissingError(f"{found.include} has no headers of DeepGEMM: remove {found.root} and {_MAKE}")
    return found
