"""The tables of docs/benchmarks.md, from the committed results: ``python test/gpu/tables.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def run(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One server start of a result."""
    return next(each for each in results["runs"] if each["name"] == name)


def start_up() -> str:
    """A start of the server of DeepSeek-V3's shapes, four ways."""
    exact, stock = result("exact"), result("stock")
    runs = [
        run(stock, "stock-full"),
        run(stock, "stock-fast"),
        run(exact, "exact-cold"),
        run(exact, "exact-warm"),
    ]
    rows = [
        ("targets", [f"{each['targets']}" for each in runs]),
        ("GEMM calls made", [f"{each['calls']}" for each in runs]),
        ("kernels compiled", [f"{each['compiler_runs'] - each.get('stubs', 0)}" for each in runs]),
        ("seconds in DeepGEMM warm-up", [f"{each['warmup_s']:.2f}" for each in runs]),
        ("seconds to ready", [f"{each['ready_s']:.1f}" for each in runs]),
    ]
    titles = ["", "stock, full list", "stock, FAST_WARMUP", "exact, cold", "exact, warm restart"]
    return table(titles, [[name, *cells] for name, cells in rows])


def criteria() -> str:
    """What was asked, and what was measured."""
    exact, stock = result("exact"), result("stock")
    cold, warm, fast = run(exact, "exact-cold"), run(exact, "exact-warm"), run(stock, "stock-fast")
    pipeline, compared = exact["pipeline"], stock["compared"]
    hook = stock["hook"]["us_per_call"]
    rows = [
        [
            "cold, DeepGEMM part, against FAST_WARMUP",
            "5 times faster (aim: 10)",
            f"{fast['warmup_s'] / cold['warmup_s']:.1f} times",
        ],
        [
            "record and compile, against compile CPU seconds / cores",
            "1.5 times",
            f"{pipeline['seconds'] / pipeline['cpu_s_by_cores']:.2f} times ({pipeline['seconds']:.1f} s; "
            f"{pipeline['compile_cpu_s']:.0f} CPU s on {exact['environment']['cores']} cores; "
            f"{pipeline['compiled']} kernels)",
        ],
        [
            "warm restart, load per target",
            "0.1 s",
            f"{warm['load_s'] / warm['targets']:.4f} s ({warm['targets']} targets, {warm['calls']} calls)",
        ],
        [
            "compiler runs in a sweep of every M of every target",
            "0",
            f"{stock['sweep']['compiler_runs']} ({sum(each['calls'] for each in stock['sweep']['targets'])} calls, "
            f"{len(stock['sweep']['targets'])} targets)",
        ],
        [
            "results equal to a stock cache's, bit for bit",
            "all",
            f"{compared['equal']} of {compared['kernels']} kernels, "
            f"{len({each['target'] for each in stock['kernels']})} targets",
        ],
        [
            "GPU memory of one recording child; of all; how many",
            "",
            "{largest_helper_mib} MiB; {all_helpers_mib} MiB; {helpers}".format(**exact["gpu_memory"]),
        ],
        [
            "host time of a GEMM through SGLang's wrapper",
            "1% of 20 us",
            f"{hook['exact']:.2f} us with our hook, {hook['sglang']:.2f} us with SGLang's",
        ],
    ]
    return table(["", "asked", "measured"], rows)


def nvrtc() -> str:
    """NVRTC beside nvcc."""
    exact, other = result("exact"), result("nvrtc")
    first, second = exact["pipeline"], other["pipeline"]
    compared = other["compared"]
    rows = [
        ["record and compile, seconds", f"{first['seconds']:.1f}", f"{second['seconds']:.1f}"],
        ["kernels", f"{first['kernels']}", f"{second['kernels']}"],
        ["results equal bit for bit", "", f"{compared['equal']} of {compared['kernels']}"],
        ["kernels slower than nvcc's by more than 2%", "", f"{compared['slower_than_2_percent']}"],
        ["the slowest, against nvcc's", "", f"{compared['slowest_ratio']:.2f} times"],
    ]
    return table(["", "nvcc", "NVRTC"], rows)


def nvrtc_kernels() -> str:
    """Each kernel's time on the GPU, by both compilers."""
    rows = [
        [
            each["target"],
            f"{each['m']}",
            f"{each['us']:.1f}",
            f"{each['other_us']:.1f}",
            f"{each['other_us'] / each['us']:.3f}",
        ]
        for each in result("nvrtc")["kernels"]
    ]
    return table(["target", "M", "nvcc, us", "NVRTC, us", "ratio"], rows)


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |")


TABLES = (start_up, criteria, nvrtc, nvrtc_kernels)

if __name__ == "__main__":
    for make in TABLES:
        print(f"{make.__doc__}\n\n{make()}\n")
