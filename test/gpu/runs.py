"""One start of a real SGLang server on a Hopper GPU: what is different about it, and what was seen."""

import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from kit.ports import free_ports
from kit.process import ServerProcess

HERE = Path(__file__).parent
INPUT_IDS = [5, 6, 7, 8]
# The flag has a longer name from 0.5.14 on. By the version: an import of SGLang would name its caches to this process,
# and all servers would share them.
RELEASE = tuple(int(re.findall(r"\d+", each)[0]) for each in importlib.metadata.version("sglang").split(".")[:3])
GRAPHS = "--cuda-graph-max-bs-decode" if RELEASE >= (0, 5, 14) else "--cuda-graph-max-bs"
SERVER = shlex.split(
    "--load-format dummy --skip-tokenizer-init --attention-backend triton --sampling-backend pytorch "
    f"--grammar-backend none --mem-fraction-static 0.6 --max-total-tokens 65536 {GRAPHS} 8 "
    "--chunked-prefill-size 4096"
)
START_LIMIT_S = 900.0
DECODE_TOKENS, DECODE_ROUNDS = 64, 3
# The service writes the plan every 3 s, and SGLang kills it when it ends.
PLAN_IS_WRITTEN_S = 4.0
COMPILERS = frozenset(
    ("nvcc", "cicc", "ptxas", "fatbinary", "cudafe++", "cc1plus", "g++", "c++", "as", "ld", "collect2", "ninja")
)


