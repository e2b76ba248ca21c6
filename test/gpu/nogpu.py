"""The kernels of a few targets, recorded on the GPU and without it, with the DeepGEMM that is installed.

    nogpu.py gpu|nogpu TARGETS KERNELS      record TARGETS (a JSON list), write their kernels to KERNELS
    nogpu.py compare RESULT KERNELS...      compare pairs of such files, gpu-VERSION.json and nogpu-VERSION.json

GPU=h100 in the environment names the GPU that is to be described. A process that records without a GPU sees none
(CUDA_VISIBLE_DEVICES is empty).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import stub
from sglang_warmstart.deepgemm.dialects import dialect_of
from sglang_warmstart.deepgemm.identity import Gpu, distribution_of
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.record.child import RecordingOrder, RecordingProblem, record
from sglang_warmstart.deepgemm.target import Target

LIBRARIES = {
    "gpu": "sglang_warmstart.deepgemm.record.gpu",
    "nogpu": "sglang_warmstart.deepgemm.nogpu.library",
}


def real_gpu() -> Gpu:
    """The first GPU of this host, as its driver describes it; asked in a process of its own."""
    code = (
        "import torch; p = torch.cuda.get_device_properties(0); "
        "print(p.name, p.multi_processor_count, p.major, p.minor, sep='|')"
    )
    name, sms, major, minor = os.popen(f'{sys.executable} -c "{code}"').read().strip().split("|")
    return Gpu(name, int(sms), (int(major), int(minor)), 0)


def main(way: str, targets: Path, kernels: Path) -> dict[str, Any]:
    spec = importlib.util.find_spec("deep_gemm")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    dialect = dialect_of(package)
    compiler = compilers.find(os.environ, dialect=dialect)
    # Without a GPU, the table is asked: it is part of what is compared.
    gpu = real_gpu() if way == "gpu" else gpu_of(os.environ["GPU"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([LIBRARIES[way], record.__module__])
    found: dict[str, list[Any]] = {}
    seconds: dict[str, float] = {}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "stub.cubin")
        flags = " ".join(stub.flags_for(gpu.capability))
        cubin.write_bytes(
            compilers.compile_kernel(compilers.CompileJob(stub.SOURCE, flags, compiler, 120))
            if way == "gpu"
            else stub.MARK
        )
        environment = {name: os.environ[name] for name in os.environ if name.startswith(("DG_", "DJ_", "CUDA_"))}
        begin = time.perf_counter()
        for number, target in enumerate(msgspec.json.decode(targets.read_bytes(), type=list[Target])):
            name = f"{number} {target}"
            order = RecordingOrder(
                target, gpu, environment, compiler.version, str(cubin), directory, LIBRARIES[way], dialect.name
            )
            start = time.perf_counter()
            try:
                found[name] = [msgspec.to_builtins(each) for each in record(context, order, 300, lambda: False)]
            except RecordingProblem as problem:
                problems[name] = str(problem)
            seconds[name] = round(time.perf_counter() - start, 3)
        whole = time.perf_counter() - begin
    summary = {
        "way": way,
        "gpu": gpu.name,
        "deep_gemm": distribution_of(package),
        "targets": len(found),
        "kernels": sum(map(len, found.values())),
        "problems": problems,
        "seconds": seconds,
        "whole_s": round(whole, 2),
    }
    about = {"summary": summary, "compiler": compiler.version, "include": str(package / "include")}
    kernels.write_text(json.dumps({**about, "targets": found}, indent=1))
    return summary


def compare(files: list[Path]) -> dict[str, Any]:
    """Whether Ms, sources, flags and names of the entries are the same to the byte, release by release."""
    releases: dict[str, Any] = {}
    for path in sorted(each for each in files if each.name.startswith("gpu-")):
        version = path.stem.removeprefix("gpu-")
        here, there = (json.loads(each.read_text()) for each in (path, path.with_name(f"no{path.name}")))
        # Where DeepGEMM calls cuBLASLt in place of a kernel of its JIT, that runs, on operands that are not there.
        both = [target for target in here["targets"] if target in there["targets"]]
        releases[version] = {
            "same": all(here["targets"][each] == there["targets"][each] for each in both)
            and here["compiler"] == there["compiler"],
            "targets": len(both),
            "kernels": sum(len(here["targets"][each]) for each in both),
            "without_kernels": [each for each, kernels in there["targets"].items() if not kernels],
            "compiler": here["compiler"],
            "include": here["include"],
            "on": [each.get("summary", {}) for each in (here, there)],
            "entries": {
                target: [[each["m"], each["directory"]] for each in kernels]
                for target, kernels in there["targets"].items()
            },
            "sha256": [
                hashlib.sha256(json.dumps({each: found["targets"][each] for each in both}).encode()).hexdigest()
                for found in (here, there)
            ],
        }
    return {"releases": releases}


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        Path(sys.argv[2]).write_text(json.dumps(compare([Path(each) for each in sys.argv[3:]]), indent=1) + "\n")
    else:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # see node/launch.py
        if sys.argv[1] == "nogpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
