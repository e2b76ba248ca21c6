"""F7 as a server has it: what a rank's libraries compile is in the plan of its launch, and built at the next start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
from kit.environment import child_environment
from kit.node import Node, wait_until
from kit.watched_libraries import needs_ninja, run_tvm_ffi
from sglang_warmstart.base.switches import BUILD_AHEAD, BUNDLE, EVENTS, PLANS, SERVICE
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.node import launch
from sglang_warmstart.sglang import build_ahead, first_start
from sglang_warmstart.sglang.ahead import plan_for
from sglang_warmstart.sglang.build_ahead import Launch
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

COMMAND = ["python", "-m", "sglang.launch_server", "--model-path", "deepseek-ai/DeepSeek-V3", "--tp", "8"]
# In a rank, which has imported SGLang. What it has told goes its way in a thread.
COMPILE = "import sglang.srt.environ\ncompile()\nimport time; time.sleep(2)"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    variables = {DEEP_GEMM_CACHE: str(tmp_path / "kernels"), "TVM_FFI_CACHE_DIR": str(tmp_path / "cache")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in (SERVICE, EVENTS, BUILD_AHEAD.name):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/site/sglang/launch_server.py", *COMMAND[3:]])
    return variables


def _begin(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the main process does when the service has started."""
    monkeypatch.setenv(SERVICE, str(node.socket))
    launch = Launch(sys.argv, os.environ)
    # SGLang does so, whatever the server is.
    monkeypatch.setenv("SGLANG_ENABLE_TORCH_COMPILE", "0")
    teller = launch.begin_builds(SimpleNamespace(node_rank=0))
    assert teller is not None
    teller.join(10)