@dataclass
class Run:
    """One server start: what is different about it, and what was seen."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    home: Path
    cores: list[int] | None = None  # those that it may use, if not all
    early: bool = False  # by `sglang-warmstart run`
    prompts: Sequence[Sequence[int]] = ()  # asked for a token each, once it has answered
    ready_s: float | None = None
    tokens: list[int] | None = None
    answers_s: list[float] = field(default_factory=list)  # seconds that those took
    decode: Sequence[int] = ()  # batch sizes to measure
    decode_ms: dict[int, list[float]] = field(default_factory=dict)  # by batch size: ms for each token of a request
    used: dict[str, dict[str, float]] = field(default_factory=dict)  # until it was ready
    error: str | None = None
    log: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    compiles: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)  # the plugin's, with --enable-metrics


def compiler() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        sys.exit(f"measure: no nvcc in CUDA_HOME ({home}) or on the PATH: set CUDA_HOME")
    return found


def start(run: Run, model: Path, logs: Path, gpus: str, limit_s: float = START_LIMIT_S, ask: bool = True) -> Run:
    """Start the server, ask it for tokens, stop it, and collect what the probe and the compiler log wrote."""
    assert "sglang" not in sys.modules, "it would have named its caches to all servers"
    port, nccl_port = free_ports(2)
    probe = run.home / f"probe-{run.name}"
    probe.mkdir(parents=True)
    temporary = run.home / "tmp"
    temporary.mkdir(exist_ok=True)
    compile_log = probe / "compile.log"
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        # Every cache (DeepGEMM, Triton, FlashInfer, TVM) is below the home: a new one makes a cold start.
        "HOME": str(run.home),
        "TMPDIR": str(temporary),  # torch's Inductor has its cache there
        "CUDA_VISIBLE_DEVICES": gpus,
        "WARMSTART_PROBE_DIR": str(probe),
        "WARMSTART_COMPILE_LOG": str(compile_log),
        "WARMSTART_REAL_NVCC": compiler(),
        "DG_JIT_NVCC_COMPILER": str(HERE / "nvcc_log.sh"),
        **run.environment,
    }
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(model)]
    if run.early:
        command = [sys.executable, "-c", "from sglang_warmstart.cli import main; main()", "run", "--", *command]
    if run.cores is not None:
        command = ["taskset", "--cpu-list", ",".join(map(str, run.cores)), *command]
    command += [*SERVER, "--host", "127.0.0.1", "--port", str(port), "--nccl-port", str(nccl_port), *run.arguments]
    log_file = logs / f"{run.name}.log"
    server = ServerProcess(command, port, environment, log_file=log_file, start_limit_s=limit_s, request_limit_s=300)
    begin = time.time()
    watch = threading.Thread(target=watch_processes, args=(server, run, limit_s), daemon=True)
    watch.start()
    try:
        with server:
            run.ready_s = time.time() - begin
            run.tokens = server.generate(INPUT_IDS, 8) if ask else None
            for prompt in run.prompts:
                asked = time.perf_counter()
                server.generate(prompt, 1)
                run.answers_s.append(round(time.perf_counter() - asked, 3))
            for batch in run.decode:
                run.decode_ms[batch] = [decode_ms(server, batch) for _ in range(DECODE_ROUNDS)]
            if "--enable-metrics" in run.arguments:
                run.metrics = metrics_of(port)
            if ask:
                time.sleep(PLAN_IS_WRITTEN_S)
    except Exception as error:
        run.error = f"{type(error).__name__}: {error}".splitlines()[0]  # the rest is the log's end
    wait_for_service(run.home)
    run.log = log_file.read_text(errors="replace")
    for file in sorted(probe.glob("*.jsonl")):
        run.events += [json.loads(line) for line in file.read_text().splitlines()]
    if compile_log.exists():
        run.compiles = [json.loads(line) for line in compile_log.read_text().splitlines()]
    for each in [*run.events, *run.compiles]:
        for key in ("time", "start", "end"):
            if key in each:
                each[key] = round(each[key] - begin, 2)
    said = (f"ready in {run.ready_s} s", f"tokens {run.tokens}", f"prompts {run.answers_s} s" if run.prompts else "")
    print(f"  {run.name}: {', '.join(filter(None, said))} {run.error or ''}", flush=True)
    return run


def wait_for_service(home: Path, limit_s: float = 20.0) -> None:
    """Return when the service of a server has ended: it writes what it knows when the server is gone."""
    end = time.time() + limit_s
    while time.time() < end:
        lines = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        if not any("sglang_warmstart.node.service" in line and str(home) in line for line in lines):
            return
        time.sleep(0.2)


def watch_processes(server: ServerProcess, run: Run, limit_s: float) -> None:
    """Memory (the most at one time, MB) and processor time (s) of compilers, service and server until it is ready."""
    seconds: dict[int, tuple[str, float]] = {}
    begin = time.time()
    while run.ready_s is None and time.time() < begin + limit_s:
        time.sleep(0.5)
        memory: dict[str, float] = {}
        try:
            main = psutil.Process(server.process.pid)
            processes = [main, *main.children(recursive=True)]
        except (RuntimeError, psutil.NoSuchProcess):
            continue
        for process in processes:
            with contextlib.suppress(psutil.Error):
                kind = "compilers" if process.name() in COMPILERS else "server"
                if kind == "server" and any("sglang_warmstart" in each for each in process.cmdline()[1:4]):
                    kind = "service"
                memory[kind] = memory.get(kind, 0) + process.memory_info().rss / 1e6
                times = process.cpu_times()
                seconds[process.pid] = kind, times.user + times.system
        for kind, value in memory.items():
            of_kind = run.used.setdefault(kind, {"memory_mb": 0.0, "cpu_s": 0.0})
            of_kind["memory_mb"] = round(max(of_kind["memory_mb"], value))
        for kind, of_kind in run.used.items():
            of_kind["cpu_s"] = round(sum(cpu_s for each, cpu_s in seconds.values() if each == kind), 1)


def decode_ms(server: ServerProcess, batch: int) -> float:
    """Milliseconds for each further token, of `batch` requests at once, beyond what the first token takes."""

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(batch) as pool:
            for each in [pool.submit(server.generate, [300 + n, *INPUT_IDS], tokens) for n in range(batch)]:
                each.result()
        return time.perf_counter() - start

    seconds(DECODE_TOKENS)  # what is compiled or captured on first use
    first = seconds(1)
    return round((seconds(DECODE_TOKENS + 1) - first) / DECODE_TOKENS * 1000, 3)


def metrics_of(port: int) -> list[str]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    return [line for line in text.splitlines() if line.startswith("sglang_warmstart")]


def outcome(run: Run) -> dict[str, Any]:
    """How a start ended, and what the plugin itself logged."""
    return {
        "name": run.name,
        "ready_s": run.ready_s,
        "tokens": run.tokens,
        "error": run.error,
        "warmstart_log": [line.rstrip() for line in run.log.splitlines() if "] warmstart" in line],
    }


def by_rank(run: Run, event: str, keys: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Events of each rank, in the order of their time."""
    ranks = {each["pid"]: f"pp{each['pp_rank']} tp{each['tp_rank']}" for each in run.events if each["event"] == "rank"}
    found: dict[str, list[dict[str, Any]]] = {}
    for each in sorted(run.events, key=lambda each: each["time"]):
        if each["event"] == event:
            rank = ranks.get(each["pid"], f"pid {each['pid']}")
            found.setdefault(rank, []).append({key: each[key] for key in keys if key in each})
    return found


