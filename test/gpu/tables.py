"""The tables of docs/results/benchmarks.md, from the committed results: ``python test/gpu/tables.py``."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_warmstart.report.breakdown import CATEGORIES
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import Summary, summarise

# Below, the host's time is in the figure.
JUDGED_FROM_US = 60
RESULTS = Path(__file__).parent / "results"


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def run(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One server start of a result."""
    return next(each for each in results["runs"] if each["name"] == name)


def start_up() -> str:
    """A start of the server of DeepSeek-V3's shapes."""
    names = ("stock-full", "stock-fast", "exact-all-cold", "exact-cold", "exact-warm")
    runs = [run(result("exact"), name) for name in names]
    # In the plugin's runs the service compiles one stub more, unless it has nothing to record.
    stubs = [int("calls" in each and "wait_s" in each and each["compiler_runs"] > 0) for each in runs]
    rows = [
        ["targets", *(f"{each['targets']}" for each in runs)],
        ["GEMM calls made", *(f"{each['calls']}" for each in runs)],
        ["kernels compiled", *(f"{each['compiler_runs'] - stub}" for each, stub in zip(runs, stubs, strict=True))],
        ["seconds in DeepGEMM warm-up", *(f"{blocked(each):.2f}" for each in runs)],
        ["seconds to ready", *(f"{each['ready_s']:.1f}" for each in runs)],
    ]
    titles = [
        "",
        "stock, full list",
        "stock, FAST_WARMUP",
        "exact, cold",
        "exact, only DeepGEMM cold",
        "exact, warm restart",
    ]
    return table(titles, rows)


def blocked(each: dict[str, Any]) -> float:
    """Seconds that a rank spent in DeepGEMM's warm-up.

    Dry forwards count where nothing but DeepGEMM is cold. Where all is cold, they are spent in the JIT of Triton and
    FlashInfer, which in stock SGLang comes later.
    """
    seconds: float = each["wait_s"] + each["load_s"] if each["name"] == "exact-all-cold" else each["warmup_s"]
    return seconds


def criteria() -> str:
    """What was asked, and what was measured."""
    exact, restart = result("exact"), result("restart")
    cold, warm, fast = (run(exact, name) for name in ("exact-cold", "exact-warm", "stock-fast"))
    cores = exact["environment"]["cores"]
    pipeline, compared, memory = exact["pipeline"], exact["compared"], exact["gpu_memory"]
    hook = exact["hook"]["us_per_call"]
    of_server = cold["compile_cpu_s"] / cores
    swept = [*restart["sweep"]["targets"], *exact["sweep"]["targets"]]
    rows = [
        [
            "cold DeepGEMM part, against FAST_WARMUP",
            "5 times faster, aim 10",
            f"{fast['warmup_s'] / cold['warmup_s']:.1f} times ({cold['warmup_s']:.1f} s, {fast['warmup_s']:.1f} s)",
        ],
        [
            "record and compile, against CPU seconds of the compilers / cores: every kernel type, service alone",
            "1.5 times",
            f"{pipeline['seconds'] / pipeline['cpu_s_by_cores']:.2f} times ({pipeline['targets']} targets, "
            f"{pipeline['compiled']} kernels: {pipeline['seconds']:.1f} s, "
            f"{pipeline['compile_cpu_s']:.0f} CPU s / {cores})",
        ],
        [
            "the same in the server, dry forwards and loading included",
            "1.5 times",
            f"{cold['warmup_s'] / of_server:.2f} times ({cold['targets']} targets, "
            f"{cold['compiler_runs'] - 1} kernels: {cold['warmup_s']:.1f} s, "
            f"{cold['compile_cpu_s']:.0f} CPU s / {cores})",
        ],
        [
            "warm restart, per target",
            "0.1 s",
            f"{warm['warmup_s'] / warm['targets']:.3f} s ({warm['calls']} calls, "
            f"{warm['compiler_runs']} compiler runs)",
        ],
        [
            "compiler runs in a sweep of every M of every target",
            "0",
            f"{restart['sweep']['compiler_runs'] + exact['sweep']['compiler_runs']} ({len(swept)} targets, "
            f"{sum(each['calls'] for each in swept)} calls)",
        ],
        [
            "results equal to those of kernels that DeepGEMM compiled itself, bit for bit",
            "all",
            f"{compared['equal']} of {compared['kernels']} representatives of "
            f"{pipeline['targets']} targets, {compared['finite']} of them finite",
        ],
        [
            "GPU memory of a recording child; of those at one time",
            "",
            f"{memory['largest_helper_mib']} MiB; {memory['all_helpers_mib']} MiB of {memory['helpers']}",
        ],
        [
            "host time of a small GEMM through SGLang's wrapper",
            "1% of 20 us more",
            f"{hook['exact']:.2f} us with our hook, {hook['sglang']:.2f} us with SGLang's",
        ],
    ]
    return table(["", "asked", "measured"], rows)


