"""What threads save in a module that takes long, SGLang 0.5.23's `topk_v2`. Writes split_compile.json beside it.

    .venv-0.5.23/bin/python test/libraries/split_compile.py

SGLang's own function builds it, with real nvcc, in rounds; what each round makes is compared with the first.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit.machine_code import machine_code
from kit.toolchain import toolchain
from sglang_warmstart.libraries.ptxas_threads import FLAGS, variables

RESULT = Path(__file__).with_name("split_compile.json")
ROUNDS, THREADS = 3, 2
AS_IT_IS, BY_PTXAS, BY_NVCC = "as it is", "ptxas in 2 threads", "nvcc --split-compile=2"

# As `_jit_topk_v2_module` of sglang/kernels/ops/attention/dsv4/topk.py has it on an H200, whose occupancy it asks.
BUILD = """
from sglang.kernels.jit.utils import load_jit, make_cpp_args, override_jit_cuda_arch

with override_jit_cuda_arch(9, 0):
    arguments = make_cpp_args(True)
    functions = "transform_paged", "transform_ragged", "plan", "transform_kpool", "transform_kpool_ragged"
    load_jit(
        "topk_v2",
        *arguments,
        extra_cuda_cflags=["-DSGL_TOPK_V2_MAX_C8_OCC2=32", "-DSGL_TOPK_V2_MAX_C16_OCC1=7"],
        cuda_files=["deepseek_v4/topk_v2.cuh"],
        cuda_wrappers=[(f"topk_{name}", f"TopKKernel<{arguments}>::{name}") for name in functions],
    )
"""


def build(place: Path, flags: str) -> tuple[dict[str, float], dict[str, bytes]]:
    """Seconds of each program that nvcc ran, and the machine code of each kernel."""
    place.mkdir()
    # It is linked against this, whatever it is.
    subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(place / "libcudart.so")], check=True)
    home = toolchain().cuda_home
    environment = {
        **os.environ,
        "HOME": str(place),
        "CUDA_HOME": str(home),
        "LIBRARY_PATH": str(place),
        "PATH": f"{home / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        FLAGS: f"{flags} --time {place / 'times.csv'} --keep --keep-dir {place}".strip(),
    }
    # It cannot be loaded without a GPU's libraries: then the process ends.
    subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD], env=environment, check=False, capture_output=True)
    seconds: dict[str, float] = {}
    with (place / "times.csv").open(newline="") as file:
        # After the titles: the phase is the second column, and its milliseconds stand before their unit, the last.
        for row in list(csv.reader(file))[1:]:
            name, milliseconds = row[1].strip(), float(row[-2])
            seconds[name] = seconds.get(name, 0.0) + milliseconds / 1000
    (cubin,) = place.glob("*.cubin")
    return seconds, machine_code(cubin.read_bytes())


def main() -> None:
    """Measure, in rounds, each way beside the others."""
    ways = {
        AS_IT_IS: "",
        BY_PTXAS: variables(THREADS, {"CUDA_HOME": str(toolchain().cuda_home)})[FLAGS],
        BY_NVCC: f"--split-compile={THREADS}",
    }
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    differ: dict[str, int] = {}
    first: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            for way, flags in ways.items():
                seconds, code = build(Path(scratch, f"{number}-{way.replace(' ', '-')}"), flags)
                first = first or code
                rounds[way].append({"all": sum(seconds.values()), **seconds})
                others = sum(code.get(name) != data for name, data in first.items())
                differ[way] = max(others, differ.get(way, 0))
                print(f"{way}: {sum(seconds.values()):.1f} s, {others} of {len(first)} kernels differ", flush=True)
    medians = {
        way: {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}
        for way, found in rounds.items()
    }
    result = {
        "what": "sglang 0.5.23, kernels/jit/csrc/deepseek_v4/topk_v2.cuh for sm_90a",
        "compiler": toolchain().compiler().version.strip().splitlines()[-1],
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "kernels": len(first),
        "kernels_that_differ": differ,
        "median_s": medians,
        "raw_s": rounds,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
