"""What SGLang's FAST_WARMUP costs with its own list of Ms, and with ours. Writes fast_warmup.json beside it.

    .venv/bin/python test/deepgemm/fast_warmup.py

A real DeepGEMM is called with each M in turn, as SGLang's warm-up calls it, and compiles with the real nvcc into an
empty cache. No GPU is needed: stand-ins say that they are an H200, and take the launches. The seconds are those of the
process, with its imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit import environment

environment.isolate()
environment.in_process()

import msgspec  # noqa: E402  after the environment
from kit.release import installed_release  # noqa: E402
from kit.toolchain import toolchain  # noqa: E402
from sglang_warmstart.deepgemm.nogpu.host import PLACE  # noqa: E402
from sglang_warmstart.deepgemm.target import Target  # noqa: E402
from sglang_warmstart.sglang.m_list import fast_m_list  # noqa: E402

RESULT = Path(__file__).with_name("fast_warmup.json")
VERSION = "0.2.3.post2"
CHUNKS = (5000, 8192)
# DeepSeek-V3's projection into the latent space.
SHAPE = {"n": 2112, "k": 7168}

CALL = """
import sys
import msgspec
from sglang_warmstart.deepgemm.nogpu import library
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target

library.open_device(gpu_of("h200"))
target, values = msgspec.json.decode(sys.argv[1], type=Target), msgspec.json.decode(sys.stdin.read())
call = library.prepare(target, values[-1])
for m in values:
    call(m)
"""


def lists_of(chunk: int) -> dict[str, list[int]]:
    """SGLang's list for a chunk of so many tokens, as its own module makes it, and ours."""
    os.environ["SGLANG_JIT_DEEPGEMM_FAST_WARMUP"] = "1"
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils

    compile_utils._DO_COMPILE_ALL = True
    compile_utils.update_deep_gemm_config(0, SimpleNamespace(chunked_prefill_size=chunk, base_gpu_id=0))
    return {"stock": sorted(compile_utils._BUILTIN_M_LIST), "ours": fast_m_list(chunk)}


def warm(values: list[int], place: Path) -> tuple[float, set[str]]:
    """Seconds, and the kernels that are there afterwards."""
    target = Target(
        kernel_type="GEMM_NT_F8F8BF16",
        num_groups=1,
        num_sms=132,
        m_max=values[-1],
        lhs_scale="tma",
        rhs_scale="k",
        **SHAPE,
    )
    own = {
        PLACE: str(toolchain().deep_gemm_of(VERSION)),
        "DG_JIT_CACHE_DIR": str(place),
        "DG_JIT_NVCC_COMPILER": str(toolchain().nvcc),
        "CUDA_HOME": str(toolchain().cuda_home),
    }
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALL, msgspec.json.encode(target).decode()],
        env=environment.child_environment(own),
        input=json.dumps(values),
        text=True,
        check=True,
    )
    return time.monotonic() - begin, {path.name for path in (place / "cache").iterdir()}


def main() -> None:
    """Measure."""
    result: dict[str, object] = {
        "what": f"GEMM_NT_F8F8BF16 {SHAPE} of DeepGEMM {VERSION} on an H200",
        "lists": f"sglang {installed_release().version}",
        "compiler": toolchain().compiler().version.strip().splitlines()[-1],
        "cores": os.cpu_count(),
    }
    for chunk in CHUNKS:
        found: dict[str, set[str]] = {}
        lists = lists_of(chunk)
        result[f"{chunk} lists are equal"] = lists["stock"] == lists["ours"]
        for name, values in lists.items():
            with tempfile.TemporaryDirectory() as place:
                seconds, found[name] = warm(values, Path(place))
            result[f"{chunk} {name}"] = {
                "calls": len(values),
                "last_m": values[-1],
                "kernels": len(found[name]),
                "s": round(seconds, 1),
            }
            print(chunk, name, result[f"{chunk} {name}"], flush=True)
        result[f"{chunk} kernels of stock alone"] = len(found["stock"] - found["ours"])
        result[f"{chunk} kernels of ours alone"] = len(found["ours"] - found["stock"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