def patched() -> str:
    """The plugin on SGLang as released, beside a patched SGLang without it."""
    found = result("patched")
    columns = [("plugin", "cold"), ("patches", "cold"), ("plugin", "warm"), ("patches", "warm")]
    groups = [[run for run in found["runs"] if (run["delivery"], run["state"]) == column] for column in columns]
    rows = [
        ["targets", *(_all_alike(group, "targets") for group in groups)],
        ["GEMM calls made", *(_all_alike(group, "calls") for group in groups)],
        # The service compiles one stub more, where it has something to record.
        [
            "kernels compiled",
            *(_all_alike(group, "compiler_runs", int(group[0]["state"] == "cold")) for group in groups),
        ],
        ["seconds in DeepGEMM warm-up", *(_spread(group, "warmup_s", 2) for group in groups)],
        ["of these, dry forwards", *(_spread(group, "dry_s", 2) for group in groups)],
        ["waiting for kernels", *(_spread(group, "wait_s", 2) for group in groups)],
        ["loading them", *(_spread(group, "load_s", 3) for group in groups)],
        ["seconds to ready", *(_spread(group, "ready_s", 1) for group in groups)],
    ]
    return table(["", *(f"{delivery}, {state}" for delivery, state in columns)], rows)


def _all_alike(group: list[dict[str, Any]], key: str, less: int = 0) -> str:
    (value,) = {run[key] for run in group}
    return f"{value - less}"


def _spread(group: list[dict[str, Any]], key: str, digits: int) -> str:
    """The median, and from where to where."""
    values = sorted(run[key] for run in group)
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


def releases() -> str:
    """DeepGEMM's two JITs, without SGLang: recorded both ways, compiled elsewhere, and cold against FAST_WARMUP."""
    versions = ("0.1.0", "0.2.3.post2")
    found = [result(f"releases/{version}") for version in versions]
    exact = [[each for each in one["exact"] if each["recorder"] == "nogpu"] for one in found]
    totals = [sorted(each["seconds"] + each["load_s"] for each in rounds) for rounds in exact]
    middle = [statistics.median(each) for each in totals]
    rows = [
        ["torch", *(one["about"]["torch"] for one in found)],
        ["targets (kernels) recorded both ways", *(_recorded(one["recorded"]) for one in found)],
        ["the same, to the byte", *(str(one["recorded"]["same"]).lower() for one in found)],
        ["the same as in the plan made elsewhere", *(str(one["recorded"]["same_as_plan"]).lower() for one in found)],
        [
            "kernels compiled elsewhere, in a root that is only read: compiler runs over every M",
            *(
                f"{one['sweep']['compiler_runs']} ({sum(t['calls'] for t in one['sweep']['targets'])} calls)"
                for one in found
            ),
        ],
        [
            "their results equal to those of DeepGEMM's own compiles",
            *(f"{one['compared']['equal']} of {one['compared']['kernels']}" for one in found),
        ],
        ["cold record, compile, load: targets (kernels)", *(f"{r[0]['targets']} ({r[0]['kernels']})" for r in exact)],
        ["seconds, 14 cores", *(f"{m:.1f} ({t[0]:.1f} to {t[-1]:.1f})" for m, t in zip(middle, totals, strict=True))],
        ["FAST_WARMUP's sweep of the same targets: kernels", *(f"{one['fast']['kernels']}" for one in found)],
        ["seconds", *(f"{one['fast']['seconds']:.1f}" for one in found)],
        ["times faster", *(f"{one['fast']['seconds'] / m:.1f}" for one, m in zip(found, middle, strict=True))],
    ]
    return table(["", *(f"sgl-deep-gemm {version}" for version in versions)], rows)


