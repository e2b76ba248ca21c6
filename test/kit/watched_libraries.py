"""Code that has each JIT library compile a small kernel, in a watched process (:mod:`kit.watched`).

In each, ``serve()`` makes the process one of a server that is ready. ``place`` is a directory for caches and sources.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.environment import python_path
from kit.toolchain import toolchain
from kit.watched import Watched, run_watched

BEGIN = """
from kit.watched import begin, serve
begin()
"""


def needs(module: str) -> pytest.MarkDecorator:
    """Skips where a release of SGLang comes without a library."""
    there = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not there, reason=f"this release of SGLang comes without {module}")


# Its libraries are built for one Python, that of the environment that the toolchain was made with.
needs_cute_dsl = pytest.mark.skipif(not toolchain().fits_this_python, reason="CuTe DSL here is for another Python")

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja (and a C++ compiler) on the PATH")

# In a module of its own: Triton reads the source of a kernel.
TRITON_KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
"""
TRITON = """
import sys
sys.path.insert(0, {place!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels_under_test

def compile(block):
    signature = {{"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}}
    source = ASTSource(kernels_under_test.add_one, signature, {{"BLOCK": block}})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""


def run_triton(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile(block)`` compiles ``add_one``, specialised on a size."""
    (place / "kernels_under_test.py").write_text(TRITON_KERNEL)
    cache = {"TRITON_CACHE_DIR": str(place / "cache"), **environment}
    return run_watched(BEGIN + TRITON.format(place=str(place)) + code, place / name, cache)


_TILELANG = """
import tilelang
import tilelang.language as T
from tvm.target import Target

@T.prim_func
def add_one(a: T.Tensor((1024,), "float32"), b: T.Tensor((1024,), "float32")):
    with T.Kernel(8, threads=128) as block:
        for i in T.Parallel(128):
            b[block * 128 + i] = a[block * 128 + i] + 1.0

def compile():
    tilelang.compile(add_one, target=Target({"kind": "cuda", "arch": "sm_90"}), execution_backend="tvm_ffi")
"""


def run_tilelang(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile()`` compiles ``add_one``."""
    # TileLang reads the source of a kernel.
    (place / "code.py").write_text(_TILELANG + code)
    home = toolchain().cuda_home
    settings = {
        "TILELANG_CACHE_DIR": str(place / "cache"),
        "CUDA_HOME": str(home),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    start = f"import runpy; runpy.run_path({str(place / 'code.py')!r}, {{'serve': serve}})"
    return run_watched(BEGIN + start, place / name, settings)


_TVM_FFI = """
from tvm_ffi.cpp import load_inline

def compile():
    return load_inline("add_one", cpp_sources="int add(int x) { return x + 1; }", functions="add").add(1)
"""


def run_tvm_ffi(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile()`` builds ``add_one``, and calls it."""
    settings = {"TVM_FFI_CACHE_DIR": str(place / "cache"), **environment}
    return run_watched(BEGIN + _TVM_FFI + code, place / name, settings)


_FLASHINFER = """
from pathlib import Path
from flashinfer.jit import core
from flashinfer.jit.core import gen_jit_spec

def build():
    source = Path({place!r}) / "add_one.cc"
    if not source.exists():
        source.write_text("extern \\"C\\" int add(int x) {{ return x + 1; }}")
    gen_jit_spec("add_one", [source]).build_and_load()
"""


def flashinfer_settings(place: Path, version: str = "0.6.11") -> dict[str, str]:
    """The variables with which a process has FlashInfer, which is not told which GPU there is."""
    # It links against these, whatever it builds.
    for library in ("cudart", "cuda"):
        command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(place / f"lib{library}.so")]
        subprocess.run(command, check=True)
    # A package that all of them import is beside the first.
    flashinfer = toolchain().flashinfers[version]
    return {
        "PYTHONPATH": python_path(Path(__file__).parents[1], flashinfer, toolchain().flashinfers["0.6.11"]),
        "LIBRARY_PATH": str(place),
        "FLASHINFER_WORKSPACE_BASE": str(place),
        "CUDA_HOME": str(toolchain().cuda_home),
    }


def run_flashinfer(code: str, place: Path, name: str = "run", version: str = "0.6.11", **environment: str) -> Watched:
    """``build()`` builds the module ``add_one`` as SGLang has FlashInfer do it, and loads it."""
    settings = {**flashinfer_settings(place, version), "FLASHINFER_CUDA_ARCH_LIST": "9.0a", **environment}
    return run_watched(BEGIN + _FLASHINFER.format(place=str(place)) + code, place / name, settings)


# CuTe DSL reads the source of a kernel.
CUTE_KERNEL = """
import cutlass.cute as cute

@cute.kernel
def kernel(a: cute.Tensor):
    x, _, _ = cute.arch.thread_idx()
    a[x] = a[x] + 1.0

@cute.jit
def add_one(a: cute.Tensor):
    kernel(a).launch(grid=(1, 1, 1), block=(32, 1, 1))
"""
_CUTE_DSL = """
import sys
sys.path.insert(0, {place!r})
import torch
import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack
from cute_under_test import add_one

def compile():
    cute.compile(add_one, from_dlpack(torch.zeros(32)))
"""


def run_cute_dsl(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile()`` compiles ``add_one`` for a Hopper GPU."""
    (place / "cute_under_test.py").write_text(CUTE_KERNEL)
    settings = {
        "PYTHONPATH": python_path(Path(__file__).parents[1], *toolchain().cute_dsl),
        "CUTE_DSL_ARCH": "sm_90a",
        **environment,
    }
    return run_watched(BEGIN + _CUTE_DSL.format(place=str(place)) + code, place / name, settings)


# A matrix product needs no C++ compiler, which takes a minute here: what is made of the graph is Python.
_INDUCTOR = """
import torch

@torch.compile(dynamic=True)
def add_one(x, y):
    return torch.mm(x, y)

def compile(size=8):
    with torch.inference_mode():
        add_one(torch.ones(size, 16), torch.ones(16, size))
"""


def run_inductor(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile()`` compiles the graph of ``add_one``, of any size."""
    # torch.compile reads the source of a function.
    (place / "graph.py").write_text(_INDUCTOR + code)
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(place / "cache"), **environment}
    start = f"import runpy; runpy.run_path({str(place / 'graph.py')!r}, {{'serve': serve}})"
    return run_watched(BEGIN + start, place / name, settings)


# Compiled by the C++ compiler alone: what needs nvcc takes half a minute here.
_SGLANG_JIT = """
from sglang.kernels.jit.utils.arch import override_jit_cuda_arch
from sglang.kernels.jit.utils.compile import load_jit

def compile():
    with override_jit_cuda_arch(9, 0):
        load_jit("add_one", cpp_files=[{source!r}], cpp_wrappers=[("add", "add_one")])
"""


def run_sglang_jit(code: str, place: Path, name: str = "run", **environment: str) -> Watched:
    """``compile()`` has SGLang's own JIT build ``add_one``, and loads it."""
    source = place / "add_one.h"
    source.write_text("inline int add_one(int x) { return x + 1; }")
    settings = {
        "SGLANG_JIT_CACHE_DIR": str(place / "cache"),
        "CUDA_HOME": str(toolchain().cuda_home),
        **environment,
    }
    return run_watched(BEGIN + _SGLANG_JIT.format(source=str(source)) + code, place / name, settings)
