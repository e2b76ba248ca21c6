"""Figures for the messages of patches, from the committed results of test/gpu."""

from __future__ import annotations

import json
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


def host_of(results: dict[str, Any]) -> str:
    """Where a result was measured."""
    environment = results["environment"]
    gpus = environment["gpu"].removeprefix("NVIDIA ")
    return f"{environment['gpus']} {gpus}, {environment['cores']} cores, CUDA {environment['nvcc'].split('V')[-1]}"
