"""Measures the plugin on a real SGLang server on Hopper GPUs. Started by run.sh, which explains itself."""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from bundles import bundle, elsewhere, record
from model_targets import model_targets
from monitoring import monitor, start_up
from release_starts import release_starts
from runs import HERE, Run, by_rank, checkpoint, helper, kernels_of, outcome, start, warmup_of


def prenorm(_model: Path, scratch: Path, _logs: Path) -> dict[str, Any]:
    """The hc_prenorm wrapper against the direct call."""
    environment = {**os.environ, "HOME": str(scratch / "prenorm"), "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "prenorm.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"prenorm.py ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for each in result["comparisons"]:
        print("  ", each, flush=True)
    for each in result["cost"]:
        print("  ", {key: value for key, value in each.items() if key != "rounds_us"}, flush=True)
    return result


def serve(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """The plugin loads in the main and the scheduler process, the server answers; switched off it starts as before."""
    home = scratch / "serve"
    # Kernels compile on first use here: what is shown is that the server starts and answers.
    quick = {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
    runs = [
        start(Run("serve-on", [], quick, home), model, logs, "0"),
        start(Run("serve-flag", ["--disable-attn-tp-gather"], quick, home), model, logs, "0"),
        start(Run("serve-off", [], {**quick, "SGLANG_WARMSTART": "0"}, home), model, logs, "0"),
    ]
    return {
        "runs": [
            {
                **outcome(run),
                "flag_logged": "disable_attn_tp_gather=True" in run.log,
            }
            for run in runs
        ],
        "same_tokens": len({str(run.tokens) for run in runs}) == 1 and runs[0].tokens is not None,
    }


def gather(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Batch sizes and token counts of CUDA graphs, with and without the flag, where a gathered buffer is required.

    This model needs the gather: with the flag, its capture of a single token waits in a collective, and is ended.
    """
    arguments = ["--tp", "2", "--moe-dense-tp-size", "1", "--skip-server-warmup", "--disable-piecewise-cuda-graph"]
    # Sizes are decided before any kernel: Triton's GEMMs are there sooner than DeepGEMM's.
    triton = {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}
    runs = [
        start(Run(name, [*arguments, *flag], triton, scratch / "gather"), model, logs, "0,1", limit_s=90, ask=False)
        for name, flag in (("gather-stock", []), ("gather-flag", ["--disable-attn-tp-gather"]))
    ]
    return {
        "runs": [
            {
                **outcome(run),
                "flag_logged": "disable_attn_tp_gather=True" in run.log,
                "planned": by_rank(run, "planned", ("batch_sizes",)),
                "captured": by_rank(run, "capture", ("batch_size", "num_tokens", "gathered_buffer")),
            }
            for run in runs
        ]
    }


def compiles_by_rank(run: Run) -> dict[str, Any]:
    """Compiler runs of each rank: how many, the seconds they took, and when."""
    ranks = {each["pid"]: f"pp{each['pp_rank']} tp{each['tp_rank']}" for each in run.events if each["event"] == "rank"}
    found: dict[str, list[tuple[float, float]]] = {}
    for each in run.compiles:
        rank = next((ranks[pid] for pid in each["parents"] if pid in ranks), "another process")
        found.setdefault(rank, []).append((each["start"], each["end"]))
    return {
        rank: {
            "kernels": len(times),
            "compile_s": round(sum(end - start for start, end in times), 2),
            "first_start": min(start for start, _ in times),
            "last_end": max(end for _, end in times),
            "intervals": sorted(times),
        }
        for rank, times in found.items()
    }


def pp(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Two pipeline stages, cold, without and with the switch: seconds to ready, and what each rank compiled when.

    The two servers start at the same moment, side by side on the same GPUs: a start-up waits for compilers, each of
    which has a core of its own.
    """
    fast = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
    arguments = ["--pp-size", "2", "--chunked-prefill-size", "1024", "--max-running-requests", "256"]
    stock = Run("pp-stock", arguments, {**fast, "SGLANG_WARMSTART": "0"}, scratch / "pp-stock")
    switch = Run("pp-switch", arguments, {**fast, "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1"}, scratch / "pp-switch")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda run: start(run, model, logs, "0,1"), (stock, switch)))
    return {
        "runs": [
            {
                **outcome(run),
                "compiles": compiles_by_rank(run),
                "warmups": by_rank(run, "warmup", ("target", "calls", "start", "time")),
                "dummy_runs": by_rank(run, "dummy_run", ("batch_size", "mode", "start", "time")),
                "kernel_warmup": by_rank(run, "kernel_warmup", ("start", "time")),
                "captures": by_rank(run, "capture", ("batch_size", "num_tokens", "time")),
            }
            for run in runs
        ]
    }


FAST_STOCK = {"SGLANG_WARMSTART": "0", "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}


def exact(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Exact warm-up beside stock SGLang with the full and the fast list, and what its kernels compute.

    Three servers start at the same moment with every cache cold: two of stock SGLang, which go on for minutes, each
    with one compiler at a time, and one with exact warm-up. When that is ready, it starts again with DeepGEMM's cache
    alone cold, and with nothing cold; then the service alone warms the recorded targets of every kernel type.
    Meanwhile DeepGEMM itself compiles the kernels that are compared at the end, one after another.
    """
    caches, targets = scratch / "deep_gemm", scratch / "targets.json"
    targets.write_bytes(msgspec.json.encode(recorded_targets()))
    home, memory = scratch / "exact", GpuMemory()
    result: dict[str, Any] = {"runs": []}
    stock = [
        Run("stock-full", [], {"SGLANG_WARMSTART": "0", **kernels_of("stock-full", scratch)}, scratch / "stock-full"),
        Run("stock-fast", [], {**FAST_STOCK, **kernels_of("stock-fast", scratch)}, scratch / "stock-fast"),
    ]

    def add(name: str, value: Any) -> None:
        result[name] = value
        checkpoint("exact", result)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = [pool.submit(start, run, model, logs, "0") for run in stock]
        by_deep_gemm = pool.submit(helper, "outputs", caches / "by-deep-gemm", targets)
        with memory:
            runs = [start(Run("exact-all-cold", [], kernels_of("exact-all", scratch), home), model, logs, "0")]
        add("gpu_memory", memory.seen)
        for name in ("exact-cold", "exact-warm"):
            runs.append(start(Run(name, [], kernels_of("exact", scratch), home), model, logs, "0"))
            add("runs", [warmup_of(run) for run in runs])
        add("pipeline", pipeline(targets, caches / "types", scratch))
        by_exact = helper("outputs", caches / "types", targets)
        add("hook", helper("hook", caches / "types"))
        add("sweep", helper("sweep", caches / "types", targets, SWEPT))
        for key, value in compared([by_exact, by_deep_gemm.result()]).items():
            add(key, value)
        # The quicker one first: should time run out, its result is there.
        for each in reversed(slow):
            runs.append(each.result())
            add("runs", [warmup_of(run) for run in runs])
    return result


# Those that the server does not call. A sweep of its own targets takes the GPU two minutes: see `restart`.
SWEPT = "GROUPED|BF16BF16F32|PRENORM"


def restart(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Exact warm-up alone, cold and after a restart; then every M of every target of the server."""
    home = scratch / "restart"
    runs = [start(Run(name, [], {}, home), model, logs, "0") for name in ("restart-cold", "restart-warm")]
    return {
        "runs": [warmup_of(run) for run in runs],
        "sweep": helper("sweep", home / ".cache" / "deep_gemm", "-", ""),
    }


def nvrtc(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """NVRTC as the compiler: start-up, and each kernel's result and time on the GPU beside nvcc's."""
    setting = {"SGLANG_WARMSTART_COMPILER": "nvrtc", **kernels_of("nvrtc", scratch)}
    caches, targets = scratch / "deep_gemm", scratch / "targets.json"
    targets.write_bytes(msgspec.json.encode(recorded_targets()))
    run = start(Run("nvrtc-cold", [], setting, scratch / "nvrtc"), model, logs, "0")
    first = pipeline(targets, caches / "nvcc-types", scratch)
    second = pipeline(targets, caches / "nvrtc-types", scratch, kind="nvrtc")
    both = (caches / "nvcc-types", caches / "nvrtc-types")
    # By turns, so that what the GPU does in the meantime shows.
    results = [helper("outputs", cache, targets) for _ in range(2) for cache in both]
    return {"runs": [warmup_of(run)], "nvcc": first, "nvrtc": second, **compared(results)}


PATCHED_ROUNDS = 3


def patched(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """The plugin on SGLang as released, and a patched SGLang with no plugin: cold, and after a restart.

    The two start at the same moment, each on its half of the cores, and on a GPU of its own where there are two; they
    change places from round to round. A first start of each makes every other cache warm (some have the path of SGLang
    in their keys), so that what is cold then is DeepGEMM's alone.
    """
    places = {"plugin": os.environ["PYTHONPATH"], "patches": patched_path(scratch / "patched-sglang")}
    cores = sorted(os.sched_getaffinity(0))
    halves = [(0, cores[: len(cores) // 2]), (torch.cuda.device_count() - 1, cores[len(cores) // 2 :])]
    result = dict[str, Any](runs=[])
    for number, state in [
        (0, "first"),
        *((n, state) for n in range(1, PATCHED_ROUNDS + 1) for state in ("cold", "warm")),
    ]:
        if state == "cold":
            halves.reverse()

        def start_one(name: str, half: tuple[int, list[int]], number: int = number, state: str = state) -> Run:
            gpu, own = half
            # The package is in both; the plugin is loaded on SGLang as released only.
            plugins = {} if name == "plugin" else {"SGLANG_PLUGINS": "none"}
            environment = {"PYTHONPATH": places[name], **plugins, **kernels_of(f"{name}-{number}", scratch)}
            run = Run(f"{name}-{state}-{number}", [], environment, scratch / f"home-{name}", cores=own)
            return start(run, model, logs, str(gpu))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for name, run in zip(places, pool.map(start_one, places, halves), strict=True):
                result["runs"].append(
                    {**warmup_of(run), "delivery": name, "state": state, "cores": len(run.cores or ())}
                )
        checkpoint("patched", result)
    return result


def patched_path(directory: Path) -> str:
    """A PYTHONPATH with a patched copy of SGLang, and the package, which the last patch calls."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    pristine = Path(spec.origin).parent
    shutil.copytree(pristine, directory / "sglang", ignore=shutil.ignore_patterns("__pycache__"))
    for each in pristine.parent.glob("sglang-*.dist-info"):
        shutil.copytree(each, directory / each.name)
    # As `sglang-warmstart patches apply` does, whose command line needs packages that a GPU host may lack.
    series = sorted((HERE.parents[1] / "patches" / "sglang-0.5.12").glob("*.patch"))
    subprocess.run(["git", "apply", *series], cwd=directory, env={**os.environ, "GIT_DIR": os.devnull}, check=True)
    return os.pathsep.join([str(directory), os.environ["PYTHONPATH"]])


def recorded_targets() -> list[dict[str, Any]]:
    """Targets of every kernel type, with their representatives on a GPU of 132 SMs."""
    recorded: dict[str, Any] = json.loads((HERE.parent / "deepgemm" / "recorded.json").read_text())
    targets: list[dict[str, Any]] = recorded["targets"]
    return targets


def pipeline(targets: Path, cache: Path, scratch: Path, kind: str = "nvcc") -> dict[str, Any]:
    """Have the service warm targets in an empty cache. This host does nothing else for it."""
    log = scratch / f"pipeline-{kind}.log"
    settings = {"WARMSTART_COMPILE_LOG": str(log), "DG_JIT_NVCC_COMPILER": str(HERE / "nvcc_log.sh")}
    result = helper("pipeline", targets, cache, kind, **settings)
    compiles = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result["compile_cpu_s"] = round(sum(each["cpu_s"] for each in compiles), 2)
    result["cpu_s_by_cores"] = round(result["compile_cpu_s"] / (os.cpu_count() or 1), 2)
    print(f"  pipeline: { {key: value for key, value in result.items() if not isinstance(value, list)} }", flush=True)
    return result


class GpuMemory:
    """The memory of the GPU that each process takes, looked at several times a second."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stop.wait(0.1):
            processes = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(device)}
            helpers = [used >> 20 for pid, used in processes.items() if used and is_recorder(pid)]
            self._keep("helpers", len(helpers))
            self._keep("largest_helper_mib", max(helpers, default=0))
            self._keep("all_helpers_mib", sum(helpers))
            self._keep("gpu_used_mib", pynvml.nvmlDeviceGetMemoryInfo(device).used >> 20)

    def _keep(self, name: str, value: int) -> None:
        self.seen[name] = max(self.seen.get(name, 0), value)


def is_recorder(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def compared(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of representatives with the kernels of two caches that took turns, and the time of each."""
    rows = []
    for each in zip(*(result.get("outputs", []) for result in results), strict=True):
        rows.append(
            {
                "target": each[0]["target"],
                "m": each[0]["m"],
                "equal": len({one["sha256"] for one in each}) == 1,
                "finite": each[0]["finite"],
                "us": min(one["us"] for one in each[::2]),
                "other_us": min(one["us"] for one in each[1::2]),
            }
        )
    ratios = [row["other_us"] / row["us"] for row in rows]
    summary = {
        "kernels": len(rows),
        "equal": sum(row["equal"] for row in rows),
        "finite": sum(row["finite"] for row in rows),
        "slowest_ratio": round(max(ratios, default=0), 3),
        "slower_than_2_percent": sum(ratio > 1.02 for ratio in ratios),
    }
    print(f"  compared: {summary}", flush=True)
    return {"compared": summary, "kernels": rows}


CASES: dict[str, tuple[Callable[[Path, Path, Path], dict[str, Any]], int]] = {
    "prenorm": (prenorm, 1),
    "exact": (exact, 1),
    "restart": (restart, 1),
    "patched": (patched, 1),
    "nvrtc": (nvrtc, 1),
    "serve": (serve, 1),
    "gather": (gather, 2),
    "pp": (pp, 2),
    "record": (record, 1),
    "bundle": (bundle, 1),
    "bundle_elsewhere": (elsewhere, 1),
    "start_up": (start_up, 1),
    "monitor": (monitor, 1),
    "model_targets": (model_targets, 2),
    "release_starts": (release_starts, 1),
}

# What needs something from elsewhere is measured if it is named.
BY_NAME = {"bundle", "bundle_elsewhere"}


@contextlib.contextmanager
def model_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(HERE / "deepseek-v3-2layer.json", Path(directory, "config.json"))
        yield Path(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where results go (default: %(default)s)")
    parser.add_argument(
        "--logs", type=Path, help="where the servers' logs go (default: beside the caches, thrown away)"
    )
    parser.add_argument("--scratch", type=Path, help="where caches go, kept for another call (default: thrown away)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {' '.join(CASES)}")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}: choose of {', '.join(CASES)}")
    count = torch.cuda.device_count()
    if count == 0 or torch.cuda.get_device_capability(0)[0] < 9:
        print("measure: no Hopper or newer GPU here: nothing measured", file=sys.stderr)
        return 1
    wanted = options.cases or [name for name, (_, gpus) in CASES.items() if gpus <= count and name not in BY_NAME]
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["WARMSTART_RESULTS"] = str(options.out)
    failed = False
    with model_directory() as model, tempfile.TemporaryDirectory() as thrown_away:
        scratch = options.scratch or Path(thrown_away)
        logs = options.logs or Path(thrown_away, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            case, gpus = CASES[name]
            print(f"{name}: {case.__doc__}", flush=True)
            if gpus > count:
                print(f"  skipped: needs {gpus} GPUs, {count} here", flush=True)
                continue
            try:
                result = case(model, scratch, logs)
            except RuntimeError as error:
                failed = True
                print(f"  failed: {error}", file=sys.stderr, flush=True)
                continue
            name = result.pop("name", name)
            checkpoint(name, result)
            print(f"  -> {options.out / name}.json", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
