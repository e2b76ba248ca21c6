"""Starts of the installed release of SGLang: stock with the fast list, and exact warm-up, cold and warm.

Stock servers of all models start at the same moment and go on for minutes, each with one compiler at a time. Beside
them, those with exact warm-up start one after another on each GPU.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from monitoring import WATCHED
from runs import HERE, Run, checkpoint, helper, start, warmup_of

DEEPSEEK, DEEPSEEK_V4, QWEN = "deepseek-v3-2layer", "deepseek-v4-4layer", "qwen3-235b-a22b-fp8-2layer"
FAST = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
PROMPT_TOKENS = (1, 17, 333, 3000)
_EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
)

# Configuration, arguments, and what is different in the configuration.
MODELS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "deepseek": (DEEPSEEK, (), {}),
    "qwen-deep_gemm": (QWEN, ("--moe-runner-backend", "deep_gemm"), {}),
    "qwen": (QWEN, (), {}),
    "deepseek-eagle": (DEEPSEEK, _EAGLE, {"num_nextn_predict_layers": 1}),
    "deepseek-v4": (DEEPSEEK_V4, (), {}),
}
# Its experts are in FP8.
VARIABLES = {"deepseek-v4": {"SGLANG_DSV4_FP4_EXPERTS": "0"}}


def prompts() -> list[list[int]]:
    """One prompt of each length. None begins like another."""
    return [[first, *range(200, 200 + tokens - 1)] for first, tokens in enumerate(PROMPT_TOKENS, 100)]


def release_starts(_model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Stock with the fast list, exact warm-up cold and warm, and every M of what it compiled, for several models."""
    version = importlib.metadata.version("sglang")
    name = f"release-starts-{version}"
    wanted = os.environ.get("WARMSTART_GPU_STARTS", "deepseek; qwen-deep_gemm; qwen").split("; ")
    without_stock = os.environ.get("WARMSTART_GPU_WITHOUT_STOCK", "").split("; ")
    result: dict[str, Any] = {"name": name, "runs": [], "sweeps": {}}
    # "recold-N": DeepGEMM's cache alone is cold. "planned-N": all are, and the plan of builds is left. "early-N":
    # so too, and the service starts before the server.
    states = os.environ.get("WARMSTART_GPU_STATES", "cold warm").split()
    gpus = os.environ.get("WARMSTART_GPUS", ",".join(map(str, range(torch.cuda.device_count())))).split(",")

    def one(label: str, state: str, gpu: str) -> Run:
        config, arguments, changes = MODELS[label]
        model, home = scratch / f"model-{label}", scratch / f"home-{label}-{'stock' if state == 'stock' else 'exact'}"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({**json.loads((HERE / f"{config}.json").read_text()), **changes}))
        environment = {**FAST, **VARIABLES.get(label, {}), **(WATCHED if state == "stock" else {})}
        early = state.startswith("early")
        run = Run(f"{label}-{state}", list(arguments), environment, home, prompts=prompts(), early=early)
        start(run, model, logs, gpu)
        seen = warmup_of(run) | {"model": label, "state": state, "prompts_s": run.answers_s}
        seen["events"] = events_of(home)
        if state != "stock":
            seen["plan"] = planned_in(home)
        seen["jit_while_serving"] = [line.rstrip() for line in run.log.splitlines() if "JIT while serving" in line]
        result["runs"].append(seen)
        checkpoint(name, result)
        return run

    def lane(gpu: str, labels: Iterable[str]) -> None:
        for label in labels:
            home = scratch / f"home-{label}-exact"
            for state in states:
                if state.startswith("recold"):
                    shutil.rmtree(deep_gemm_cache_below(home))
                if state.startswith(("planned", "early")):
                    forget_all_but_plans(home)
                one(label, state, gpu)
            cache = deep_gemm_cache_below(home)
            result["sweeps"][label] = helper("sweep", cache, "-", "", CUDA_VISIBLE_DEVICES=gpu)
            checkpoint(name, result)

    lanes = {gpu: wanted[index :: len(gpus)] for index, gpu in enumerate(gpus)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stock = [
            pool.submit(one, label, "stock", gpu)
            for gpu, labels in lanes.items()
            for label in labels
            if label not in without_stock
        ]
        for each in [*(pool.submit(lane, gpu, labels) for gpu, labels in lanes.items()), *stock]:
            each.result()
    return result


def deep_gemm_cache_below(home: Path) -> Path:
    """DeepGEMM's cache of servers with this home, wherever their release has it."""
    return next(path.parent for path in home.rglob("warmstart") if path.name == "warmstart" and path.is_dir())


def planned_in(home: Path) -> dict[str, list[list[Any]]]:
    """Name and seconds of what the plan of builds has, by library."""
    found: dict[str, list[list[Any]]] = {}
    for path in (deep_gemm_cache_below(home) / "warmstart" / "ahead").glob("*.json"):
        for library, part in json.loads(path.read_text())["parts"].items():
            found.setdefault(library, []).extend([each["name"], each.get("seconds", 0.0)] for each in part["recipes"])
    return found


def forget_all_but_plans(home: Path) -> None:
    """Empty every cache below a home, but for the plans of what other libraries compile."""
    place = deep_gemm_cache_below(home) / "warmstart" / "ahead"
    plans = {path.name: path.read_bytes() for path in place.glob("*.json")}
    for each in home.iterdir():
        shutil.rmtree(each)
    place.mkdir(parents=True)
    for name, data in plans.items():
        (place / name).write_bytes(data)


def events_of(home: Path) -> list[dict[str, Any]]:
    """What each process of the last start wrote down of it: steps, and what was compiled and loaded."""
    found = []
    for run in sorted(deep_gemm_cache_below(home).glob("warmstart/events/*")):
        for path in sorted(run.glob("*.jsonl")):
            found += [{"file": path.name, **json.loads(line)} for line in path.read_text().splitlines()]
        shutil.rmtree(run)
    return found
