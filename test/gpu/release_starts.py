"""Starts of the installed release of SGLang beside each other: stock, and with the plugin from several states."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monitoring import WATCHED
from runs import GRAPHS, HERE, Run, by_rank, checkpoint, compiler, helper, start, warmup_of
from sglang_warmstart.sglang.caches import caches_below

DEEPSEEK, DEEPSEEK_V4, QWEN = "deepseek-v3-2layer", "deepseek-v4-4layer", "qwen3-235b-a22b-fp8-2layer"
FAST = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
PROMPT_TOKENS = (1, 17, 333, 3000)
# Beside an image, a copy of it: what a start leaves in its image is not to be there in the next.
MADE = "image-as-made"
# Stock DeepSeek-V4 takes more than ten minutes.
START_LIMIT_S, STOCK_LIMIT_S = 400.0, 1500.0
# With a plan, what is built is built by then.
BUILDING_S = 50.0
_EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
)
# Both can use NVLink's multicast, which not every host lets its guests have.
_TP2 = ("--tp", "2", "--enforce-disable-flashinfer-allreduce-fusion", "--disable-custom-all-reduce")
# SGLang pads to the ranks of attention if a dense layer is not split over them, also where the model has none.
_GATHER = ("--moe-dense-tp-size", "1", GRAPHS, "64")

# Configuration, arguments, and what is different in the configuration.
MODELS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "deepseek": (DEEPSEEK, (), {}),
    "qwen-deep_gemm": (QWEN, ("--moe-runner-backend", "deep_gemm"), {}),
    "qwen": (QWEN, (), {}),
    "deepseek-eagle": (DEEPSEEK, _EAGLE, {"num_nextn_predict_layers": 1}),
    "deepseek-v4": (DEEPSEEK_V4, (), {}),
    "deepseek-v4-pp2": (DEEPSEEK_V4, ("--pp-size", "2"), {}),
    "deepseek-v4-tp2": (DEEPSEEK_V4, _TP2, {}),
    "deepseek-v4-tp2-gather": (DEEPSEEK_V4, (*_TP2, *_GATHER), {}),
    "deepseek-v4-tp2-gather-flag": (DEEPSEEK_V4, (*_TP2, *_GATHER, "--disable-attn-tp-gather"), {}),
}
# Its experts are in FP8.
DEEPSEEK_V4_VARIABLES = {"SGLANG_DSV4_FP4_EXPERTS": "0"}


def prompts() -> list[list[int]]:
    """One prompt of each length. None begins like another."""
    return [[first, *range(200, 200 + tokens - 1)] for first, tokens in enumerate(PROMPT_TOKENS, 100)]


@dataclass(frozen=True)
class Lane:
    """Starts of one model, one after another, on GPUs and cores that no other lane has if there are enough."""

    label: str
    states: tuple[str, ...]
    gpus: str
    cores: list[int]


def lanes_of(text: str, gpus: list[str], cores: list[int]) -> list[Lane]:
    """The lanes of ``MODEL: STATE STATE; MODEL: STATE``, each with its share of the cores."""
    wanted = [each.split(":") for each in text.split(";")]
    needs = [int(next(iter(re.findall(r"-(?:tp|pp)(\d)", label)), 1)) for label, _ in wanted]
    share, first, lanes = len(cores) // max(len(gpus), sum(needs)), 0, []
    for (label, states), count in zip(wanted, needs, strict=True):
        own = ",".join(gpus[each % len(gpus)] for each in range(first, first + count))
        lanes.append(Lane(label.strip(), tuple(states.split()), own, cores[first * share : (first + count) * share]))
        first += count
    return lanes


def release_starts(_model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Lanes of WARMSTART_GPU_LANES beside each other, and every M of what exact warm-up compiled where it asks.

    States: "stock" and "stock-warm-N" have the fast list and no plugin but its probe; "cold" and "warm-N" the plugin;
    for the others see `forget`. What "early" and "decode" mean is said in their names: "early-planned-1". "make-image"
    has the plan compiled into a directory, without the GPU, and "image-N" starts with that and nothing else.

    Lanes, also those of another interpreter, may have the same cores. With WARMSTART_GPU_TURN, a file, those that are
    not stock take turns in compiling.
    """
    version = importlib.metadata.version("sglang")
    name = os.environ.get("WARMSTART_GPU_NAME", f"release-starts-{version}")
    lanes = lanes_of(
        os.environ.get("WARMSTART_GPU_LANES", "deepseek: cold warm; qwen: cold warm; deepseek: stock; qwen: stock"),
        os.environ.get("WARMSTART_GPUS", ",".join(map(str, range(torch.cuda.device_count())))).split(","),
        sorted(os.sched_getaffinity(0)),
    )
    result: dict[str, Any] = {"name": name, "runs": [], "sweeps": {}}

    def one(lane: Lane, state: str) -> None:
        config, arguments, changes = MODELS[lane.label]
        stock, image = state.startswith("stock"), state.startswith("image")
        model = scratch / f"model-{lane.label}"
        home = scratch / f"home-{lane.label}-{'stock' if stock else 'image' if image else 'exact'}"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({**json.loads((HERE / f"{config}.json").read_text()), **changes}))
        if home.exists():
            forget(home, state)
        environment = {**FAST, **(DEEPSEEK_V4_VARIABLES if config == DEEPSEEK_V4 else {}), **(WATCHED if stock else {})}
        environment |= caches_below(home / "image") if image else {}
        run = Run(
            f"{lane.label}-{state}",
            list(arguments),
            environment,
            home,
            cores=lane.cores,
            prompts=prompts(),
            early=state.startswith("early"),
            decode=(1, 64) if "decode" in state else (),
        )
        with turn_of(state):
            start(run, model, logs, lane.gpus, STOCK_LIMIT_S if stock else START_LIMIT_S)
        seen = warmup_of(run) | {"model": lane.label, "state": state, "prompts_s": run.answers_s}
        seen |= {"decode_ms": run.decode_ms, "gpus": lane.gpus, "cores": len(lane.cores), "used": run.used}
        seen |= {"planned": by_rank(run, "planned", ("batch_sizes",))}
        seen |= {"captured": by_rank(run, "capture", ("batch_size", "num_tokens", "gathered_buffer"))}
        seen["events"] = events_of(home)
        if not stock:
            seen["plan"] = planned_in(home)
        seen["jit_while_serving"] = [line.rstrip() for line in run.log.splitlines() if "JIT while serving" in line]
        result["runs"].append(seen)
        checkpoint(name, result)

    def go(lane: Lane) -> None:
        for state in lane.states:
            if state == "sweep":
                cache = deep_gemm_cache_below(scratch / f"home-{lane.label}-exact")
                result["sweeps"][lane.label] = helper(
                    "sweep", cache, "-", "", CUDA_VISIBLE_DEVICES=lane.gpus.split(",")[0]
                )
                checkpoint(name, result)
            elif state == "make-image":
                with turn_of(state):
                    made = make_image(
                        scratch / f"home-{lane.label}-exact", scratch / f"home-{lane.label}-image" / "image", lane.cores
                    )
                result.setdefault("images", {})[lane.label] = made
                checkpoint(name, result)
            else:
                one(lane, state)

    with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
        for each in [pool.submit(go, lane) for lane in lanes]:
            each.result()
    return result


