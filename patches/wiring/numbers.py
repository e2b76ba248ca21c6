"""Figures for the messages of patches, from the committed results of test/gpu."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "test" / "gpu" / "results"


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def run_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One server start of a result."""
    found: dict[str, Any] = next(each for each in results["runs"] if each["name"] == name)
    return found


def medians_of(patched: dict[str, Any], state: str, key: str) -> dict[str, float]:
    """The median of the rounds of a state, of either way."""
    return {
        delivery: statistics.median(
            run[key] for run in patched["runs"] if (run["delivery"], run["state"]) == (delivery, state)
        )
        for delivery in ("plugin", "patches")
    }


def patched_rounds(patched: dict[str, Any]) -> int:
    """How many rounds there were."""
    return sum((run["delivery"], run["state"]) == ("patches", "cold") for run in patched["runs"])


def host_of(results: dict[str, Any]) -> str:
    """Where a result was measured."""
    environment = results["environment"]
    gpus = environment["gpu"].removeprefix("NVIDIA ")
    return f"{environment['gpus']} {gpus}, {environment['cores']} cores, CUDA {environment['nvcc'].split('V')[-1]}"
