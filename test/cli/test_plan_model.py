"""`sglang-warmstart plan --model-path` as its users run it, and what it makes of the answers of SGLang."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

import msgspec
import pytest
from kit.environment import child_environment
from kit.nogpu import TARGETS
from kit.toolchain import toolchain
from sglang_warmstart.cli import app, plan_model
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.plan import NO_GPU, LeftOut
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang.model_targets.protocol import NotFound, Ranks
from sglang_warmstart.sglang.model_targets.refusal import RefusalError
from typer.testing import CliRunner, Result

GPU_TESTS = Path(__file__).parents[1] / "gpu"
QWEN = "qwen3-235b-a22b-fp8-2layer"
PRENORM = msgspec.structs.replace(TARGETS[3], m_max=4)


@pytest.fixture(autouse=True, scope="module")
def no_forkserver_left() -> Iterator[None]:
    """The command has a DeepGEMM loaded into the forkserver of this process, and others want another one."""
    _stop_forkserver()
    yield
    _stop_forkserver()


def _stop_forkserver() -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    multiprocessing.set_forkserver_preload([])


def options(output: Path) -> list[str]:
    return ["-o", str(output), "--gpu", "h200", "--deep-gemm", str(toolchain().deep_gemm_of("0.1.7"))]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from sglang_warmstart.cli import main; sys.argv[0] = 'sglang-warmstart'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "plan", *map(str, arguments)],
        env=child_environment({"CUDA_HOME": str(toolchain().cuda_home)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.release("0.5.12")
def test_a_model_becomes_a_plan_of_its_server(tmp_path: Path) -> None:
    shutil.copy(GPU_TESTS / f"{QWEN}.json", tmp_path / "config.json")
    output = tmp_path / "plan.json"
    made = run("--model-path", tmp_path, "--tp", 2, "--chunked-prefill-size=4096", *options(output))
    assert made.returncode == 0, made.stderr
    plan = plans.decode(output.read_bytes())
    (launch,) = plan.launches
    assert made.stdout == f"{output}: {len(plan.kernels)} kernels, 2 targets of 2 ranks\n"
    assert (plan.made, plan.left_out, launch.gpu) == (NO_GPU, (), "NVIDIA H200")
    assert launch.launch == {"made": NO_GPU, "ranks": "0 1", "model": "Qwen3MoeForCausalLM"}
    results = json.loads((GPU_TESTS / "results" / "model_targets.json").read_text())
    real = msgspec.convert(results["starts"]["qwen tp 2"]["ranks"]["0"], list[Target])
    assert {each.target for each in launch.targets} == set(real)
    assert made.stderr.splitlines()[:2] == ["importing SGLang", "building the model"]


def test_without_a_configuration_it_is_refused_at_once(tmp_path: Path) -> None:
    made = run("--model-path", tmp_path, *options(tmp_path / "plan.json"))
    (line,) = made.stderr.splitlines()
    assert (made.returncode, "is no directory with a config.json" in line) == (2, True)


class Answered:
    """In the place of SGLang: says the same whatever it is asked."""

    def __init__(self, *ranks: Ranks) -> None:
        self.ranks, self.asked = list(ranks), [""]

    def __call__(self, arguments: Sequence[str], gpu: Gpu, begun: object) -> list[Ranks]:
        self.asked = list(arguments)
        return self.ranks


def invoke(monkeypatch: pytest.MonkeyPatch, answered: Answered, output: Path) -> Result:
    monkeypatch.setattr(plan_model, "ranks_of", answered)
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    return CliRunner().invoke(app, ["plan", "--model-path", "M", "--tp", "8", *options(output), "--ep=8"])


def test_what_is_not_known_is_in_the_plan_by_name_and_the_rest_is_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, failed = tmp_path / "plan.json", NotFound("model.layers.3.mlp.experts", "why")
    answered = Answered(
        Ranks((0,), ("Model",), 9, (PRENORM,), (failed,)), Ranks((1,), ("Model",), 8, (PRENORM, PRENORM), ())
    )
    ended = invoke(monkeypatch, answered, output)
    assert answered.asked == ["--model-path", "M", "--tp", "8", "--ep=8"]
    assert ended.exit_code == 1, ended.output
    assert "not in the plan: model.layers.3.mlp.experts: why" in ended.stderr
    plan = plans.decode(output.read_bytes())
    assert plan.left_out == (LeftOut("model.layers.3.mlp.experts", "why"),)
    assert [each.launch["ranks"] for each in plan.launches] == ["0", "1"]


def test_what_sglang_refuses_is_one_line_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> list[Ranks]:
        raise RefusalError("sglang serve: error: unrecognized arguments: --nonsense")

    monkeypatch.setattr(plan_model, "ranks_of", refuse)
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    ended = CliRunner().invoke(app, ["plan", "--model-path", "M", *options(tmp_path / "plan.json")])
    assert (ended.exit_code, ended.stderr) == (2, "sglang serve: error: unrecognized arguments: --nonsense\n")
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("not_found", "line"),
    [
        ((), "none of the 8 layers of Model and Draft calls DeepGEMM with these arguments on h200: nothing to plan\n"),
        ((NotFound("lm_head", "why"),), "no target of Model and Draft was found: lm_head: why\n"),
    ],
    ids=["unquantised", "not known"],
)
def test_without_a_target_there_is_no_plan(
    not_found: tuple[NotFound, ...], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    ended = invoke(monkeypatch, Answered(Ranks((0,), ("Model", "Draft"), 8, (), not_found)), output)
    assert (ended.exit_code, ended.stderr) == (2, line)
    assert not output.exists()
