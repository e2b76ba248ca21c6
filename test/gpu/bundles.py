"""Bundles on a GPU host: a plan is recorded here, compiled on a machine without GPU, and comes back as a bundle."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runs import SERVER, Run, checkpoint, compiler, kernels_of, start, warmup_of

# The bundle that was compiled elsewhere from the plan of the case `record`.
BUNDLE = "WARMSTART_GPU_BUNDLE"
ROUNDS = 3


def command(*arguments: object, **environment: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run `sglang-warmstart`. Returns the seconds, and what it said."""
    line = [sys.executable, "-W", "ignore", "-c", "from sglang_warmstart.cli import main; main()"]
    begin = time.monotonic()
    done = subprocess.run(
        [*line, *map(str, arguments)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    seconds = time.monotonic() - begin
    print(f"  {arguments[:2]}: status {done.returncode}, {seconds:.2f} s {done.stderr[-2000:]}", flush=True)
    return seconds, done


def record(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Record the plan of the server. Its plan goes beside the results."""
    plan = Path(os.environ["WARMSTART_RESULTS"], "plan.json")
    log = scratch / "record-compiles.log"
    seconds, done = command(
        *("record", "-o", plan, "--log", logs / "record.log", "--model-path", model, *SERVER),
        HOME=str(scratch / "record"),
        CUDA_VISIBLE_DEVICES="0",
        WARMSTART_COMPILE_LOG=str(log),
        WARMSTART_REAL_NVCC=compiler(),
        DG_JIT_NVCC_COMPILER=str(Path(__file__).parent / "nvcc_log.sh"),
        PYTHONUNBUFFERED="1",
    )
    result: dict[str, Any] = {"seconds": round(seconds, 1), "status": done.returncode, "said": done.stdout.strip()}
    # The stub is one of them.
    result["compiler_runs"] = len(log.read_text().splitlines()) if log.exists() else 0
    if plan.exists():
        found = json.loads(plan.read_text())
        result |= {
            "bytes": plan.stat().st_size,
            "kernels": len(found["kernels"]),
            "targets": [len(launch["targets"]) for launch in found["launches"]],
            "left_out": found["left_out"],
        }
    return result


def bundle(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Starts of the server: with nothing, with a bundle that was compiled elsewhere, with a warm cache.

    A first start has every cache cold; a bundle of all that it has left is made, and the last start has nothing but
    that. Between them DeepGEMM's cache alone is cold, or restored, or warm, by turns.
    """
    path = Path(os.environ[BUNDLE])
    home = scratch / "bundle-home"
    result: dict[str, Any] = {"runs": [], "bundle_bytes": path.stat().st_size}

    def begin(name: str, cache: str, state: str, **environment: str) -> None:
        run = Run(name, [], {**kernels_of(cache, scratch), **environment}, home)
        seen = warmup_of(start(run, model, logs, "0"))
        said = [line.split("warmstart bundle: ")[1] for line in run.log.splitlines() if "warmstart bundle: " in line]
        result["runs"].append({**seen, "state": state, "bundle_said": said})
        checkpoint("bundle", result)

    begin("all-cold", "all", "all cold")
    full = scratch / "full.tar.zst"
    own = kernels_of("all", scratch)
    result["pack_full"] = packed(full, {**own, "HOME": str(home)}, "--include", "all")
    shutil.copy(full, os.environ["WARMSTART_RESULTS"])  # for bundle_files.py
    # All that is left is what the bundle has, under the same home: that is in the keys of other libraries.
    home.rename(scratch / "bundle-home-before")
    begin("all-restored", "all-restored", "all restored", SGLANG_WARMSTART_BUNDLE=str(full))
    for number in range(1, ROUNDS + 1):
        begin(f"cold-{number}", f"cold-{number}", "cold")
        begin(f"bundle-{number}", f"bundle-{number}", "bundle", SGLANG_WARMSTART_BUNDLE=str(path))
        begin(f"warm-{number}", f"cold-{number}", "warm")
    return result


def elsewhere(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """On another machine than `bundle`: a first start from the bundle that was packed there, with its caches, and one
    with half of that bundle.

    The scratch directory has to be the same as there: paths of caches are in the keys of other libraries.
    """
    path, home = Path(os.environ[BUNDLE]), scratch / "bundle-home"
    half = scratch / "half.tar.zst"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result: dict[str, Any] = {"runs": [], "bundle_bytes": path.stat().st_size}
    for name, bundle_path in (("restored", path), ("damaged", half)):
        environment = {**kernels_of(name, scratch), "SGLANG_WARMSTART_BUNDLE": str(bundle_path)}
        run = start(Run(f"elsewhere-{name}", [], environment, home), model, logs, "0")
        said = [line.split("warmstart bundle: ")[1] for line in run.log.splitlines() if "warmstart bundle: " in line]
        result["runs"].append({**warmup_of(run), "state": name, "bundle_said": said})
        checkpoint("bundle_elsewhere", result)
    return result


def packed(path: Path, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Pack a cache."""
    seconds, done = command("bundle", "pack", "-o", path, "--json", *arguments, **environment)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"bundle pack: {done.stderr}")
    said = json.loads(done.stdout)
    caches = {each["library"]: {"files": each["files"], "bytes": each["bytes"]} for each in said["caches"]}
    return {"seconds": round(seconds, 2), "bytes": path.stat().st_size, "caches": caches, "kernels": said["kernels"]}