@contextlib.contextmanager
def turn_of(state: str) -> Iterator[None]:
    """Only one at a time of all starts of ours that compile: with a plan for as long as that takes, mostly."""
    file = os.environ.get("WARMSTART_GPU_TURN")
    if file is None or not re.search("cold|planned|make-image", state):
        yield
        return
    held = Path(file).open("w")  # noqa: SIM115 (it is closed by whoever is first)
    fcntl.flock(held, fcntl.LOCK_EX)
    if "planned" in state:
        threading.Timer(BUILDING_S, held.close).start()
    try:
        yield
    finally:
        held.close()


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


def make_image(home: Path, image: Path, cores: list[int]) -> dict[str, Any]:
    """What the plans of a home's servers have, compiled for an image."""
    plans = (deep_gemm_cache_below(home) / "warmstart" / "ahead").glob("*.json")
    words = ["compile", "--json", "-o", str(image), *map(str, plans)]
    command = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-W", "ignore", "-c"]
    begin = time.time()
    # The compiler of the plan is the one that writes a log.
    changed = {"HOME": str(image.parent), "CUDA_VISIBLE_DEVICES": "", "DG_JIT_NVCC_COMPILER": compiler()}
    done = subprocess.run(
        [*command, "from sglang_warmstart.cli import main; main()", *words],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    try:
        made: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        made = {"error": f"status {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"}
    shutil.copytree(image, image.with_name(MADE), symlinks=True)
    made |= {"status": done.returncode, "whole_s": round(time.time() - begin, 1), "said": done.stderr[-2000:]}
    shown = {key: made.get(key) for key in ("planned", "there", "failed", "refused", "whole_s", "error")}
    print(f"  image: {shown}", flush=True)
    return made


def forget(home: Path, state: str) -> None:
    """Empty what a state starts without: "recold" DeepGEMM's cache, "planned" all but the plans, "cold" all.

    "image" all but the directory of the image, which is as it was made.
    """
    if "recold" in state:
        shutil.rmtree(deep_gemm_cache_below(home))
    if "planned" in state:
        place = deep_gemm_cache_below(home) / "warmstart" / "ahead"
        plans = {path.name: path.read_bytes() for path in place.glob("*.json")}
        empty(home)
        place.mkdir(parents=True)
        for name, data in plans.items():
            (place / name).write_bytes(data)
    if state.startswith(("cold", "early-cold")):
        empty(home)
    if state.startswith("image"):
        empty(home, MADE)
        shutil.copytree(home / MADE, home / "image", symlinks=True)


def empty(home: Path, but: str = "") -> None:
    for each in home.iterdir():
        if each.name != but:
            shutil.rmtree(each)


def events_of(home: Path) -> list[dict[str, Any]]:
    """What each process of the last start wrote down of it: steps, and what was compiled and loaded."""
    found = []
    for run in sorted(deep_gemm_cache_below(home).glob("warmstart/events/*")):
        for path in sorted(run.glob("*.jsonl")):
            found += [{"file": path.name, **json.loads(line)} for line in path.read_text().splitlines()]
        shutil.rmtree(run)
    return found
