"""What SGLang's own prewarm would compile by TileLang, one after another, the service builds at once before it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from kit.environment import child_environment, python_path
from kit.node import Node, wait_until
from kit.toolchain import toolchain
from kit.watched_libraries import needs
from sglang.srt.distributed.device_communicators import pynccl_allocator
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.switches import SERVICE
from sglang_warmstart.sglang import mhc_at_once

pytestmark = needs("tilelang")

# A module as SGLang's `mhc` is: one function runs each bucket. What a kernel would do needs a GPU, so it is not called.
RANK = """
import functools, logging, sys, types
import tilelang
import tilelang.language as T
from tilelang.jit.kernel import JITKernel
from tvm.target import Target

logging.basicConfig(format="%(message)s", level=logging.INFO)
SPLITS, KNOWN = (1, 2, 1, 3), ()

@tilelang.jit(target=Target({"kind": "cuda", "arch": "sm_90"}), execution_backend="tvm_ffi")
def fuse(splits):
    @T.prim_func
    def fused(a: T.Tensor((1024,), "float32"), b: T.Tensor((1024,), "float32")):
        with T.Kernel(8, threads=128) as block:
            for i in T.Parallel(128):
                b[block * 128 + i] = a[block * 128 + i] + T.float32(splits)
    return fused

mhc = types.ModuleType("mhc")
runs, compiled = [], []

def prewarm_mhc_pre(residual, n_splits=1):
    runs.append([])
    for splits in SPLITS:
        kernel = fuse(splits)
        runs[-1].append(type(kernel).__name__)
        if not isinstance(kernel, JITKernel):
            assert kernel(residual, residual) is None

compile_it = JITKernel.__init__

@functools.wraps(compile_it)
def count(self, *args, **kwargs):
    if not kwargs.get("from_database"):
        compiled.append(args)
    compile_it(self, *args, **kwargs)
JITKernel.__init__ = count

mhc.prewarm_mhc_pre = prewarm_mhc_pre
prewarm_mhc_pre.__module__ = "mhc"
sys.modules["mhc"] = mhc
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang import mhc_at_once
"""
END = """
mhc_at_once.install(Hooks("hc-prenorm"), mhc)
mhc.prewarm_mhc_pre(None)
print(len(compiled), [sorted(set(each)) for each in runs])
"""
ONCE = "0 [['function'], ['function'], ['JITKernel']]"


def environment_of(place: Path) -> dict[str, str]:
    home = toolchain().cuda_home
    return {
        "HOME": str(place),
        "TILELANG_CACHE_DIR": str(place / "cache"),
        "CUDA_HOME": str(home),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


def told(node: Node, environment: dict[str, str]) -> None:
    """The service is told of a server's variables, as by its main process."""
    main = node.client()
    main.build_planned(None, environment)
    main.await_builds(1)


def rank(place: Path, code: str = "", **environment: str) -> tuple[str, str]:
    """What a rank printed of its compiles and runs, and its log."""
    # TileLang reads the source of a kernel.
    (place / "rank.py").write_text(RANK + code + END)
    done = subprocess.run(
        [sys.executable, str(place / "rank.py")],
        env=child_environment({**environment_of(place), "PYTHONPATH": python_path(), **environment}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1], done.stderr


def test_the_service_builds_each_kernel_once_and_the_rank_compiles_none(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        told(node, environment_of(tmp_path))
        said, log = rank(tmp_path, SGLANG_WARMSTART_SERVICE=str(node.socket))
        assert said == ONCE, log
        assert "warmstart: mHC: 3 kernels of TileLang built at once" in log
        # Another rank asks for the same, and a restart finds all.
        assert rank(tmp_path, SGLANG_WARMSTART_SERVICE=str(node.socket))[0] == "0 [['JITKernel'], ['JITKernel']]"
        assert len([*tmp_path.glob("cache/**/params.pkl")]) == 3
        assert wait_until(lambda: not node.is_running("spawn_main"), 15), "what has built holds memory for nothing"
        assert node.end() == 0
        assert wait_until(lambda: not node.left(0.1), 15)


def test_without_a_service_all_is_as_in_sglang(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []
    mhc = module(lambda: runs.append(1))
    monkeypatch.setenv(SERVICE, "/nowhere/service.sock")
    mhc_at_once.install(Hooks("hc-prenorm"), mhc)
    mhc.prewarm_mhc_pre()
    assert runs == [1]
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line.startswith("warmstart: mHC's kernels are compiled one after another: no service at /nowhere")


def module(prewarm: Callable[[], None]) -> ModuleType:
    """One as SGLang's."""
    mhc = ModuleType("mhc")
    prewarm.__module__ = "mhc"
    vars(mhc)["prewarm_mhc_pre"] = prewarm
    return mhc


@pytest.mark.parametrize("setting", [None, ("SGLANG_WARMSTART_BUILD_AHEAD", "0")])
def test_switched_off_or_with_no_service_started_nothing_is_run_twice(
    setting: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        monkeypatch.setenv(SERVICE, "/nowhere/service.sock")
        monkeypatch.setenv(*setting)
    runs: list[int] = []
    mhc_at_once.build_at_once(lambda: runs.append(1))
    assert runs == []


@pytest.mark.long
def test_a_kernel_that_cannot_be_built_is_named_and_compiled_by_the_rank(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        told(node, {**environment_of(tmp_path), "CUDA_HOME": "/nowhere", "PATH": "/nowhere"})
        said, log = rank(tmp_path, SGLANG_WARMSTART_SERVICE=str(node.socket))
    assert said == "3 [['function'], ['function'], ['JITKernel']]"
    assert log.count("warmstart: not built ahead: fused: ") == 3


def test_where_allocations_wait_for_other_ranks_no_rank_runs_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    mhc = module(lambda: runs.append(1))
    vars(mhc)["use_symmetric_memory"] = None
    symmetric = True
    monkeypatch.setattr(pynccl_allocator, "is_symmetric_memory_enabled", lambda: symmetric)
    monkeypatch.setattr(mhc_at_once, "build_at_once", lambda run: run())
    mhc_at_once.install(Hooks("hc-prenorm"), mhc)
    mhc.prewarm_mhc_pre()
    assert runs == [1]
    symmetric = False
    mhc.prewarm_mhc_pre()
    assert runs == [1] * 3


@pytest.mark.long
def test_after_a_while_it_is_waited_for_no_longer(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        said, log = rank(tmp_path, "mhc_at_once.BUILD_WAIT_S = 0.01\n", SGLANG_WARMSTART_SERVICE=str(node.socket))
    assert said == "3 [['function'], ['function'], ['JITKernel']]"
    assert "warmstart: 3 kernels of mHC are not ready after 0.01 s" in log
