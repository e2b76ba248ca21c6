"""What it costs to find the targets of a first start without a GPU, and to import SGLang's JIT to build for it.

    .venv/bin/python test/ahead_of_ranks.py
    .venv-0.5.23/bin/python test/ahead_of_ranks.py

Puts the release into ahead_of_ranks.json beside it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.sglang.model_targets.ask import ranks_of

HERE = Path(__file__).parent
RESULT = Path(__file__).with_name("ahead_of_ranks.json")
ROUNDS = 3
# A configuration of `test/gpu`, how many layers, and arguments. 61 are DeepSeek-V3's own number.
MODELS = (("deepseek-v3-2layer", 61, ("--tp", "8")), ("deepseek-v4-4layer", 4, ()))
PREPARE = "from sglang_warmstart.libraries import sglang_jit_ahead; sglang_jit_ahead.prepare({})"
WHOLE = "import sglang.kernels.jit.utils.compile.loader"


def targets_of(config: str, layers: int, arguments: tuple[str, ...]) -> tuple[float, int]:
    """Seconds until the targets of a model are known, and how many there are."""
    with tempfile.TemporaryDirectory() as place:
        shapes = json.loads((HERE / "gpu" / f"{config}.json").read_text()) | {"num_hidden_layers": layers}
        Path(place, "config.json").write_text(json.dumps(shapes))
        begin = time.perf_counter()
        found = ranks_of(["--model-path", place, "--load-format", "dummy", *arguments], gpu_of("h200"))
        return round(time.perf_counter() - begin, 2), sum(len(each.targets) for each in found)


def seconds_of(code: str) -> float:
    """Seconds that a new process takes for this code, which imports no model."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    return round(time.perf_counter() - begin, 2)


def main() -> None:
    """Measure, and write."""
    release = importlib.metadata.version("sglang")
    result: dict[str, Any] = {"cores": os.cpu_count(), "targets": {}, "imports of the builder, s": {}}
    for config, layers, arguments in MODELS:
        rounds = [targets_of(config, layers, arguments) for _ in range(ROUNDS)]
        result["targets"][f"{config}, {layers} layers"] = {
            "targets": rounds[0][1],
            "median_s": statistics.median(seconds for seconds, _ in rounds),
            "raw_s": [seconds for seconds, _ in rounds],
        }
    result["memory_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    if LIBRARIES["sglang-jit"].is_installed:
        for name, code in (("with all of SGLang", WHOLE), ("as it does", PREPARE)):
            raw = [seconds_of(code) for _ in range(ROUNDS)]
            result["imports of the builder, s"][name] = {"median_s": statistics.median(raw), "raw_s": raw}
    written = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(written | {release: result}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
