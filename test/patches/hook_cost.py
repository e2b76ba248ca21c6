"""What the last patch for SGLang 0.5.23 costs each wrapped GEMM call. Writes hook_cost.json beside it.

    .venv-0.5.23/bin/python test/patches/hook_cost.py

Compares SGLang's own `deep_gemm_execution_hook` with the patched one, for a group that is warm: what serving pays.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit import environment
from kit.release import sglang_directory

environment.isolate()
environment.in_process()

from making import module_of  # noqa: E402
from sglang_warmstart.cli import git_apply  # noqa: E402  after the environment
from sglang_warmstart.cli.patches import SHIPPED, patches_in  # noqa: E402

RESULT = Path(__file__).with_name("hook_cost.json")
WHERE = "srt/layers/deep_gemm_wrapper/compile_utils.py"
ROUNDS, CALLS = 301, 10_000


def calls(compile_utils: ModuleType) -> Callable[[], float]:
    """Nanoseconds of CPU time per call, each time it is called."""
    hook, kernel_type = compile_utils.deep_gemm_execution_hook, compile_utils.DeepGemmKernelType.GEMM_NT_F8F8BF16
    compile_utils._INITIALIZATION_DICT[(kernel_type, 2112, 7168, 1)] = True

    def measure() -> float:
        start = time.process_time_ns()
        for _ in range(CALLS):
            with hook(5, 2112, 7168, 1, kernel_type):
                pass
        return (time.process_time_ns() - start) / CALLS

    return measure


class Provider:
    """The least that a provider can do."""

    def warmup_group(self, kernel_type: Any, n: int, k: int, num_groups: int) -> bool:
        """It is warm."""
        return True


def processor() -> str:
    """The name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def measured() -> dict[str, object]:
    """Rounds of each in random order, so that what else runs disturbs all alike. Stock twice: that is the noise."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, "sglang")
        stock = sglang_directory()
        for name in (WHERE, "srt/model_executor/runner/base_runner.py"):
            (tree / name).parent.mkdir(parents=True)
            (tree / name).write_bytes((stock / name).read_bytes())
        git_apply.change(tree, patches_in(SHIPPED / "sglang-0.5.23"))
        modules = {
            "stock": module_of(stock / WHERE, "compile_utils_stock"),
            "stock, once more": module_of(stock / WHERE, "compile_utils_once_more"),
            "patched": module_of(tree / WHERE, "compile_utils_patched"),
            "patched, with a provider": module_of(tree / WHERE, "compile_utils_with_provider"),
        }
    modules["patched, with a provider"].set_gemm_warmup_provider(Provider())
    measures = {name: calls(module) for name, module in modules.items()}
    rounds = []
    for _ in range(ROUNDS):
        order = random.sample(list(measures), len(measures))
        rounds.append({name: measures[name]() for name in order})
    return {
        "what": f"ns of CPU time of a wrapped GEMM call's warm-up hook, a warm group; {ROUNDS} rounds of "
        f"{CALLS} calls each in random order; ratios are of the same round",
        "median_ns": {name: round(statistics.median(each[name] for each in rounds)) for name in measures},
        "quartiles_of_the_ratio_to_stock": {
            name: [round(q, 3) for q in statistics.quantiles((each[name] / each["stock"] for each in rounds), n=4)]
            for name in measures
            if name != "stock"
        },
        "machine": f"{processor()}, {os.cpu_count()} cores, no GPU, load {os.getloadavg()[0]:.0f}",
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    result = measured()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
