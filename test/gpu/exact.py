"""The targets of a cache on a GPU: called for every M with a compiler that refuses to run, or compared bit for bit.

Run by measure.py in a process of its own; prints one JSON object.

    exact.py pipeline TARGETS CACHE KIND          have the service warm TARGETS in an empty CACHE by KIND of compiler
    exact.py sweep CACHE TARGETS TYPES            every M of TARGETS (-: of CACHE's markers) whose name matches TYPES
    exact.py outputs CACHE TARGETS                the results of every representative, with the kernels of CACHE
    exact.py fast TARGETS CACHE                   the fast list of Ms of TARGETS (without kernels), CACHE empty
    exact.py about                                what there is on this host
    exact.py hook CACHE                           what SGLang's wrapper costs per call, with its own hook and with ours
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from sglang_warmstart.deepgemm.marker import Marker, TargetKernels

TIMES = os.environ.get("WARMSTART_BENCH_TIMES", "1") != "0"
ROUNDS, CALLS = 7, 20
HOOK_ROUNDS, HOOK_CALLS = 31, 300  # the queue of launches has room for more


def targets_of(cache: Path) -> list[TargetKernels]:
    """Every target of every marker in a cache."""
    found = {}
    for path in cache.glob("warmstart/markers/*/*.json"):
        for each in msgspec.json.decode(path.read_bytes(), type=Marker).targets:
            found[each.target] = each
    return [found[target] for target in sorted(found)]


def pipeline(targets: Path, cache: Path, kind: str) -> dict[str, Any]:
    """Record and compile by the service alone, then load. Seconds of each, and kernels."""
    os.environ["DG_JIT_CACHE_DIR"] = str(cache)
    import torch
    from sglang_warmstart.deepgemm.identity import Gpu
    from sglang_warmstart.deepgemm.load import load
    from sglang_warmstart.node.client import ServiceClient
    from sglang_warmstart.node.launch import start_service
    from sglang_warmstart.node.protocol import Hello

    properties = torch.cuda.get_device_properties(0)
    gpu = Gpu(properties.name, properties.multi_processor_count, (properties.major, properties.minor), 0, "0")
    names = [name for name in os.environ if name.startswith(("DG_", "CUDA_")) or name == "PATH"]
    package = importlib.util.find_spec("deep_gemm")
    assert package is not None and package.submodule_search_locations
    hello = Hello(
        cache=str(cache),
        environment={name: os.environ[name] for name in names},
        deep_gemm=package.submodule_search_locations[0],
        gpu=gpu,
        launch={"bench": "pipeline"},
        kind=kind,  # type: ignore[arg-type]
    )
    client = ServiceClient(start_service(os.environ.get("WARMSTART_BENCH_LIBRARY")).socket)
    client.hello(hello)
    client.restore()
    time.sleep(6)  # as while weights are loaded: the service's forkserver imports torch
    wanted = [each.target for each in read(targets)]
    start = time.perf_counter()
    answer = client.warm(wanted, torch.cuda.mem_get_info()[0], 500)
    seconds = time.perf_counter() - start
    finished = [TargetKernels(each.target, each.kernels) for each in answer.targets]
    loaded = load(finished, lambda: torch.cuda.mem_get_info()[0])
    return {
        "kind": kind,
        "targets": len(finished),
        "kernels": len({use.directory for each in finished for use in each.kernels}),
        "compiled": answer.compiled,
        "errors": [each.error for each in answer.targets if each.error],
        "seconds": round(seconds, 2),
        "load_calls": loaded.calls,
        "load_s": round(loaded.seconds, 3),
    }


def read(targets: Path) -> list[TargetKernels]:
    """Targets with their representatives."""
    return msgspec.json.decode(targets.read_bytes(), type=list[TargetKernels])


def refusing_compiler(directory: Path) -> tuple[Path, Path]:
    """A compiler that knows its version and compiles nothing, and the log of what it was asked."""
    real, command, log = os.environ["WARMSTART_REAL_NVCC"], directory / "refuses", directory / "asked"
    version = subprocess.run([real, "--version"], capture_output=True, text=True, check=True).stdout
    (directory / "version").write_text(version)
    log.touch()
    command.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec cat {directory}/version\necho "$@" >> {log}\nexit 1\n')
    command.chmod(0o755)
    return command, log


def fast(targets: Path, cache: Path) -> dict[str, Any]:
    """What a rank of stock SGLang does with FAST_WARMUP, for chunks of 8192 tokens; each target's seconds."""
    os.environ.update(DG_JIT_CACHE_DIR=str(cache), DG_JIT_NVCC_COMPILER=os.environ["WARMSTART_REAL_NVCC"])
    import torch
    from sglang_warmstart.deepgemm import gemms
    from sglang_warmstart.deepgemm.target import Target
    from sglang_warmstart.sglang.m_list import fast_m_list

    ms = fast_m_list(8192)
    torch.empty(1, device="cuda")
    rows = []
    begin = time.perf_counter()
    for target in msgspec.json.decode(targets.read_bytes(), type=list[Target]):
        start = time.perf_counter()
        call = gemms.prepare(target, ms[-1], gemms.RealRoom())
        for m in ms:
            if m % target.m_alignment == 0:
                call(m)
        torch.cuda.synchronize()
        del call
        torch.cuda.empty_cache()
        rows.append({"target": str(target), "seconds": round(time.perf_counter() - start, 2)})
    entries = sum(path.is_dir() for path in (cache / "cache").iterdir())
    seconds = round(time.perf_counter() - begin, 2)
    return {"seconds": seconds, "kernels": entries, "targets": rows}


