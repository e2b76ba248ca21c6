"""What a start-up goes to, and what is said of a kernel that is missed, on a GPU host.

As a program, run by measure.py in a process of its own, it prints what the monitor costs per call as one JSON object.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from runs import HERE, Run, checkpoint, compiler, kernels_of, outcome, start
from sglang_warmstart.deepgemm.marker import Marker

# Stock SGLang, watched.
WATCHED = {"SGLANG_WARMSTART_ONLY": "jit-monitor,start-up-events"}
# The up-projection of MLA's compressed keys and values. SGLang has piecewise CUDA graphs for prefills of up to 2048
# tokens, in which it is not called: what calls it is a longer prompt, and stock SGLang meets it then.
MISSED = (32768, 512)
LONG_PROMPT = range(100, 3100)
COST_ROUNDS, COST_CALLS, COST_UNTIMED_CALLS = 301, 300, 100
COST_MODES = ("off", "warn", "error")


def start_up(model: Path, scratch: Path, logs: Path) -> dict[str, Any]:
    """Three starts and their events: stock SGLang with every cache cold, exact warm-up likewise, and once more.

    The stock one goes on beside the others, with one compiler at a time. Then a target is removed from the marker, and
    its kernels from the cache: a request meets it, in the monitor's two modes. Every server is asked a short
    prompt and two long ones.
    """
    home = scratch / "start-up"
    result: dict[str, Any] = {"runs": []}

    def begin(name: str, cache: str, home: Path, *arguments: str, **environment: str) -> Run:
        prompts = LONG_PROMPT, LONG_PROMPT[::-1]  # nothing of the first is cached for the second
        run = Run(name, [*arguments], {**kernels_of(cache, scratch), **environment}, home, prompts=prompts)
        start(run, model, logs, "0")
        kept = keep_events(scratch / "deep_gemm" / cache, name)
        said = [line.rstrip() for line in run.log.splitlines() if "JIT while serving" in line]
        result["runs"].append(
            {
                **outcome(run),
                "long_prompts_s": run.answers_s,
                "events": kept,
                "jit_while_serving": said,
                "metrics": run.metrics,
            }
        )
        checkpoint("start_up", result)
        return run

    with concurrent.futures.ThreadPoolExecutor() as pool:
        stock = pool.submit(begin, "stock", "stock", scratch / "start-up-stock", **WATCHED)
        begin("exact", "exact", home)
        begin("warm", "exact", home)
        for mode in ("warn", "error"):
            result[f"removed_{mode}"] = remove_target(scratch / "deep_gemm" / "exact")
            # Its own warm-up would meet the target, before it is ready.
            arguments = "--skip-server-warmup", "--enable-metrics"
            begin(f"miss-{mode}", "exact", home, *arguments, SGLANG_WARMSTART_JIT_MONITOR=mode)
        stock.result()
    return result


def keep_events(cache: Path, name: str) -> int:
    """Copy the events of the newest run on a cache beside the results. Returns how many there are."""
    runs = sorted((cache / "warmstart" / "events").iterdir())
    kept = Path(os.environ["WARMSTART_RESULTS"], "start_up", name)
    shutil.copytree(runs[-1], kept, dirs_exist_ok=True)
    return sum(len(path.read_bytes().splitlines()) - 1 for path in kept.glob("*.jsonl"))


def remove_target(cache: Path) -> dict[str, Any]:
    """Have a cache and its markers know nothing of a target."""
    removed: set[str] = set()
    for path in cache.glob("warmstart/markers/*/*.json"):
        marker = msgspec.json.decode(path.read_bytes(), type=Marker)
        left = tuple(each for each in marker.targets if (each.target.n, each.target.k) != MISSED)
        needed = {use.directory for each in left for use in each.kernels}
        removed |= {file.directory for file in marker.files} - needed
        files = tuple(file for file in marker.files if file.directory in needed)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(marker, targets=left, files=files)))
    for directory in removed:
        shutil.rmtree(cache / "cache" / directory)
    return {"n": MISSED[0], "k": MISSED[1], "kernels": len(removed)}


def monitor(_model: Path, scratch: Path, _logs: Path) -> dict[str, Any]:
    """Host time of calls that compile nothing, by turns with no monitor and in both of its modes."""
    environment = {
        **os.environ,
        "HOME": str(scratch / "cost"),
        "CUDA_VISIBLE_DEVICES": "0",
        "SGLANG_DG_CACHE_DIR": str(scratch / "cost" / "deep_gemm"),
        "SGLANG_WARMSTART_EVENTS": str(scratch / "cost" / "events"),
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        "DG_JIT_NVCC_COMPILER": compiler(),
        "SGLANG_WARMSTART": "0",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "monitoring.py")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"monitoring.py ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print("  ", found["us_per_call"], "more than off:", found["us_more_than_off"], flush=True)
    return found


def cost() -> dict[str, Any]:
    """Microseconds per call of a GEMM through SGLang's wrapper, and of a kernel of Triton's."""
    import sglang
    import sglang.srt.managers.scheduler  # as in a rank
    import torch
    import triton
    import triton.language as tl
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint
    from sglang_warmstart.base.events import open_log
    from sglang_warmstart.libraries.monitor import JitMonitor
    from sglang_warmstart.plugin import Plugin, declare_switches
    from sglang_warmstart.sglang.announce import Announcer
    from sglang_warmstart.sglang.jit_monitor import JIT_MONITORING

    @triton.jit
    def add_one(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < size) + 1, mask=at < size)

    n, k = 2112, 7168
    lhs = torch.empty((4, k), device="cuda").to(torch.float8_e4m3fn), torch.ones((k // 128, 4), device="cuda").t()
    rhs = torch.empty((n, k), device="cuda").to(torch.float8_e4m3fn), torch.ones((17, k // 128), device="cuda")
    out = torch.empty((4, n), device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(1024, device="cuda")
    compile_utils._INITIALIZATION_DICT[(compile_utils.DeepGemmKernelType.GEMM_NT_F8F8BF16, n, k, 1)] = True
    calls = {
        "deep_gemm": lambda: entrypoint.gemm_nt_f8f8bf16(lhs, rhs, out),
        "triton": lambda: add_one[(1,)](x, x, 1024, BLOCK=1024),
    }
    declare_switches()
    settings = SimpleNamespace(chunked_prefill_size=4096, base_gpu_id=0, node_rank=0)
    log = open_log("rank", os.environ)
    assert log is not None
    rounds: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    for turn in range(COST_ROUNDS):
        for mode in (*COST_MODES[turn % 3 :], *COST_MODES[: turn % 3]):  # none is always the first
            os.environ["SGLANG_WARMSTART_JIT_MONITOR"] = mode
            plugin = Plugin([JIT_MONITORING], Announcer())
            plugin.install(Path(sglang.__path__[0]))
            # Here a rank stands before DeepGEMM's compiler. Which one that is, DeepGEMM asks once.
            entrypoint.update_deep_gemm_config(0, settings)
            log.listeners[:] = [] if mode == "off" else [JitMonitor(mode)]  # type: ignore[arg-type]
            log.ready_file.touch()
            for name, call in calls.items():
                # What was started just now, such as the watch's thread, comes to rest.
                for _ in range(COST_UNTIMED_CALLS):
                    call()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(COST_CALLS):
                    call()
                rounds[name].setdefault(mode, []).append(round((time.perf_counter() - begin) / COST_CALLS * 1e6, 3))
            for installation in plugin.installations:
                installation.hooks.undo()
            log.ready_file.unlink()
            log._ready = False
    median: dict[str, dict[str, float]] = {}
    more: dict[str, dict[str, float]] = {}
    for name, by_mode in rounds.items():
        off, *others = [by_mode[mode][1:] for mode in COST_MODES]  # the first round compiles
        median[name] = {mode: statistics.median(by_mode[mode][1:]) for mode in COST_MODES}
        more[name] = {
            mode: round(statistics.median([here - there for here, there in zip(other, off, strict=True)]), 3)
            for mode, other in zip(COST_MODES[1:], others, strict=True)
        }
    return {"us_per_call": median, "us_more_than_off": more, "rounds_us": rounds}


if __name__ == "__main__":
    print(json.dumps(cost()))
