"""`sglang-warmstart compile` of a plan of builds: the caches of all libraries, as an image would have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kit.environment import python_path
from kit.node import Node
from kit.nogpu import TARGETS, call_on
from kit.toolchain import toolchain
from kit.watched_libraries import needs, needs_ninja, run_tilelang, run_tvm_ffi
from sglang_warmstart.base.switches import SERVICE
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan, Part
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node.known_kernels import Known
from sglang_warmstart.node.planned_targets import recipe_of_further
from sglang_warmstart.node.protocol import Hello

VERSION = "0.2.3.post2"
TARGET = msgspec.structs.replace(TARGETS[-1], m_max=32)
COMPILE = "import sglang.srt.environ\ncompile()\nimport time; time.sleep(2)"

COMMAND = (sys.executable, "-c", "from sglang_warmstart.cli import main; main()", "compile")

pytestmark = needs_ninja


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test has left here a service would have, and its rank would not."""
    for variable in [each for each in os.environ if each.startswith(("DG_", "DJ_"))]:
        monkeypatch.delenv(variable)


def compile_plan(plan: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    deep_gemm = toolchain().deep_gemm_of(VERSION).parent
    return subprocess.run(
        [*COMMAND, str(plan), "-o", str(output), *options],
        env={**os.environ, "CUDA_HOME": str(toolchain().cuda_home), "PYTHONPATH": python_path(deep_gemm)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def as_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_a_start_compiled_is_there_for_another_and_nothing_is_built_twice(tmp_path: Path) -> None:
    kernels, deep_gemm = tmp_path / "kernels", toolchain().deep_gemm_of(VERSION)
    plan = kernels / "warmstart" / "ahead" / "plan.json"
    words = Hello(
        cache=str(kernels),
        environment={"CUDA_HOME": str(toolchain().cuda_home)},
        deep_gemm=str(deep_gemm),
        gpu=gpu_of("h200"),
        launch={"model": "DeepSeek-V4", "rank": "0"},
    )
    with Node(tmp_path, library="", modules=deep_gemm.parent) as node:
        rank = node.client()
        rank.build_planned(plan, {})
        rank.hello(words)
        assert rank.warm([TARGET], 80 << 30, 100, searched=True).targets[0].error == ""
        assert run_tvm_ffi(COMPILE, tmp_path, "start", **{SERVICE: str(node.socket)}).status == 0
        assert node.end() == 0 and node.left() == []
    assert set(build_plan.load(plan).parts) == {"deep-gemm", "tvm-ffi"}

    image = tmp_path / "image"
    done = compile_plan(plan, image)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["deep-gemm", "1", "1"] in rows and ["tvm-ffi", "1", "1"] in rows
    assert f"export SGLANG_DG_CACHE_DIR={image}/deep_gemm" in done.stdout
    for path in image.rglob("*"):  # as in a layer of an image
        whole_ns = path.stat().st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(whole_ns, whole_ns))
    assert call_on(str(image / "deep_gemm"), VERSION, [TARGET], tmp_path) == []
    found = run_tvm_ffi(COMPILE, tmp_path, "found", TVM_FFI_CACHE_DIR=str(image / "tvm-ffi"))
    assert [event.cached for event in found.of("tvm-ffi")] == [True], found.said
    # Its marker knows the targets, so that a rank does not search for them.
    with Node(tmp_path / "image", library="", modules=deep_gemm.parent) as node:
        rank = node.client()
        rank.hello(msgspec.structs.replace(words, cache=str(image / "deep_gemm")))
        assert rank.restore().known

    before = {path: path.stat().st_mtime_ns for path in image.rglob("*.so")}
    again = compile_plan(plan, image, "--json")
    assert again.returncode == 0 and as_json(again)["there"] == {"deep-gemm": 1, "tvm-ffi": 1}
    assert {path: path.stat().st_mtime_ns for path in image.rglob("*.so")} == before

    kernel = RecordedKernel(f"attention_logits.{'0' * 32}", "// ours", "-O3", m=0)
    known = Recipe("deep-gemm", "odd", {"rank": "nobody"}), recipe_of_further(words, Known("another", (kernel,)))
    parts = {**build_plan.load(plan).parts}
    parts["deep-gemm"] = msgspec.structs.replace(parts["deep-gemm"], recipes=known)
    plan.write_bytes(build_plan.encode(BuildPlan(parts)))
    done = compile_plan(plan, image, "--json")
    assert done.returncode == 1 and as_json(done)["there"] == {"tvm-ffi": 1}
    assert as_json(done)["failed"] == {
        "deep-gemm odd": "odd: it is neither a target of DeepGEMM nor a kernel",
        "deep-gemm 1 further kernel": "of another DeepGEMM, compiler or GPU",
    }


# As in a layer of an image, which keeps whole seconds.
PULLED = """
from tilelang.cache.kernel_cache import KernelCache
library, _, time_ns = KernelCache._get_tilelang_lib_stamp().rpartition(":")
KernelCache._get_tilelang_lib_stamp = staticmethod(lambda: f"{library}:{int(time_ns) // 10**9 * 10**9}")
KernelCache._get_base_key.cache_clear()
compile()
"""


@needs("tilelang")
def test_tilelang_finds_its_kernel_here_and_where_the_image_is_pulled(tmp_path: Path) -> None:
    plan = tmp_path / "kernels" / "warmstart" / "ahead" / "plan.json"
    with Node(tmp_path) as node:
        node.client().build_planned(plan, {})
        started = run_tilelang(COMPILE, tmp_path, "start", **{SERVICE: str(node.socket)})
        assert [event.cached for event in started.of("tilelang")] == [False], started.said
        assert node.end() == 0 and node.left() == []
    image = tmp_path / "image"
    done = compile_plan(plan, image, "--json")
    # TileLang itself tells standard output what it does.
    assert as_json(done)["there"] == {"tilelang": 1} and "TileLang begins to compile" in done.stderr
    cache = image / "tilelang"
    for name, code in (("here", "compile()"), ("pulled", PULLED)):
        found = run_tilelang(code, tmp_path, name, TILELANG_CACHE_DIR=str(cache))
        assert found.status == 0 and found.of("tilelang") == [], found.said
    # The command leaves it at that.
    entries = sorted(cache.iterdir())
    assert compile_plan(plan, image).returncode == 0 and sorted(cache.iterdir()) == entries


HASHED = """
from tilelang.cache.kernel_cache import KernelCache
from sglang_warmstart.libraries import tilelang_ahead
KernelCache._get_tilelang_lib_stamp = staticmethod(lambda: "libtilelang.so:" + "0a" * 32)
tilelang_ahead._keep_for_layers({})
"""


@needs("tilelang")
def test_a_tilelang_whose_key_has_a_hash_needs_no_second_one(tmp_path: Path) -> None:
    """As 0.1.12's."""
    done = run_tilelang(HASHED, tmp_path)
    assert done.status == 0, done.said


def kept(plan: Path, **parts: Part) -> Path:
    plan.write_bytes(build_plan.encode(BuildPlan({name.replace("_", "-"): part for name, part in parts.items()})))
    return plan


def test_what_cannot_be_built_is_said_by_library(tmp_path: Path) -> None:
    form = {"directory": "d", "file": "d/build.ninja", "text": "not ninja's", "sources": {}, "lock": "d/lock"}
    bad = Part({}, "", (Recipe("tvm-ffi", "bad", form, "d/*.so"),))
    other = Part({"triton": "0.0"}, "", (Recipe("triton", "f", {}, "KEY/*"), Recipe("triton", "g", {}, "OTHER/*")))
    plan = kept(tmp_path / "plan.json", tvm_ffi=bad, triton=other)
    done = compile_plan(plan, tmp_path / "image", "--json")
    assert done.returncode == 1
    said = as_json(done)
    assert said["there"] == {} and said["planned"] == {"tvm-ffi": 1, "triton": 2}
    assert list(said["failed"]) == ["tvm-ffi bad"]
    here = LIBRARIES["triton"].versions(os.environ)["triton"]
    assert said["refused"] == [f"triton: triton was 0.0 and is {here} here"]
    assert said["not_carried"] == ["cute-dsl", "inductor"]


def test_a_plan_of_something_else_or_a_place_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"parts": 7}')
    done = compile_plan(plan, tmp_path / "image")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    plan.write_bytes(build_plan.encode(BuildPlan({"triton": Part({}, "", ())})))
    (tmp_path / "file").touch()
    done = compile_plan(plan, tmp_path / "file")
    assert (done.returncode, done.stderr) == (2, f"{tmp_path}/file: File exists\n")