def about() -> dict[str, Any]:
    """Versions and hardware."""
    import deep_gemm
    import torch
    from sglang_warmstart.deepgemm.identity import distribution_of

    properties = torch.cuda.get_device_properties(0)
    said = subprocess.run([os.environ["WARMSTART_REAL_NVCC"], "--version"], capture_output=True, text=True, check=True)
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
        "deep_gemm": distribution_of(Path(deep_gemm.__file__).parent),
        "nvcc": next(line for line in said.stdout.splitlines() if "release" in line),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "host_cores": os.cpu_count(),
    }


def sweep(cache: Path, targets: Path, types: str) -> dict[str, Any]:
    """Call every M of targets with real kernels."""
    with tempfile.TemporaryDirectory() as directory:
        command, log = refusing_compiler(Path(directory))
        os.environ.update(DG_JIT_CACHE_DIR=str(cache), DG_JIT_NVCC_COMPILER=str(command))
        import torch
        from sglang_warmstart.deepgemm import gemms

        found = []
        wanted = targets_of(cache) if targets == Path("-") else read(targets)
        for each in wanted:
            if not re.search(types, str(each.target)):
                continue
            start = time.perf_counter()
            call = gemms.prepare(each.target, each.target.m_max, gemms.RealRoom())
            for m in each.target.m_values:
                call(m)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            del call
            torch.cuda.empty_cache()
            found.append(
                {
                    "target": str(each.target),
                    "kernels": len(each.kernels),
                    "calls": len(each.target.m_values),
                    "seconds": round(seconds, 3),
                }
            )
        return {"targets": found, "compiler_runs": len(log.read_text().splitlines())}