def _recorded(both: dict[str, Any]) -> str:
    return f"{both['targets']} ({both['kernels']})"


def nvrtc() -> str:
    """NVRTC with precompiled headers, 16 processes, beside 16 nvcc's."""
    found = result("nvrtc")
    first, second, compared = found["compile"]["nvcc"], found["compile"]["nvrtc"], found["compared"]
    rows = [
        [f"seconds for {first['kernels']} kernels", f"{first['wall_s']:.1f}", f"{second['wall_s']:.1f}"],
        ["sum of the seconds of each", f"{first['sum_s']:.0f}", f"{second['sum_s']:.0f}"],
        ["representatives with equal results, bit for bit", "", f"{compared['equal']} of {compared['kernels']}"],
        [
            "slower on the GPU by more than 2%, of those that take 60 us or more",
            "",
            f"{compared['slower_than_2_percent']} of {compared['judged']}",
        ],
        ["the slowest against nvcc's", "", f"{compared['slowest_ratio']:.2f} times"],
    ]
    return table(["", "nvcc", "NVRTC"], rows)


def nvrtc_kernels() -> str:
    """The kernels that take 60 us or more, by both compilers, the slowest by NVRTC first."""
    rows = [
        (each["other_us"] / each["us"], each) for each in result("nvrtc")["kernels"] if each["us"] >= JUDGED_FROM_US
    ]
    cells = [
        [
            each["target"].partition(" num_sms")[0],
            f"{each['m']}",
            f"{each['us']:.1f}",
            f"{each['other_us']:.1f}",
            f"{ratio:.3f}",
        ]
        for ratio, each in sorted(rows, key=lambda row: -row[0])
    ]
    return table(["target", "M", "nvcc, us", "NVRTC, us", "ratio"], cells)


def bundles() -> str:
    """Bundles: what they weigh, how long they take, and what a start of the server takes with them and without."""
    titles, columns, starts = [""], [], []
    for host, found in result("bundle_files").items():
        for name, each in found["bundles"].items():
            titles.append(f"{host}: {BUNDLES[name][0]}")
            columns.append(each)
            # Where there is no GPU, no server starts.
            starts.append(BUNDLES[name][1:] if "GPU" not in host else ("", "", ""))

    def seconds(ours: str, others: str) -> list[str]:
        return [f"{each['median_s'][ours]:.3f} ({each['median_s'][others]:.3f})" for each in columns]

    def ready(state: str) -> str:
        return f"{statistics.median(starts_of(state, 'ready_s')):.1f}" if state else "-"

    rows = [
        ["kernels of DeepGEMM", *(f"{each['kernels']}" for each in columns)],
        ["files", *(f"{each['files']}" for each in columns)],
        ["KiB unpacked", *(f"{each['unpacked_bytes'] / 1024:.0f}" for each in columns)],
        ["KiB (tar and zstd)", *(f"{each['bytes'] / 1024:.0f} ({each['tar_bytes'] / 1024:.0f})" for each in columns)],
        ["pack, s (tar and zstd)", *seconds("pack", "tar_pack")],
        ["verify, s (zstd's own test)", *seconds("verify", "tar_test")],
        ["unpack, s (tar and zstd)", *seconds("unpack", "tar_unpack")],
        ["start of the server without it, s to ready", *(ready(each[0]) for each in starts)],
        ["with it", *(ready(each[1]) for each in starts)],
        ["with warm caches", *(ready(each[2]) for each in starts)],
    ]
    return table(titles, rows)


# What a bundle is called, and the starts without it, with it, and with caches that are warm.
BUNDLES = {
    "kernels": ("kernels", "cold", "bundle", "warm"),
    "kernels-and-caches": ("kernels and caches", "all cold", "all restored", "warm"),
}


def starts_of(state: str, key: str) -> list[float]:
    """A figure of the starts of one kind."""
    return [each[key] for each in result("bundle")["runs"] if each["state"] == state]