@needs_ninja
def test_what_a_rank_has_compiled_is_built_at_the_next_start(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(COMMAND, os.environ)
    assert plan is not None
    with Node(tmp_path) as node:
        _begin(node, monkeypatch)
        first = run_tvm_ffi(COMPILE, tmp_path, "first", **{SERVICE: str(node.socket)})
        assert first.status == 0, first.said
        assert [event.cached for event in first.of("tvm-ffi")] == [False]
        assert node.end() == 0 and node.left() == []
    (recipe,) = build_plan.load(plan).parts["tvm-ffi"].recipes
    assert recipe.name == "add_one" and recipe.seconds > 0.1
    shutil.rmtree(tmp_path / "cache")
    # A start by `run` has the service build before the server is there; a usual one when that tells it.
    with Node(tmp_path, build_plan=plan) as node:
        assert wait_until(lambda: list((tmp_path / "cache").glob("*/add_one.so")), 60)
        _begin(node, monkeypatch)
        again = run_tvm_ffi(COMPILE, tmp_path, "again", **{SERVICE: str(node.socket)})
    assert again.status == 0, again.said
    assert [event.cached for event in again.of("tvm-ffi")] == [True]


def package_in(place: Path) -> Path:
    """A directory of a Python path with a DeepGEMM, which is looked for and not imported."""
    (place / "site" / "deep_gemm").mkdir(parents=True)
    (place / "site" / "deep_gemm" / "__init__.py").touch()
    return place / "site"


# A server's main process, as far as its own service.
MAIN = """
import os, sys
from sglang.srt.plugins import load_plugins

sys.argv = sys.argv[1:]
load_plugins()
from sglang_warmstart.node.launch import early_service

service = early_service(os.environ)
print(service is not None and str(service.socket) == os.environ["SGLANG_WARMSTART_SERVICE"], flush=True)
sys.stdin.read()
"""


@needs_ninja
@pytest.mark.by_plugin
def test_with_a_plan_the_service_builds_as_soon_as_the_plugin_is_loaded(
    environment: dict[str, str], tmp_path: Path
) -> None:
    plan = plan_for(COMMAND, os.environ)
    assert plan is not None
    with Node(tmp_path) as node:
        node.client().build_planned(plan, {})
        assert run_tvm_ffi(COMPILE, tmp_path, "first", **{SERVICE: str(node.socket)}).status == 0
        assert node.end() == 0 and node.left() == []
    shutil.rmtree(tmp_path / "cache")
    own = child_environment()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", MAIN, *sys.argv],
        env={**own, "PYTHONPATH": f"{package_in(tmp_path)}{os.pathsep}{own['PYTHONPATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert wait_until(lambda: list((tmp_path / "cache").glob("*/add_one.so")), 60)
        (service,) = psutil.Process(process.pid).children()
    finally:
        process.communicate()
    assert not service.is_running(), "it ends with the server"


@pytest.mark.parametrize("name", ["", SERVICE, PLANS, BUNDLE.name, "SGLANG_JIT_DEEPGEMM_PRECOMPILE"])
def test_only_a_main_process_that_needs_no_more_starts_its_service_early(
    name: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Path]] = []
    monkeypatch.setattr(launch, "start_early", lambda *_, **known: started.append(known))
    monkeypatch.setattr(first_start, "capabilities", set)
    monkeypatch.syspath_prepend(package_in(tmp_path))
    begin = Launch(sys.argv, os.environ).begin_early
    begin()
    assert started == [], "there is no plan"
    plan = plan_for(COMMAND, os.environ)
    assert plan is not None
    plan.parent.mkdir(parents=True)
    plan.touch()
    if name:
        monkeypatch.setenv(name, "0" if name.startswith("SGLANG_JIT") else "somewhere")
    begin()
    assert started == ([] if name else [{"build_plan": plan}])
    # Of a first start there are guesses.
    plan.unlink()
    monkeypatch.setattr(first_start, "capabilities", lambda: {(9, 0)})
    begin()
    guessed = list(plan.parent.glob("guesses-*.json"))
    assert len(guessed) == (not name)
    if not name:
        (known,) = started[1:]
        assert known["guesses"] == guessed[0] and known["finder"][0] == "sglang_warmstart.sglang.targets_ahead"


@needs_ninja
@pytest.mark.parametrize("off", [{BUILD_AHEAD.name: "0"}, {"SGLANG_WARMSTART_JIT_MONITOR": "off"}])
def test_switched_off_nothing_is_told(off: dict[str, str], environment: dict[str, str], tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.client().build_planned(tmp_path / "kernels" / "plan.json", {})
        watched = run_tvm_ffi(COMPILE, tmp_path, "run", **{SERVICE: str(node.socket), **off})
        assert watched.status == 0, watched.said
        assert node.end() == 0 and node.left() == []
    assert not (tmp_path / "kernels" / "plan.json").exists()


@needs_ninja
def test_a_service_that_is_gone_costs_the_rank_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    watched = run_tvm_ffi(COMPILE, tmp_path, **{SERVICE: str(tmp_path / "gone" / "service.sock")})
    assert watched.status == 0, watched.said
    assert [event.cached for event in watched.of("tvm-ffi")] == [False]


def test_without_a_service_nothing_is_asked_for(environment: dict[str, str]) -> None:
    assert Launch(sys.argv, os.environ).begin_builds(SimpleNamespace(node_rank=0)) is None


def test_a_service_that_does_not_answer_is_said_in_one_line(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build_ahead, "ANSWER_S", 3.0)
    monkeypatch.setenv(SERVICE, str(tmp_path / "service.sock"))
    with caplog.at_level("WARNING"):
        start = time.monotonic()
        teller = Launch(sys.argv, os.environ).begin_builds(SimpleNamespace(node_rank=0))
        assert time.monotonic() - start < 2  # nobody waits for it
        assert teller is not None
        teller.join(10)
    (said,) = caplog.messages
    assert said.startswith("warmstart: nothing is built ahead: no service at ")


def test_an_engine_has_the_plan_of_its_arguments(runner: ModelRunner, environment: dict[str, str]) -> None:
    words = ["/home/somebody/my_program.py"]
    first = Launch(words, os.environ).plan(runner.server_args)
    assert first.parent == Path(environment[DEEP_GEMM_CACHE], "warmstart", "ahead")
    assert first.name.startswith("launch-")

    def plan(**variables: str) -> Path:
        return Launch(words, {**os.environ, **variables}).plan(runner.server_args)

    assert plan(SGLANG_LOG_LEVEL="debug") == first
    assert plan(SGLANG_MOE_SOMETHING="1") != first