class RealOperands:
    """DeepGEMM, with random operands in place of those that it is given; the same ones for the same shapes."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._made: dict[Any, Any] = {}
        self.again: Callable[[], Any] = lambda: None
        self.outputs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if "gemm" not in name:
            return function

        def call(*args: Any, **kwargs: Any) -> None:
            real = tuple(self._real(argument, (name, i)) for i, argument in enumerate(args))
            self.outputs = [real[2], *([real[3]] if "prenorm" in name else [])]
            for output in self.outputs:
                output.zero_()
            self.again = lambda: function(*real, **kwargs)
            self.again()

        return call

    def _real(self, argument: Any, place: tuple[str, int]) -> Any:
        import torch

        if isinstance(argument, tuple):
            return tuple(self._real(each, (place[0], 10 * place[1] + i)) for i, each in enumerate(argument))
        if not isinstance(argument, torch.Tensor):
            return argument
        key = (place, tuple(argument.shape), argument.stride(), argument.dtype)
        if key not in self._made:
            self._made[key] = self._random(argument, place)
        return self._made[key]

    def _random(self, like: Any, place: tuple[str, int]) -> Any:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(place[1])
        size = sum((length - 1) * stride for length, stride in zip(like.shape, like.stride(), strict=True)) + 1
        if like.dtype == torch.int32:
            rows = torch.arange(size, device="cuda", dtype=torch.int32)
            # Rows of each group, or the group of each block of rows.
            flat = (rows * 37) % 128 + 1 if place[0].endswith("masked") else rows // 128 % 32
        elif like.dtype == torch.float8_e4m3fn:
            flat = torch.empty(size, device="cuda", dtype=like.dtype)
            for part in flat.split(1 << 27):
                part.copy_(torch.randn(part.numel(), device="cuda", generator=generator))
        else:
            flat = torch.rand(size, device="cuda", generator=generator).to(like.dtype)
        return flat.as_strided(like.shape, like.stride())


def outputs(cache: Path, targets: Path) -> dict[str, Any]:
    """A hash of the result of each representative, and how long its kernel runs."""
    os.environ.update(DG_JIT_CACHE_DIR=str(cache), DG_JIT_NVCC_COMPILER=os.environ["WARMSTART_REAL_NVCC"])
    import deep_gemm
    import torch
    from sglang_warmstart.deepgemm import gemms

    found = []
    for each in read(targets):
        deep_gemm.set_num_sms(each.target.num_sms)
        for use in each.kernels:
            library = RealOperands(deep_gemm)
            gemms.prepare(each.target, each.kernels[-1].m, gemms.ClaimedRoom(), library)(use.m)
            torch.cuda.synchronize()
            total = hashlib.sha256()
            for output in library.outputs:
                total.update(output.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            finite = all(bool(torch.isfinite(output).all()) for output in library.outputs)
            found.append(
                {
                    "target": str(each.target),
                    "m": use.m,
                    "kernel": use.directory,
                    "sha256": total.hexdigest(),
                    "finite": finite,
                    "us": round(microseconds(library.again), 2) if TIMES else None,
                }
            )
            del library
        torch.cuda.empty_cache()
    return {"outputs": found}


def microseconds(call: Callable[[], Any]) -> float:
    """Time of one kernel on the GPU, replayed from a graph so that no host time is in it: the median of rounds."""
    import torch

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / CALLS * 1000)
    return statistics.median(times) if times else math.nan


def hook(cache: Path) -> dict[str, Any]:
    """Host time of one small GEMM through SGLang's wrapper, by turns with SGLang's own hook and with ours."""
    os.environ.update(SGLANG_DG_CACHE_DIR=str(cache), DG_JIT_NVCC_COMPILER=os.environ["WARMSTART_REAL_NVCC"])
    import deep_gemm
    import sglang.srt.managers.scheduler  # noqa: F401  (as in a rank)
    import torch
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint
    from sglang_warmstart.sglang.exact_warmup.hooks import MAYBE_COMPILE
    from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup

    n, k = 2112, 7168
    lhs = torch.empty((4, k), device="cuda").to(torch.float8_e4m3fn), torch.ones((k // 128, 4), device="cuda").t()
    rhs = torch.empty((n, k), device="cuda").to(torch.float8_e4m3fn), torch.ones((17, k // 128), device="cuda")
    out = torch.empty((4, n), device="cuda", dtype=torch.bfloat16)
    kernel_type = compile_utils.DeepGemmKernelType.GEMM_NT_F8F8BF16
    compile_utils._INITIALIZATION_DICT[(kernel_type, n, k, 1)] = True
    exact = ExactWarmup(compile_utils)
    # As after a warm-up that has seen to this GEMM.
    exact._get_num_sms = deep_gemm.get_num_sms
    exact.ledger.done.add((kernel_type, n, k, 1, deep_gemm.get_num_sms()))
    hooks = {"sglang": getattr(compile_utils, MAYBE_COMPILE)}
    hooks["exact"] = exact.around(hooks["sglang"])
    rounds: dict[str, list[float]] = {name: [] for name in hooks}
    for _ in range(HOOK_ROUNDS):
        for name, function in hooks.items():
            setattr(compile_utils, MAYBE_COMPILE, function)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(HOOK_CALLS):
                entrypoint.gemm_nt_f8f8bf16(lhs, rhs, out)
            rounds[name].append(round((time.perf_counter() - begin) / HOOK_CALLS * 1e6, 3))
    medians = {name: statistics.median(each[1:]) for name, each in rounds.items()}
    return {"us_per_call": medians, "rounds_us": rounds}


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "pipeline":
        print(json.dumps(pipeline(Path(rest[0]), Path(rest[1]), rest[2])))
    elif name == "about":
        print(json.dumps(about()))
    elif name == "sweep":
        print(json.dumps(sweep(Path(rest[0]), Path(rest[1]), rest[2])))
    else:
        print(json.dumps({"outputs": outputs, "hook": hook, "fast": fast}[name](*map(Path, rest))))
