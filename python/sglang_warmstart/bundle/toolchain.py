"""Find the compiler and DeepGEMM's headers on this machine, and check that they are the plan's."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang_warmstart.base.errors import printable
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.compiler import Compiler, CompilerError, Kind
from sglang_warmstart.deepgemm.dialects import UnknownJitError
from sglang_warmstart.deepgemm.identity import distribution_of, headers_hash
from sglang_warmstart.deepgemm.plan import Plan

# Where NVIDIA's packages of the index put CUDA 13 and later, below a directory of the Python path.
_PACKAGED_CUDA = "nvidia/cu13"
# The packages of the index that bring DeepGEMM.
_BRING_DEEP_GEMM = ("sgl-deep-gemm", "deep-gemm")


class ToolchainError(Exception):
    """What is missing on this machine, or is not what the plan asks for. In one line."""


@dataclass(frozen=True)
class Toolchain:
    """What compiles kernels.

    Args:
        compiler: nvcc.
        deep_gemm: the directory of the package; only its headers are used.
    """

    compiler: Compiler
    deep_gemm: Path

    @property
    def include(self) -> Path:
        """DeepGEMM's headers."""
        return self.deep_gemm / "include"


class Pinned(msgspec.Struct, frozen=True):
    """What a plan asks for of a machine: little, so that it can go along with each kernel.

    Args:
        compiler, kind, headers, deep_gemm, jit: as of :class:`Plan`.
    """

    compiler: str
    kind: Kind
    headers: str
    deep_gemm: str
    jit: str = "0.1"

    @classmethod
    def of(cls, plan: Plan) -> Pinned:
        """That of a plan."""
        return cls(plan.compiler, "nvrtc" if plan.kind == "nvrtc" else "nvcc", plan.headers, plan.deep_gemm, plan.jit)


def find(
    kind: Kind, environment: Mapping[str, str], nvcc: str | None, deep_gemm: str | None, jit: str = "0.1"
) -> Toolchain:
    """Look for the compiler and the headers.

    Args:
        environment: ``CUDA_HOME`` and ``PATH`` say where nvcc is. If they do not, that of NVIDIA's packages in this
            environment of Python is taken.
        nvcc: its path, if it was named.
        deep_gemm: the directory of the package, if it was named; else the one that this Python would import.
        jit: the dialect's name.

    Raises:
        ToolchainError: one of them is not there; says where it was looked for.
    """
    if nvcc is not None:
        path = str(Path(nvcc).absolute())
        # What was named and is not there is not looked for elsewhere.
        if shutil.which(path) is None:
            raise ToolchainError(f"{path} is not there, or is no program: name another nvcc with --nvcc")
        environment = {**environment, "DG_JIT_NVCC_COMPILER": path, "CUDA_HOME": "", "CUDA_PATH": ""}
    else:
        environment = with_packaged_cuda(environment)
    try:
        found = compilers.find(environment, kind, dialects.named(jit))
    except (CompilerError, UnknownJitError) as error:
        raise ToolchainError(f"{error}: install nvidia-cuda-nvcc, or name one with --nvcc") from error
    package = Path(deep_gemm).absolute() if deep_gemm is not None else installed_deep_gemm()
    if package is None:
        raise ToolchainError("DeepGEMM is not installed here: install sgl-deep-gemm, or name it with --deep-gemm")
    if not (package / "include" / "deep_gemm").is_dir():
        raise ToolchainError(f"{package} has no include/deep_gemm: name the directory of the package with --deep-gemm")
    return Toolchain(found, package)


def check(toolchain: Toolchain, pinned: Pinned) -> None:
    """Refuse a toolchain whose kernels would be others than the plan's.

    Raises:
        ToolchainError: names what the plan asks for and what is here.
    """
    asked, here = _release_of(pinned.compiler), _release_of(toolchain.compiler.version)
    if here != asked:
        raise ToolchainError(
            f"the plan is for {asked}, {toolchain.compiler.path} is {here}: "
            "install what `plan requirements` says, or record the plan anew"
        )
    headers = headers_hash(toolchain.deep_gemm)
    if headers != pinned.headers:
        here = distribution_of(toolchain.deep_gemm) or "a DeepGEMM of unknown version"
        raise ToolchainError(
            f"the plan is for {pinned.deep_gemm or 'another build of DeepGEMM'} (headers {pinned.headers[:12]}), "
            f"{toolchain.deep_gemm} has {here} (headers {headers[:12]}): "
            "install the one of the plan, or record the plan anew"
        )


def requirements_of(plan: Plan) -> list[str]:
    """What pip installs (with ``--no-deps``) to compile a plan.

    Raises:
        ToolchainError: the plan's compiler or its DeepGEMM is not to be had as a package.
    """
    release = Compiler("", plan.compiler).release
    major, minor, *_ = [*release.split("."), "", ""]
    if not major.isdigit() or int(major) < 13:
        raise ToolchainError(f"nvcc {release} is in no package of the index: install NVIDIA's toolkit {major}.{minor}")
    exact = [f"{name}=={release}" for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")]
    # These have numbers of their own.
    near = [f"{name}=={major}.{minor}.*" for name in ("nvidia-cuda-cccl", "nvidia-cuda-runtime")]
    if plan.kind == "nvrtc":
        near += [f"nvidia-cuda-nvrtc=={major}.{minor}.*", f"cuda-bindings=={major}.{minor}.*"]
    name, _, version = plan.deep_gemm.partition(" ")
    if plan.deep_gemm and (name not in _BRING_DEEP_GEMM or not re.fullmatch(r"[\w.+!-]+", version, re.ASCII)):
        # A plan may come from anybody, and is not to have pip install what it likes.
        raise ToolchainError(
            f"{printable(plan.deep_gemm)} is no release of {' or '.join(_BRING_DEEP_GEMM)}: install it in another way"
        )
    return exact + near + ([f"{name}=={version}"] if version else [])


def installed_deep_gemm() -> Path | None:
    """The directory of the package that this Python would import. It is not imported: that takes a GPU's libraries."""
    spec = importlib.util.find_spec("deep_gemm")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def with_packaged_cuda(environment: Mapping[str, str]) -> Mapping[str, str]:
    try:
        compilers.find_path(environment)
    except CompilerError:
        # A namespace of packages: each of them may have brought a part.
        spec = importlib.util.find_spec(_PACKAGED_CUDA.split("/")[0])
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            home = Path(place).parent / _PACKAGED_CUDA
            if os.access(home / "bin" / "nvcc", os.X_OK):
                return {**environment, "CUDA_HOME": str(home), "DG_JIT_NVCC_COMPILER": ""}
    return environment


def _release_of(version: str) -> str:
    # NVRTC's own version stands in a line after nvcc's.
    own = [line for line in version.splitlines() if line.startswith("NVRTC ")]
    return ", ".join([f"nvcc {Compiler('', version).release}", *own])
