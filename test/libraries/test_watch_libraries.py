"""What Triton, TileLang, tvm-ffi and FlashInfer compile is seen: the libraries themselves, with their own compilers."""

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

_BEGIN = """
from kit.watched import begin, serve
begin()
"""


def needs(module: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not there, reason=f"this release of SGLang comes without {module}")


needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja (and a C++ compiler) on the PATH")

# In a module of its own: Triton reads the source of a kernel.
_TRITON_KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
"""
_TRITON = """
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


class TestTriton:
    """By its own listener."""

    def run(self, code: str, place: Path, name: str = "run", **environment: str) -> Watched:
        (place / "kernels_under_test.py").write_text(_TRITON_KERNEL)
        cache = {"TRITON_CACHE_DIR": str(place / "cache"), **environment}
        return run_watched(_BEGIN + _TRITON.format(place=str(place)) + code, place / name, cache)

    def test_a_compile_is_an_event_and_a_hit_is_another(self, tmp_path: Path) -> None:
        first = self.run("compile(64)", tmp_path)
        assert first.status == 0, first.said
        (event,) = first.of("triton")
        assert (event.kind, event.name, event.phase, event.cached) == ("jit", "add_one", "startup", False)
        assert event.shape == "x: *fp32, y: *fp32; BLOCK=64, num_warps=4, num_stages=3"
        assert 0.01 < event.seconds < 60
        assert "JIT" not in first.said

        (hit,) = self.run("compile(64)", tmp_path, "again").of("triton")
        assert (hit.kind, hit.name, hit.cached) == ("load", "add_one", True)
        assert hit.seconds < event.seconds

    def test_while_serving_it_is_warned_of(self, tmp_path: Path) -> None:
        watched = self.run("compile(64)\nserve()\ncompile(128)\ncompile(64)", tmp_path)
        assert watched.status == 0, watched.said
        warnings = [line for line in watched.said.splitlines() if "JIT" in line]
        assert len(warnings) == 1
        assert warnings[0].startswith("WARNING warmstart: JIT while serving: triton compiled add_one for x: *fp32, ")
        assert "BLOCK=128" in warnings[0]
        assert "bundle pack --include triton" in warnings[0]
        assert [event.phase for event in watched.of("triton") if not event.cached] == ["startup", "serving"]

    def test_it_is_refused_in_the_call_that_needs_it(self, tmp_path: Path) -> None:
        code = "compile(64)\nserve()\ntry: compile(128)\nexcept RuntimeError as error: print('refused:', error)"
        watched = self.run(code, tmp_path, SGLANG_WARMSTART_JIT_MONITOR="error")
        assert watched.status == 0, watched.said
        assert "refused: JIT while serving: triton compiled add_one for x: *fp32" in watched.said

    def test_a_listener_that_was_there_hears_too(self, tmp_path: Path) -> None:
        (tmp_path / "kernels_under_test.py").write_text(_TRITON_KERNEL)
        before = "import triton\ntriton.knobs.compilation.listener = lambda **told: print('heard', told['cache_hit'])\n"
        code = before + _BEGIN + _TRITON.format(place=str(tmp_path)) + "compile(64)"
        watched = run_watched(code, tmp_path / "run", {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
        assert "heard False" in watched.said
        assert len(watched.of("triton")) == 1

    def test_without_the_hook_it_is_said_that_triton_is_not_watched(self, tmp_path: Path) -> None:
        code = "import triton\ndel type(triton.knobs.compilation).listener\n" + _BEGIN
        watched = run_watched(code, tmp_path / "run")
        assert (
            "WARNING warmstart: the JIT monitor does not watch triton: triton.knobs.compilation.listener: not there"
            in watched.said
        )

    def test_off_watches_nothing(self, tmp_path: Path) -> None:
        watched = self.run("serve()\ncompile(64)", tmp_path, SGLANG_WARMSTART_JIT_MONITOR="off")
        assert watched.status == 0, watched.said
        assert watched.events == []
        assert "JIT" not in watched.said


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


@needs("tilelang")
class TestTileLang:
    """Where it makes a kernel."""

    def run(self, code: str, place: Path, name: str, **environment: str) -> Watched:
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
        return run_watched(_BEGIN + start, place / name, settings)

    def test_a_compile_is_an_event_and_one_from_the_cache_is_none(self, tmp_path: Path) -> None:
        first = self.run("serve()\ncompile()", tmp_path, "first")
        assert first.status == 0, first.said
        (event,) = first.of("tilelang")
        assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
        assert event.shape == "a: (1024), b: (1024)"
        assert 0.1 < event.seconds < 120
        assert (
            "WARNING warmstart: JIT while serving: tilelang compiled add_one for a: (1024), b: (1024) in" in first.said
        )
        assert self.run("serve()\ncompile()", tmp_path, "again").of("tilelang") == []

    def test_it_is_refused(self, tmp_path: Path) -> None:
        code = "serve()\ntry: compile()\nexcept RuntimeError as error: print('refused:', error)"
        watched = self.run(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
        assert "refused: JIT while serving: tilelang compiled add_one" in watched.said


_TVM_FFI = """
from tvm_ffi.cpp import load_inline

def compile():
    return load_inline("add_one", cpp_sources="int add(int x) { return x + 1; }", functions="add").add(1)
"""


@needs_ninja
@needs("tvm_ffi")
class TestTvmFfi:
    """At ninja, which has work to do or has none."""

    def run(self, code: str, place: Path, name: str, **environment: str) -> Watched:
        settings = {"TVM_FFI_CACHE_DIR": str(place / "cache"), **environment}
        return run_watched(_BEGIN + _TVM_FFI + code, place / name, settings)

    def test_a_build_is_an_event_and_a_hit_is_another(self, tmp_path: Path) -> None:
        first = self.run("serve()\nassert compile() == 2", tmp_path, "first")
        assert first.status == 0, first.said
        (event,) = first.of("tvm-ffi")
        assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
        assert 0.1 < event.seconds < 120
        assert "JIT while serving: tvm-ffi compiled add_one in" in first.said
        again = self.run("serve()\nassert compile() == 2", tmp_path, "again")
        (hit,) = again.of("tvm-ffi")
        assert (hit.kind, hit.cached) == ("load", True)
        assert "JIT" not in again.said

    def test_what_does_not_compile_is_an_event_with_its_error(self, tmp_path: Path) -> None:
        code = "load_inline('wrong', cpp_sources='int add(', functions='add')"
        watched = self.run(code, tmp_path, "run")
        assert watched.status != 0
        (event,) = watched.of("tvm-ffi")
        assert event.error
        assert "JIT" not in watched.said

    def test_what_does_not_compile_fails_by_itself(self, tmp_path: Path) -> None:
        code = (
            "serve()\ntry: load_inline('wrong', cpp_sources='int add(', functions='add')\n"
            "except RuntimeError as error: print(error)"
        )
        watched = self.run(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
        assert "WARNING warmstart: JIT while serving: tvm-ffi failed to compile wrong in" in watched.said
        assert "ninja" in watched.said

    def test_it_is_refused(self, tmp_path: Path) -> None:
        code = "serve()\ntry: compile()\nexcept RuntimeError as error: print('refused:', error)"
        watched = self.run(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
        assert "refused: JIT while serving: tvm-ffi compiled add_one" in watched.said


_FLASHINFER = """
from pathlib import Path
from flashinfer.jit.core import JitSpec

def build():
    source = Path({place!r}) / "add_one.cc"
    if not source.exists():
        source.write_text("extern \\"C\\" int add(int x) {{ return x + 1; }}")
    spec = JitSpec("add_one", [source], [], [], [], [])
    spec.build(verbose=False)
"""


@needs_ninja
@needs("tvm_ffi")
class TestFlashInfer:
    """At ninja likewise."""

    def run(self, code: str, place: Path, name: str, **environment: str) -> Watched:
        # It links against these, whatever it builds.
        for library in ("cudart", "cuda"):
            command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(place / f"lib{library}.so")]
            subprocess.run(command, check=True)
        settings = {
            "PYTHONPATH": python_path(Path(__file__).parents[1], toolchain().flashinfer),
            "LIBRARY_PATH": str(place),
            "FLASHINFER_WORKSPACE_BASE": str(place),
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
            "CUDA_HOME": str(toolchain().cuda_home),
            **environment,
        }
        return run_watched(_BEGIN + _FLASHINFER.format(place=str(place)) + code, place / name, settings)

    def test_a_build_is_an_event_and_a_hit_is_another(self, tmp_path: Path) -> None:
        first = self.run("serve()\nbuild()", tmp_path, "first")
        assert first.status == 0, first.said
        (event,) = first.of("flashinfer")
        assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
        assert "JIT while serving: flashinfer compiled add_one in" in first.said
        (hit,) = self.run("serve()\nbuild()", tmp_path, "again").of("flashinfer")
        assert (hit.kind, hit.cached) == ("load", True)

    def test_it_is_refused(self, tmp_path: Path) -> None:
        code = "serve()\ntry: build()\nexcept RuntimeError as error: print('refused:', error)"
        watched = self.run(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
        assert "refused: JIT while serving: flashinfer compiled add_one" in watched.said
