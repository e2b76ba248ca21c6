"""The targets of a first start are found without a GPU, and compiled, before there is a rank to ask for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from kit.node import Node, Place, wait_until
from kit.nvml import write_nvml
from kit.standin_library import definition
from sglang_warmstart.base import gpus
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang import targets_ahead
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE
from sglang_warmstart.sglang.first_start import Features, known_of_first
from sglang_warmstart.sglang.model_targets import ask
from sglang_warmstart.sglang.model_targets.protocol import Ranks
from sglang_warmstart.sglang.model_targets.refusal import RefusalError

GPU_TESTS = Path(__file__).parents[1] / "gpu"
H200 = "NVIDIA H200"
PLENTY = 80 << 30


def command(place: Path) -> list[str]:
    """Of a server with the shapes of DeepSeek-V3."""
    (place / "config.json").write_bytes((GPU_TESTS / "deepseek-v3-2layer.json").read_bytes())
    server = ["python", "-m", "sglang.launch_server", "--model-path", str(place), "--load-format", "dummy"]
    return [*server, "--chunked-prefill-size", "8192"]


def met_on_a_gpu() -> list[Target]:
    """What a rank of this server met on an H200."""
    starts = json.loads((GPU_TESTS / "results" / "model_targets.json").read_text())["starts"]
    return msgspec.convert(starts["deepseek tp 1"]["ranks"]["0"], list[Target])


def test_what_a_rank_will_ask_for_is_compiled_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, targets = Place(tmp_path), met_on_a_gpu()
    (place.deep_gemm / "__init__.py").touch()  # it is looked for
    write_nvml(tmp_path, H200)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    finder = known_of_first(tmp_path / "ahead", command(tmp_path), {})["finder"]
    variables = {DEEP_GEMM_CACHE: str(place.cache.root), "DG_JIT_NVCC_COMPILER": str(place.nvcc.path)}
    with Node(tmp_path, modules=tmp_path, finder=finder, **variables) as node:
        assert wait_until(lambda: "before the ranks" in node.log, 120), node.log
        assert f"{len(targets)} targets of DeepGEMM are known before the ranks" in node.log
        names = {use.directory for target in targets for use in definition(target)}
        assert wait_until(lambda: all(place.cache.has(name) for name in names)), "nobody has asked for them yet"
        # SGLang sets this too, in a rank.
        rank = place.rank(node, place.hello(DG_JIT_USE_NVRTC="0"))
        assert rank.restore().targets == (), "no marker knows them"
        answer = rank.warm(targets, PLENTY, 60, searched=True)
        assert [each.error for each in answer.targets] == [""] * len(targets)
        assert node.end() == 0 and node.left() == []
    # Each was compiled once.
    assert {use.directory for each in answer.targets for use in each.kernels} == names
    assert sum(place.nvcc.compiled.values()) == len(names) == answer.compiled


def test_a_model_that_is_named_as_on_a_hub_is_read_where_its_cache_has_it(tmp_path: Path) -> None:
    place = tmp_path / "models--deepseek-ai--DeepSeek-V3" / "snapshots" / "abc"
    place.mkdir(parents=True)
    words = [*command(place)[:3], "--model-path", "deepseek-ai/DeepSeek-V3", "--tp", "8"]
    arguments = Features(words, {"HF_HUB_CACHE": str(tmp_path)}).arguments
    ask.check(arguments)
    with pytest.raises(RefusalError, match=r"no directory with a config\.json"):
        ask.check(words[3:])


def test_only_what_this_node_will_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, (first, second, *_) = Place(tmp_path), met_on_a_gpu()
    (place.deep_gemm / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpus, "names", lambda: {H200})
    stages = [Ranks((0, 1), (), 1, (first,), ()), Ranks((2, 3), (), 1, (second,), ())]
    monkeypatch.setattr(targets_ahead, "ranks_of", lambda *_: stages)
    environment = {DEEP_GEMM_CACHE: str(place.cache.root), "DG_JIT_NVCC_COMPILER": str(place.nvcc.path)}
    words = [*command(tmp_path), "--tp", "2", "--pp-size", "2"]
    with Node(tmp_path, modules=tmp_path) as node:
        assert targets_ahead.find(node.socket, [*words, "--nnodes", "2", "--node-rank", "1"], environment) == 1
        answer = place.rank(node).warm([second], PLENTY, 30)
        assert len(place.nvcc.compiled) == answer.compiled > 0
        assert targets_ahead.find(node.socket, words, environment) == 2


@pytest.mark.parametrize(
    ("names", "model", "switch", "reason"),
    [
        ({"NVIDIA A100"}, True, "1", "there is no table of NVIDIA A100"),
        (set(), True, "1", "NVML names no GPU"),
        ({H200, "NVIDIA H100"}, True, "1", "there are several kinds of GPUs: NVIDIA H100, NVIDIA H200"),
        ({H200}, False, "1", "the model's config.json is not on this machine"),
        ({H200}, True, "0", "DeepGEMM is not warmed here"),
    ],
)
def test_it_is_said_why_nothing_can_be(
    names: set[str], model: bool, switch: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    (place.deep_gemm / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpus, "names", lambda: names)
    words = command(tmp_path)
    if not model:
        (tmp_path / "config.json").unlink()
    with pytest.raises(RefusalError, match=f"^{reason}$"):
        targets_ahead.find(tmp_path / "no service", words, {"SGLANG_ENABLE_JIT_DEEPGEMM": switch})


def test_a_service_that_ends_ends_who_looks_for_targets(tmp_path: Path) -> None:
    """With all that it has started."""
    (tmp_path / "slow.py").write_text("import subprocess\ndef main(): subprocess.run(['sleep', '299.25'])\n")
    with Node(tmp_path, modules=tmp_path, finder=("slow", "word")) as node:
        assert wait_until(lambda: node.is_running("sleep 299.25"))
        assert node.end() == 0
        assert node.left() == []


def test_who_takes_too_long_to_find_out_is_ended(tmp_path: Path) -> None:
    code = "t.LIMIT_S = 1.0; t.find = lambda *_: threading.Event().wait(); t.main()"
    code = f"import threading; from sglang_warmstart.sglang import targets_ahead as t; {code}"
    words = [str(os.getpid()), str(tmp_path / "socket"), "[]"]
    done = subprocess.run([sys.executable, "-c", code, *words], timeout=30, check=False)
    assert done.returncode == 1
