"""Each library finds its own cache where a bundle restores it, and nowhere else: real compiles.

Short cases are in test/libraries/test_restored.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.confined import run_python
from kit.restored_cache import needs_ninja, restore, triton_finds_what_is_restored
from kit.toolchain import toolchain
from sglang_warmstart.libraries.table import LIBRARIES


def _needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"this release of SGLang comes without {module}")


def test_triton_does_not_find_what_is_restored_elsewhere(tmp_path: Path) -> None:
    triton_finds_what_is_restored(tmp_path, moved=True)


_TILELANG = """
import sys
import tilelang
import tilelang.language as T
from tvm.target import Target

@T.prim_func
def main(a: T.Tensor((1024,), "float32"), b: T.Tensor((1024,), "float32")):
    with T.Kernel(8, threads=128) as block:
        for i in T.Parallel(128):
            b[block * 128 + i] = a[block * 128 + i] + 1.0

target = Target({"kind": "cuda", "arch": "sm_90"})
kernel = tilelang.compile(main, target=target, execution_backend="tvm_ffi", verbose=True)
"""


@_needs("tilelang")
def test_tilelang_finds_what_is_restored_anywhere(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(_TILELANG)

    def compile_in(root: Path, cuda_home: Path) -> bool:
        environment = {
            **os.environ,
            "TILELANG_CACHE_DIR": str(root),
            "CUDA_HOME": str(cuda_home),
            "PATH": f"{cuda_home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        command = [sys.executable, str(tmp_path / "kernel.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert ("begins to compile" in said) != ("Found kernel in disk cache" in said)
        return "Found kernel in disk cache" in said

    assert not compile_in(tmp_path / "cache", toolchain().cuda_home)
    library, environment = (
        LIBRARIES["tilelang"],
        {"TILELANG_CACHE_DIR": str(tmp_path / "cache"), "HOME": "/home/somebody"},
    )
    key, moved = library.key(environment), {"TILELANG_CACHE_DIR": str(tmp_path / "moved"), "HOME": "/home/somebody"}
    restore(library, environment, tmp_path, tmp_path / "moved")
    assert library.mismatch(key, moved) is None
    # There is no compiler there.
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o755)
    assert compile_in(tmp_path / "moved", tmp_path / "cuda")


_TVM_FFI = """
from tvm_ffi.cpp import load_inline
print(load_inline("k", cpp_sources="int add(int x) { return x + 1; }", functions="add").add(1))
"""


@needs_ninja
@_needs("tvm_ffi")
@pytest.mark.parametrize("moved", [False, True])
def test_tvm_ffi_finds_what_is_restored_where_it_was(moved: bool, tmp_path: Path) -> None:
    # A compiler that says when it is called.
    wrapper = tmp_path / "bin" / "c++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/calls"\nexec "{shutil.which("c++")}" "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"

    def calls_in(root: Path) -> int:
        (tmp_path / "calls").write_text("")
        assert run_python(_TVM_FFI, environment={"TVM_FFI_CACHE_DIR": str(root), "PATH": path}) == "2\n"
        return len((tmp_path / "calls").read_text().splitlines())

    root = tmp_path / "cache"
    assert calls_in(root) == 2
    library, environment = LIBRARIES["tvm-ffi"], {"TVM_FFI_CACHE_DIR": str(root), "PATH": path}
    key, after = library.key(environment), tmp_path / "moved" if moved else root
    restore(library, environment, tmp_path, after)
    difference = f"cache was '{root}' and is '{after}' here" if moved else None
    assert library.mismatch(key, {**environment, "TVM_FFI_CACHE_DIR": str(after)}) == difference
    assert calls_in(after) == (2 if moved else 0)
