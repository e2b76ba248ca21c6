"""Where the plan of a server's builds is: found by words that mean the same server, and by no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_warmstart.sglang.ahead import arguments_of, plan_for

SERVER = ["python", "-m", "sglang.launch_server"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"SGLANG_DG_CACHE_DIR": str(tmp_path / "cache")}


def model(directory: Path, layers: int) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    return str(directory)


def test_it_is_in_deep_gemms_cache(environment: dict[str, str], tmp_path: Path) -> None:
    path = plan_for([*SERVER, "--model-path", "M"], environment)
    assert path is not None
    assert path.parent == tmp_path / "cache" / "warmstart" / "ahead"
    assert path.name.startswith("words-") and len(path.stem) == len("words-") + 32


@pytest.mark.parametrize(
    "command",
    [
        [*SERVER, "--model", "M", "--tp", "2"],
        ["/a/bin/python3", "-W", "ignore", "-m", "sglang.launch_server", "--model", "M", "--tp", "2"],
        ["numactl", "-N", "0", *SERVER, "--model", "M", "--tp", "2"],
        ["sglang", "serve", "--model", "M", "--tp", "2"],
        # What the main process has in `sys.argv`.
        ["/a/site-packages/sglang/launch_server.py", "--model", "M", "--tp", "2"],
        ["/a/bin/sglang", "serve", "--model", "M", "--tp", "2"],
    ],
    ids=" ".join,
)
def test_a_server_is_the_same_by_whatever_command_and_in_its_own_process(
    command: list[str], environment: dict[str, str]
) -> None:
    assert arguments_of(command) == ["--model", "M", "--tp", "2"]
    assert plan_for(command, environment) == plan_for([*SERVER, "--model", "M", "--tp", "2"], environment)


@pytest.mark.parametrize("command", [[], ["python", "serve.py"], ["sglang"], ["sglang", "version"], SERVER[:2]])
def test_another_command_has_no_plan(command: list[str], environment: dict[str, str]) -> None:
    assert plan_for(command, environment) is None


@pytest.mark.parametrize(
    "words",
    [
        "--port 30000",
        "--port=30001 --host 0.0.0.0",
        "--nccl-port 5 --dist-init-addr a:1 --node-rank 1",
        "--log-level info --enable-metrics",
        "--served-model-name a --api-key secret",
        "--tp 4 --tp 2",
    ],
)
def test_what_does_not_matter_is_not_in_the_key(words: str, environment: dict[str, str]) -> None:
    same = [*SERVER, "--tp", "2", "--model-path", "M"]
    assert plan_for([*SERVER, "--model-path=M", *words.split(), "--tp=2"], environment) == plan_for(same, environment)


@pytest.mark.parametrize(
    "words",
    ["--tp 4", "--quantization fp8", "--model-path N", "--revision r", "--cuda-graph-bs 1 2", "--disable-cuda-graph"],
)
def test_what_matters_is_in_the_key(words: str, environment: dict[str, str]) -> None:
    same = [*SERVER, "--model-path", "M", "--tp", "2"]
    assert plan_for([*same, *words.split()], environment) != plan_for(same, environment)


def test_the_order_of_values_matters_and_that_of_options_does_not(environment: dict[str, str]) -> None:
    plans = [
        plan_for([*SERVER, *words.split()], environment)
        for words in ("--bs 1 2 --tp 2", "--tp 2 --bs 1 2", "--bs 2 1 --tp 2")
    ]
    assert plans[0] == plans[1] != plans[2]


def test_variables_matter_as_for_a_launch(environment: dict[str, str]) -> None:
    plan = plan_for(SERVER, environment)
    for name in (
        "SGLANG_WARMSTART_SERVICE",
        "SGLANG_WARMSTART_EARLY",
        "SGLANG_HOST_IP",
        "PATH",
        "CUDA_VISIBLE_DEVICES",
    ):
        assert plan_for(SERVER, {**environment, name: "1"}) == plan, name
    assert plan_for(SERVER, {**environment, "SGLANG_ENABLE_SPEC_V2": "1"}) != plan


@pytest.mark.parametrize("option", ["--model-path", "--model", "--speculative-draft-model-path"])
def test_a_model_counts_by_its_configuration(option: str, environment: dict[str, str], tmp_path: Path) -> None:
    def plan(name: str, layers: int) -> Path | None:
        return plan_for([*SERVER, option, model(tmp_path / name, layers)], environment)

    assert plan("a", 2) == plan("b", 2)
    assert plan("a", 2) != plan("a", 3)


def test_a_file_of_arguments_counts_by_what_is_in_it(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    plans = set()
    for text in ("tp: 2", "tp: 4"):
        file.write_text(text)
        plans.add(plan_for([*SERVER, "--config", str(file)], environment))
    assert len(plans) == 2


def test_words_that_are_no_utf_8_have_a_key(environment: dict[str, str]) -> None:
    assert plan_for([*SERVER, "--model-path", "\udcff"], environment) is not None


def test_it_imports_neither_sglang_nor_msgspec() -> None:
    code = "import sys, sglang_warmstart.sglang.ahead; print(sorted({'sglang', 'torch', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