def bundle_starts() -> str:
    """Starts of the server with bundles and without, in more detail."""

    def of(state: str, key: str) -> str:
        values, places = starts_of(state, key), PLACES[key]
        median = statistics.median(values)
        if min(values) == max(values):
            return f"{median:.{places}f}"
        return f"{median:.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"

    states = ("all cold", "all restored", "cold", "bundle", "warm")
    rows = [[what, *(of(state, key) for state in states)] for key, what in BUNDLE_ROWS.items()]
    titles = ["", "all cold", "all from a bundle", "DeepGEMM cold", "DeepGEMM from a bundle", "all warm"]
    return table(titles, rows)


BUNDLE_ROWS = {
    "compiler_runs": "runs of nvcc for DeepGEMM",
    "warmup_s": "seconds in DeepGEMM's warm-up",
    "ready_s": "seconds to ready",
}
PLACES = {"compiler_runs": 0, "warmup_s": 2, "ready_s": 1}


def seconds_of_a_start() -> str:
    """What each second of a start went to."""
    names = ("stock", "exact", "warm")
    summaries = [summarise(read_run(RESULTS / "start_up" / name)) for name in names]
    runs = [run(result("start_up"), name) for name in names]
    rows = [
        *_seconds_of(summaries),
        ["kernels compiled while serving", *(str(len(each.serving)) for each in summaries)],
        ["first prompt of 3000 tokens, s", *(f"{each['long_prompts_s'][0]:.2f}" for each in runs)],
        ["second one, s", *(f"{each['long_prompts_s'][1]:.2f}" for each in runs)],
    ]
    return table(["seconds", "stock, all cold", "exact, all cold", "exact, warm restart"], rows)


def seconds_of_deepseek_v4() -> str:
    """What each second of a start of DeepSeek-V4 went to: of each state the one with the median time."""
    names = ("stock-decode", "cold-3", "early-planned-3", "image-1", "warm-2")
    titles = ("stock, all cold", "first start", "with a plan", "from an image", "warm")
    return _seconds_by_state("deepseek-v4-rounds-0.5.23", "deepseek-v4", dict(zip(titles, names, strict=True)))


def seconds_of_two_stages() -> str:
    """The same with two pipeline stages."""
    states = {"stock, all cold": "stock", "first start": "cold-1", "with a plan": "early-planned-1", "warm": "warm-1"}
    return _seconds_by_state("deepseek-v4-two-gpus-0.5.23", "deepseek-v4-pp2", states)


def _seconds_by_state(file: str, model: str, states: dict[str, str]) -> str:
    found = result(file)
    with tempfile.TemporaryDirectory() as directory:
        summaries = [
            summarise(read_run(written(run(found, f"{model}-{name}")["events"], Path(directory, name))))
            for name in states.values()
        ]
    return table(["seconds", *states], _seconds_of(summaries))