def kernels_of(name: str, scratch: Path) -> dict[str, str]:
    """A cache of DeepGEMM's of its own for one run; all other caches are those of its home."""
    return {"SGLANG_DG_CACHE_DIR": str(scratch / "deep_gemm" / name)}


def warmup_of(run: Run) -> dict[str, Any]:
    """A start-up: seconds to ready, and those in DeepGEMM's warm-up; kernels compiled, and the compilers' CPU time."""
    warmups = [each for each in run.events if each["event"] == "warmup"]
    exact = re.search(
        r"exact warm-up: (\d+) targets .*?: dry forwards ([\d.]+) s, wait ([\d.]+) s, load ([\d.]+) s", run.log
    )
    calls = sum(int(each) for each in re.findall(r"targets loaded: (\d+) kernels", run.log))
    compiles = [each for each in run.compiles if each["status"] == 0]
    # The stub is the first thing that the service compiles, before any target.
    result = {
        **outcome(run),
        "targets": int(exact[1]) if exact else len({each["target"] for each in warmups}),
        "calls": calls if exact else sum(each["calls"] for each in warmups),
        "warmup_s": round(
            sum(map(float, exact.groups()[1:])) if exact else sum(each["time"] - each["start"] for each in warmups), 3
        ),
        "compiler_runs": len(compiles),
        "compile_cpu_s": round(sum(each["cpu_s"] for each in compiles), 2),
        "compile_first_to_last_s": round(
            max((each["end"] for each in compiles), default=0) - min((each["start"] for each in compiles), default=0), 2
        ),
        "lazy_warmups": [{"target": each["target"], "start": each["start"], "time": each["time"]} for each in warmups],
        "compiles": [[each["start"], each["end"], each["cpu_s"]] for each in compiles],
    }
    if exact:
        result |= {"dry_s": float(exact[2]), "wait_s": float(exact[3]), "load_s": float(exact[4])}
    shown = ("targets", "calls", "warmup_s", "compiler_runs", "compile_cpu_s", "dry_s", "wait_s", "load_s", "ready_s")
    print(f"  {run.name}: { {key: result[key] for key in shown if key in result} }", flush=True)
    return result


def helper(*arguments: object, **settings: str) -> dict[str, Any]:
    """Run exact.py in a process of its own."""
    environment = {**os.environ, "WARMSTART_REAL_NVCC": compiler(), "CUDA_VISIBLE_DEVICES": "0", **settings}
    command = [sys.executable, "-W", "ignore", str(HERE / "exact.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return {"error": f"exact.py {arguments[0]} ended with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {key: value for key, value in result.items() if not isinstance(value, list)}
    print(f"  {arguments[0]}: {shown}", flush=True)
    return result


def checkpoint(name: str, result: dict[str, Any]) -> None:
    """Write what there is of a result, so that a case that is cut off leaves something."""
    path = Path(os.environ["WARMSTART_RESULTS"], f"{name}.json")
    path.write_text(json.dumps({"case": name, "environment": environment(), **result}, indent=1) + "\n")


def environment() -> dict[str, Any]:
    versions = {}
    for name in (
        "sglang-warmstart",
        "sglang",
        "sgl-deep-gemm",
        "sglang-kernel",
        "flashinfer-python",
        "torch",
        "triton",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    said = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "nvcc": next((line.strip() for line in said.splitlines() if "release" in line), said),
        "versions": versions,
    }
