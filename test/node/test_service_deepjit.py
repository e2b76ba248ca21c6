"""The service with a real DeepGEMM 0.2.x: recorded without a GPU, compiled by the real compiler."""

from __future__ import annotations

from pathlib import Path

import msgspec
from kit.node import Node
from kit.nogpu import TARGETS, call_on
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm.dialects import DEEPJIT
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.node.protocol import Hello, Welcome

VERSION = "0.2.3.post2"
TARGET = msgspec.structs.replace(TARGETS[-1], m_max=32)
PLENTY = 80 << 30


def hello(cache: str, deep_gemm: Path) -> Hello:
    """The first words of a rank of SGLang 0.5.23, as far as they go without its GPU."""
    return Hello(
        cache=cache,
        environment={"CUDA_HOME": str(toolchain().cuda_home)},
        deep_gemm=str(deep_gemm),
        gpu=gpu_of("h200"),
        launch={"model": "DeepSeek-V4", "rank": "0"},
        workers=2,
    )


def test_its_kernels_are_there_for_the_library_and_a_restart_asks_for_none(
    tmp_path: Path,
) -> None:
    deep_gemm, cache = toolchain().deep_gemm_of(VERSION), tmp_path / "cache"
    words = hello(f"{cache}:{tmp_path / 'read only'}", deep_gemm)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with Node(tmp_path / "first", library="") as node:
        rank = node.client()
        assert rank.hello(words) == Welcome()
        assert rank.restore().targets == ()
        (warmed,) = rank.warm([TARGET], PLENTY, 100, searched=True).targets
        assert warmed.error == ""
        (use,) = warmed.kernels
        assert "targets are recorded without the GPU" in node.log
    assert DEEPJIT.is_whole(cache / "cache" / use.directory)
    assert call_on(str(cache), VERSION, [TARGET], tmp_path) == []

    # The same cache as a root that is only read, as in the layer of an image.
    elsewhere = tmp_path / "writable"
    with Node(tmp_path / "second", library="") as node:
        rank = node.client()
        rank.hello(msgspec.structs.replace(words, cache=f"{elsewhere}:{cache}"))
        answer = rank.restore()
        assert (answer.known, [each.target for each in answer.targets]) == (True, [TARGET])
    assert call_on(f"{elsewhere}:{cache}", VERSION, [TARGET], tmp_path) == []


def test_a_root_that_is_only_read_is_not_used_either_if_others_can_write_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    words = hello(f"{tmp_path / 'cache'}:{shared}", toolchain().deep_gemm_of(VERSION))
    with Node(tmp_path) as node:
        assert node.client().hello(words) == Welcome()
        shared.chmod(0o777)
        assert node.client().hello(words).problem.startswith(f"{shared} can be written by every user (mode 0777)")


def test_a_compiler_that_it_does_not_take_is_said(tmp_path: Path) -> None:
    deep_gemm, old = toolchain().deep_gemm_of(VERSION), tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    old.chmod(0o755)
    words = hello(str(tmp_path / "cache"), deep_gemm)
    with Node(tmp_path) as node:
        named = msgspec.structs.replace(words, environment={**words.environment, "DG_JIT_NVCC_COMPILER": str(old)})
        assert "this DeepGEMM needs nvcc 12.9 or later, and this is 12.8" in node.client().hello(named).problem
        problem = node.client().hello(msgspec.structs.replace(words, kind="nvrtc")).problem
        assert problem == "the JIT of this DeepGEMM cannot use nvrtc: leave SGLANG_WARMSTART_COMPILER out"


def test_where_the_stand_ins_fail_after_all_it_is_recorded_on_the_gpu(tmp_path: Path) -> None:
    # A module that recording without a GPU needs, and that is noticed when it is imported.
    code = "import sys\nsys.modules['sglang_warmstart.deepgemm.nogpu.room'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    with Node(tmp_path, library="", modules=tmp_path) as node:
        rank = node.client()
        rank.hello(hello(str(tmp_path / "cache"), toolchain().deep_gemm_of(VERSION)))
        (warmed,) = rank.warm([TARGET], PLENTY, 100, searched=True).targets
        log = node.log
    assert "targets are recorded on the GPU: " in log and "nogpu.room" in log
    assert warmed.error  # here is no GPU
    assert "nogpu" not in warmed.error