def written(events: list[dict[str, Any]], directory: Path) -> Path:
    """The events of a start as its processes wrote them, for `sglang-warmstart report`."""
    directory.mkdir(parents=True)
    for event in events:
        line = {key: value for key, value in event.items() if key != "file"}
        with (directory / event["file"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return directory


def _seconds_of(summaries: list[Summary]) -> list[list[str]]:
    return [
        *(
            [category.title, *(f"{each.breakdown.parts[category.key]:.1f}" for each in summaries)]
            for category in CATEGORIES
            if any(each.breakdown.parts[category.key] >= 0.05 for each in summaries)
        ),
        ["**seconds to ready**", *(f"**{each.breakdown.seconds:.1f}**" for each in summaries)],
        ["kernels compiled ahead", *(str(each.ahead) for each in summaries)],
        ["kernels compiled on call, before ready", *(str(each.on_call) for each in summaries)],
    ]


def watching() -> str:
    """What the JIT monitor costs a call that compiles nothing."""
    rounds = result("monitor")["rounds_us"]
    rows = []
    for name, what in (("deep_gemm", "GEMM by SGLang's wrapper of DeepGEMM"), ("triton", "kernel of Triton's")):
        off = rounds[name]["off"][1:]  # the first round compiles
        cells = [what, f"{statistics.median(off):.1f}"]
        for mode in ("warn", "error"):
            more = sorted(here - there for here, there in zip(rounds[name][mode][1:], off, strict=True))
            # The median, and where it lies in 95 of 100 cases by the order of the rounds alone.
            spread = math.ceil(0.98 * math.sqrt(len(more)))
            middle = len(more) // 2
            low, high = more[middle - spread], more[middle + spread]
            cells.append(f"{statistics.median(more):+.2f} ({low:+.2f} to {high:+.2f})")
        rows.append(cells)
    return table(["us per call on the host", "off", "warn, more than off", "error, more than off"], rows)


_STATES = {"stock": "stock, FAST_WARMUP, all cold", "cold": "exact, all cold", "warm": "exact, warm"}


def release_starts() -> str:
    """Starts of later releases, stock and with exact warm-up."""
    rows = []
    for version in ("0.5.17", "0.5.23"):
        runs = result(f"release-starts-{version}")["runs"]
        for each in sorted(runs, key=lambda run: (run["model"], list(_STATES).index(run["state"]))):
            eagle = each["model"] == "deepseek-eagle" and each["state"] == "cold"
            waited = each["warmup_s"] - each.get("dry_s", 0)
            rows.append(
                [
                    version,
                    each["model"],
                    _STATES[each["state"]],
                    f"{each['ready_s']:.1f}",
                    str(len(met_late(each)) if eagle else each["targets"]),
                    str(each["compiler_runs"]),
                    f"{sum(event['seconds'] for event in met_late(each)):.1f}" if eagle else f"{waited:.2f}",
                    " / ".join(f"{seconds:.2f}" for seconds in each["prompts_s"]),
                    str(sum(event.get("phase") == "serving" for event in each["events"] if event.get("kind") == "jit")),
                ]
            )
    titles = ["SGLang", "model", "start", "ready after s", "targets", "nvcc runs for DeepGEMM", "s in DeepGEMM's part"]
    return table([*titles, "first prompts of 1 / 17 / 333 / 3000 tokens, s", "JIT while serving"], rows)


def deep_gemm_part() -> str:
    """DeepGEMM's part of starts of 0.5.23 on one host."""
    results = result("release-side-by-side-0.5.23")
    rows = []
    for model in ("deepseek", "qwen-deep_gemm"):
        stock, warm = (run(results, f"{model}-{state}") for state in ("stock", "warm"))
        recolds = [run(results, f"{model}-recold-{number}") for number in (1, 2)]
        seconds = [each["warmup_s"] for each in recolds]
        rows.append(
            [
                model,
                f"{stock['warmup_s']:.1f}",
                " / ".join(f"{each:.1f}" for each in seconds),
                " / ".join(f"{stock['warmup_s'] / each:.1f}" for each in seconds),
                f"{warm['warmup_s']:.3f}",
                " / ".join(f"{each['ready_s']:.1f}" for each in (stock, run(results, f"{model}-cold"))),
                " / ".join(f"{each['ready_s']:.1f}" for each in (*recolds, warm)),
            ]
        )
    titles = ["model", "stock's sweeps, s", "exact, s", "times faster", "exact, warm, s"]
    return table([*titles, "ready: stock / exact, all cold, s", "ready: DeepGEMM's cache cold, twice / warm, s"], rows)


def mhc() -> str:
    """TileLang's kernels of mHC's buckets."""
    cold, warm, alone = result("mhc")["runs"]
    one = list(alone["seconds"].values())
    rows = [
        ["one kernel alone (three of them)", " / ".join(f"{seconds:.1f}" for seconds in one)],
        [f"all {cold['buckets']} at once, built by the service", f"{cold['at_once_s']:.1f}"],
        ["then each run once, loaded from TileLang's cache", f"{cold['then_s']:.1f}"],
        [f"all {warm['buckets']} in a restart", f"{warm['at_once_s'] + warm['then_s']:.1f}"],
    ]
    return table(["mHC", "s"], rows)


def deepseek_v4() -> str:
    """What a start of DeepSeek-V4 compiles, by library, and where."""
    found = result("deepseek-v4-rounds-0.5.23")
    stock, first, planned = (
        [each for each in run(found, f"deepseek-v4-{name}")["events"] if each.get("kind") in ("jit", "compile")]
        for name in ("stock-decode", "cold-2", "early-planned-2")
    )
    rows = [
        [
            library,
            *(
                _compiled(events, library, kind)
                for events, kind in (
                    (stock, "jit"),
                    (first, "jit"),
                    (first, "compile"),
                    (planned, "jit"),
                    (planned, "compile"),
                )
            ),
        ]
        for library in ("sglang-jit", "tilelang", "deep-gemm", "flashinfer", "triton")
    ]
    titles = ["library", "stock: in the rank", "first start: in the rank", "first start: by the service"]
    return table([*titles, "with a plan: in the rank", "with a plan: by the service"], rows)


def _compiled(events: list[dict[str, Any]], library: str, kind: str) -> str:
    found = [
        each["seconds"]
        for each in events
        # Without kernels, it is a wait for them.
        if (each.get("library"), each["kind"]) == (library, kind) and "cached" not in each and each.get("kernels") != 0
    ]
    return f"{len(found)}: {sum(found):.1f} s" if found else ""


# The state of a start, by how its name begins; the first that fits.
_AHEAD = (
    ("stock-warm", "stock, warm"),
    ("stock", "stock, FAST_WARMUP, all cold"),
    ("cold", "plugin, all cold"),
    ("planned", "plugin, all cold but the plan"),
    ("early-planned", "the same, by `sglang-warmstart run`"),
    ("image", "plugin, from an image's directory"),
    ("warm", "plugin, warm"),
)


_ARGUMENTS = {"deepseek-v4-pp2": "--pp-size 2", "deepseek-v4-tp2": "--tp 2"}
_PROMPTS = "first prompts of 1 / 17 / 333 / 3000 tokens, s"


def build_ahead() -> str:
    """Starts with a plan of everything, beside those without and warm ones."""
    rows = []
    for version in ("0.5.12", "0.5.23"):
        runs = result(f"build-ahead-{version}")["runs"]
        for model in dict.fromkeys(run["model"] for run in runs):
            of_model = [run for run in runs if run["model"] == model]
            warm = next(run["ready_s"] for run in of_model if run["state"].startswith("warm"))
            for _, state in _AHEAD:
                found = [run for run in of_model if state_of(run["state"]) == state]
                if not found:
                    continue
                ready = [run["ready_s"] for run in found]
                compilers = [run["used"].get("compilers", {}).get("cpu_s", 0.0) for run in found]
                rows.append(
                    [
                        version,
                        model,
                        state,
                        " / ".join(f"{each:.1f}" for each in ready),
                        " / ".join(f"{each / warm:.2f}" for each in ready),
                        " / ".join(f"{each:.0f}" for each in compilers),
                        " / ".join(f"{each:.2f}" for each in found[0]["prompts_s"]),
                    ]
                )
    titles = ["SGLang", "model", "start", "ready after s", "times the warm start", "CPU s of compilers"]
    return table([*titles, _PROMPTS], rows)


def rounds() -> str:
    """Rounds of starts, beside each other: the first, with its plan, warm, and from an image."""
    rows = []
    for version, file in (
        ("0.5.12", "rounds-0.5.12"),
        ("0.5.23", "rounds-0.5.23"),
        ("0.5.23", "deepseek-v4-rounds-0.5.23"),
    ):
        rows += [[version, *row[:-1]] for row in _rounds_of(result(file)["runs"])]
    return table(["SGLang", "model", "start", "ready after s", "median", "times a warm start"], rows)


def two_gpus() -> str:
    """DeepSeek-V4 with pipeline stages and with tensor parallelism."""
    runs = result("deepseek-v4-two-gpus-0.5.23")["runs"]
    rows = [
        [f"`{_ARGUMENTS[model]}`", state, ready, times, prompts]
        for model, state, ready, _, times, prompts in _rounds_of([run for run in runs if "gather" not in run["name"]])
    ]
    return table(["arguments", "start", "ready after s", "times a warm start", _PROMPTS], rows)


def _rounds_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Model, start, seconds of each, their median, the same in times of a warm start, first prompts of one."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        states: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if run["model"] == model:
                states.setdefault(state_of(run["state"]), []).append(run)
        ready = {state: [run["ready_s"] for run in found] for state, found in states.items()}
        warm = statistics.median(ready[state_of("warm")])
        for state, found in states.items():
            median = statistics.median(ready[state])
            name = state.replace("the same", "plugin, all cold but the plan")
            prompts = " / ".join(f"{each:.2f}" for each in found[0]["prompts_s"])
            rows.append([model, name, _each(ready[state]), f"{median:.1f}", f"{median / warm:.2f}", prompts])
    return rows


def memory() -> str:
    """Memory and processor time of a node until the server is ready."""
    runs = result("deepseek-v4-rounds-0.5.23")["runs"]
    rows = []
    for title, name in (("first start", "cold-"), ("with a plan", "early-planned-"), ("warm", "warm-")):
        used = [run["used"] for run in runs if run["state"].startswith(name)]
        rows.append([title])
        for part in ("server", "service", "compilers"):
            for key, scale, digits in (("memory_mb", 1000, 1), ("cpu_s", 1, 0)):
                found = [each.get(part, {}).get(key, 0.0) / scale for each in used]
                rows[-1].append(f"{statistics.median(found):.{digits}f}")
    titles = [f"{part}, {unit}" for part in ("server and builders", "service", "compilers") for unit in ("GB", "CPU s")]
    return table(["start", *titles], rows)


def padding() -> str:
    """Batch sizes of CUDA graphs, and the time for a token, with and without padding."""
    runs = [run for run in result("deepseek-v4-two-gpus-0.5.23")["runs"] if "gather" in run["name"]]
    rows = []
    for title, model in (("no", "deepseek-v4-tp2-gather"), ("yes", "deepseek-v4-tp2-gather-flag")):
        found = [run for run in runs if run["model"] == model]
        captured = {
            tuple((each["batch_size"], each["gathered_buffer"]) for each in rank)
            for run in found
            for rank in run["captured"].values()
        }
        (sizes,) = captured  # all ranks of all starts alike
        batches = ", ".join(str(batch) for batch, _ in reversed(sizes))
        buffer = "as long" if all(batch == length for batch, length in sizes) else "none"
        times = [[ms for run in found for ms in run["decode_ms"][batch]] for batch in ("1", "64")]
        rows.append(
            [title, batches, buffer]
            + [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}; {len(each)})" for each in times]
        )
    titles = ["`--disable-attn-tp-gather`", "graphs for batches of", "gathered buffer"]
    return table([*titles, "ms a token, batch 1", "batch 64"], rows)


def four_cores() -> str:
    """Starts on 4 cores, stock beside the plugin."""
    rows = [[state_of(run["state"]), f"{run['ready_s']:.1f}"] for run in result("four-cores-0.5.12")["runs"]]
    return table(["start on 4 cores", "ready after s"], rows)


def _each(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in values)


def state_of(state: str) -> str:
    """What a state is called in the table."""
    return next(title for beginning, title in _AHEAD if state.startswith(beginning))


def decode() -> str:
    """Time for a token of DeepSeek-V4's shapes, with and without the plugin."""
    rows = []
    for title, file, name in (
        ("stock, warm", "deepseek-v4-stock-0.5.23", "stock-warm-decode"),
        ("plugin, warm, at the same moment", "deepseek-v4-stock-0.5.23", "warm-decode"),
        ("stock, after its cold start", "deepseek-v4-rounds-0.5.23", "stock-decode"),
        ("plugin, warm, on the same machine", "deepseek-v4-rounds-0.5.23", "warm-3-decode"),
    ):
        rounds = run(result(file), f"deepseek-v4-{name}")["decode_ms"]
        rows.append([title, *(" / ".join(f"{each:.2f}" for each in rounds[batch]) for batch in ("1", "64"))])
    return table(["ms a token, three rounds", "batch 1", "batch 64"], rows)


def met_late(each: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of a start that were met in a forward: the waits for them."""
    return [event for event in each["events"] if event.get("name") == "a new target"]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |")


TABLES = (
    start_up,
    criteria,
    patched,
    releases,
    release_starts,
    deep_gemm_part,
    mhc,
    deepseek_v4,
    build_ahead,
    rounds,
    two_gpus,
    padding,
    four_cores,
    decode,
    nvrtc,
    nvrtc_kernels,
    bundles,
    bundle_starts,
    seconds_of_a_start,
    seconds_of_deepseek_v4,
    seconds_of_two_stages,
    memory,
    watching,
)

if __name__ == "__main__":
    for make in TABLES:
        print(f"{make.__doc__}\n\n{make()}\n")
