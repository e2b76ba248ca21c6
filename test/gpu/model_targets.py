"""The targets that the ranks of real servers meet in their dry forwards, for several models and splits.

What `sglang-warmstart plan --model-path` says without a GPU is compared with them.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
from pathlib import Path
from typing import Any

from bundles import command
from runs import HERE, SERVER, checkpoint

DEEPSEEK, QWEN = "deepseek-v3-2layer", "qwen3-235b-a22b-fp8-2layer"
_DEEP_GEMM_MOE = ("--moe-runner-backend", "deep_gemm")
_DP_ATTENTION = ("--tp", "2", "--dp", "2", "--enable-dp-attention")

# What is different from the usual server: (model, arguments).
STARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "deepseek tp 1": (DEEPSEEK, ()),
    "qwen tp 1": (QWEN, ()),
    "deepseek tp 2": (DEEPSEEK, ("--tp", "2")),
    "deepseek pp 2": (DEEPSEEK, ("--pp-size", "2")),
    "qwen tp 2": (QWEN, ("--tp", "2")),
    "qwen pp 2": (QWEN, ("--pp-size", "2")),
    "deepseek tp 2, experts by DeepGEMM": (DEEPSEEK, ("--tp", "2", *_DEEP_GEMM_MOE)),
    "deepseek tp 2, ep 2, experts by DeepGEMM": (DEEPSEEK, ("--tp", "2", "--ep", "2", *_DEEP_GEMM_MOE)),
    "deepseek dp attention": (DEEPSEEK, _DP_ATTENTION),
    "deepseek dp attention, dense tp 1": (DEEPSEEK, (*_DP_ATTENTION, "--moe-dense-tp-size", "1")),
    "qwen tp 2, ep 2, experts by DeepGEMM": (QWEN, ("--tp", "2", "--ep", "2", *_DEEP_GEMM_MOE)),
    "qwen dp attention, experts by DeepGEMM": (QWEN, (*_DP_ATTENTION, *_DEEP_GEMM_MOE)),
}


def model_targets(_model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Plans of several servers, recorded on the GPUs: the targets of each rank."""
    only = os.environ.get("WARMSTART_GPU_STARTS")
    starts = {name: each for name, each in STARTS.items() if only is None or name in only.split("; ")}
    result: dict[str, Any] = {"starts": {}}

    def one(name: str) -> dict[str, Any]:
        config, arguments = starts[name]
        slug = name.replace(" ", "-").replace(",", "")
        model, plan = scratch / f"model-{slug}", scratch / f"{slug}.json"
        model.mkdir(parents=True)
        shutil.copy(HERE / f"{config}.json", model / "config.json")
        # Two at a time, each with a home of its own: two do not write one cache.
        seconds, done = command(
            *("record", "-o", plan, "--log", logs / f"{slug}.log", "--limit-s", "400", "--model-path", model),
            *(*SERVER, "--mem-fraction-static", "0.3", *arguments),
            HOME=str(homes[list(starts).index(name) % 2]),
            CUDA_VISIBLE_DEVICES="0,1" if "2" in arguments else str(list(starts).index(name) % 2),
        )
        found = json.loads(plan.read_text()) if plan.exists() else {"launches": [], "left_out": []}
        return {
            "config": config,
            "arguments": [*SERVER, *arguments],
            "status": done.returncode,
            "said": [*done.stdout.splitlines(), *done.stderr.splitlines()][-8:],
            "seconds": round(seconds, 1),
            "left_out": found["left_out"],
            "ranks": {
                each["launch"].get("rank", "0"): [target["target"] for target in each["targets"]]
                for each in found["launches"]
            },
        }

    homes = [scratch / "home-0", scratch / "home-1"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        # Halves, so that each of two threads keeps to a home.
        halves = [list(starts)[half::2] for half in range(2)]

        def some(names: list[str]) -> None:
            for name in names:
                result["starts"][name] = one(name)
                checkpoint("model_targets", result)

        list(pool.map(some, halves))
    return result
