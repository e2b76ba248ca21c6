"""Patches 6 to 9: each distinct kernel of DeepGEMM is compiled once, all at the same time; a restart compiles none."""

from __future__ import annotations

from typing import Any

from sglang_warmstart.base.source_edit import Edit
from sglang_warmstart.base.switches import COMPILER, STRICT, WARMSTART

from wiring.commit import Commit
from wiring.edits import Append, Within, after, before
from wiring.fast_list import COMPILE_UTILS
from wiring.hc_prenorm import MODEL_RUNNER
from wiring.numbers import host_of, medians_of, patched_rounds, result, run_of
from wiring.places import IN_SGLANG

ENGINE = "sglang/srt/entrypoints/engine.py"

_HOOK = """\


# It sees to a GEMM first; what it leaves is swept as above.
EXACT_WARMUP = ExactWarmup(sys.modules[__name__])
_maybe_compile_deep_gemm_one_type_all = EXACT_WARMUP.around(
    _maybe_compile_deep_gemm_one_type_all
)
"""


def _tokens(patched: dict[str, Any]) -> str:
    answers = {str(run["tokens"]) for run in patched["runs"]}
    return "the same tokens" if len(answers) == 1 else f"{len(answers)} different answers"


def _hook_us() -> float:
    medians = result("exact")["hook"]["us_per_call"]
    seconds: float = medians["exact"] - medians["sglang"]
    return seconds


def _tested() -> str:
    measured = result("exact")
    names = ("stock-fast", "exact-cold", "exact-warm", "exact-all-cold")
    fast, cold, warm, all_cold = (run_of(measured, name) for name in names)
    compared = measured["compared"]
    swept = [*result("restart")["sweep"]["targets"], *measured["sweep"]["targets"]]
    compiles = result("restart")["sweep"]["compiler_runs"] + measured["sweep"]["compiler_runs"]
    patched = result("patched")
    cold_s, warm_s = (medians_of(patched, state, "warmup_s") for state in ("cold", "warm"))
    return f"""
        ranks against a real service, two that agree in two processes among them. On {host_of(measured)},
        DeepSeek-V3's shapes, as a plugin of an earlier state: the warm-up took {cold["warmup_s"]:.1f} s where
        FAST_WARMUP took {fast["warmup_s"]:.1f} s, and {warm["warmup_s"]:.2f} s after a restart
        (the caches of Triton and FlashInfer warm in the first and the last of these; with every cache cold the server
        was ready after {all_cold["ready_s"]:.0f} s, with FAST_WARMUP after {fast["ready_s"]:.0f} s);
        {sum(each["calls"] for each in swept)} calls, every M of {len(swept)} targets, ran a compiler {compiles} times
        afterwards; {compared["equal"]} of {compared["kernels"]} results equal bit for bit those of kernels that
        DeepGEMM compiled itself. A server of this tree beside one with the
        plugin, {host_of(patched)}, half of them each: {cold_s["patches"]:.1f} s and {cold_s["plugin"]:.1f} s cold,
        {warm_s["patches"]:.2f} s and {warm_s["plugin"]:.2f} s warm (medians of {patched_rounds(patched)}),
        {_tokens(patched)}. DeepSeek-V4 was not run.
    """


_NOT_USED_YET = "nothing changes: nothing in SGLang uses this before the last patch."
_NOTHING_NEW = "Needs nothing that SGLang does not require already."


def _modules(*names: str) -> tuple[str, ...]:
    return tuple(f"kernels/{name}.py" for name in names)


COMPILING = Commit(
    subject="warmstart: compile kernels into DeepGEMM's cache",
    why=f"""
        DeepGEMM compiles a kernel when it is first called, one after another. Given the source and the flags of many
        (the next patch asks DeepGEMM for them), this compiles them on all cores at once, and publishes each in
        DeepGEMM's own cache under its own name: digest.py computes that as DeepGEMM does, cache.py renames a whole
        directory into place, and a lock per kernel keeps ranks and servers on one cache from doing the same work. The
        number of compilers follows the cores of the container and the memory that is free. What a killed compiler
        leaves behind, and kernels that are damaged, are set aside: DeepGEMM aborts on them. Where the environment names
        a directory for that, each process writes what it did, and how long that took, as JSON lines (events.py).

        {_NOTHING_NEW} (msgspec, tqdm, and filelock, which torch brings.)
    """,
    off=_NOT_USED_YET,
    tested="""
        with the real compiler on recorded kernels, racing processes, kills, full and read-only disks; digests against
        those of DeepGEMM itself.
    """,
    modules=_modules(
        "__init__",
        "cache",
        "compiler",
        "cubin",
        "digest",
        "events",
        "limits",
        "nvrtc",
        "pool",
        "progress",
        "recorder",
        "stub",
    ),
)

RECORDING = Commit(
    subject="warmstart: ask DeepGEMM which kernels a target needs",
    why=f"""
        Which kernel a GEMM takes follows from its shape by heuristics that change from release to release. They are not
        copied: a forked child calls the library for every M of a target, with a recorder in the compiler's place
        (DG_JIT_NVCC_COMPILER) that keeps source and flags and hands back an empty kernel. A target is all that selects
        a kernel but M: type, n, k, groups or splits, number of SMs, layouts of operands and scales, output type.
        Operands claim their size and need not exist. Only gemms.py and deep_gemm_library.py know the library.

        {_NOTHING_NEW}
    """,
    off=_NOT_USED_YET,
    tested="""
        kernels recorded on a GPU are in the tests, with their sources; children that hang, die or find no GPU.
    """,
    modules=_modules("targets", "gemms", "identity", "recording", "deep_gemm_library"),
)

SERVICE = Commit(
    subject="warmstart: one service per node records and compiles",
    why=f"""
        The ranks of a node share targets, a cache and cores. The process that starts them starts this service; they ask
        it over a Unix socket in a private directory, and get kernels and one M for each back. Compiling begins while
        recording goes on. A marker in the cache, under all that could change kernels (GPU, DeepGEMM's build and place,
        compiler and flags, DG_* settings), lets a restart skip both. It ends with its parent, however that ends.

        Two things are for tools outside this tree. Told so, it compiles nothing and writes plans instead: what the
        ranks need, without a path of this machine, for another one to compile. And it answers once a process that
        restores such kernels into the cache has let go of a lock.

        {_NOTHING_NEW}
    """,
    off=_NOT_USED_YET,
    tested="""
        real processes and signals: parents that are killed, ranks that leave, two servers on one cache, damaged
        markers, a service that is stopped in every phase.
    """,
    modules=_modules(
        "marker", "plan", "rank_plan", "restoring", "protocol", "client", "private_directory", "launch", "service"
    ),
)

EXACT_WARMUP = Commit(
    subject="deep_gemm: compile each kernel once, all at the same time",
    why=f"""
        The warm-up runs a GEMM for every M, or for a sample of them, and compiles what it meets, one kernel after
        another: thousands of calls that share a few dozen kernels, and minutes on one core. With the service of the
        patch before, each distinct kernel is compiled once, and each rank calls one M per kernel. A restart loads and
        compiles none.

        Dry dummy forwards, in which the wrapped GEMMs write zeros, find the targets of a rank before anything else
        runs; whether to run one is agreed on over the CPU group. What they miss is seen to when it is first called:
        there the wait is bounded, well below NCCL's and the watchdog's limits. A target that cannot be warmed is left
        to the sweep, with one line that says why. All nodes of a server need the same settings. The Ray engine has no
        service, and sweeps as it does.

        A GEMM that has been seen to pays {_hook_us():.1f} us more of host time than before: the number of SMs is
        asked, since it selects a kernel. A model without such GEMMs pays for the service and for two dummy forwards of
        the smallest batch.
    """,
    off=f"""
        {WARMSTART.name} is on by default; with 0, or with SGLANG_JIT_DEEPGEMM_PRECOMPILE=0, no service is started and
        each GEMM is swept as before. {STRICT.name} makes a target that cannot be warmed an error.
        {COMPILER.name}=nvrtc compiles faster, and some of its kernels run slower: it is not the default.
    """,
    tested=_tested(),
    features=("exact-warmup",),
    modules=(
        *_modules("calls", "load"),
        "rank/deep_gemm_rank.py",
        "rank/exact_warmup.py",
        "rank/settings.py",
    ),
    changes={
        COMPILE_UTILS: [
            after("import os\n", "import sys\n"),
            after(
                f"from {IN_SGLANG}.rank import hc_prenorm\n",
                f"from {IN_SGLANG}.rank.exact_warmup import ExactWarmup\n",
            ),
            Within(
                "update_deep_gemm_config",
                [after("    _DO_COMPILE_ALL = _IS_FIRST_RANK_ON_NODE\n", "\n    EXACT_WARMUP.connect(server_args)\n")],
            ),
            Append(_HOOK),
        ],
        ENGINE: [
            after(
                "from sglang.srt.utils.watchdog import SubprocessWatchdog\n",
                f"from {IN_SGLANG}.rank.exact_warmup import start_node_service\n",
            ),
            Within(
                "Engine._launch_scheduler_processes",
                [before("        scheduler_procs = []\n", "        start_node_service(server_args)\n")],
            ),
        ],
        MODEL_RUNNER: [
            Within(
                "ModelRunner.kernel_warmup",
                [
                    Edit(
                        "        FlashInfer autotune, then what the model itself warms, then dummy forwards\n"
                        "        of this pipeline stage.\n",
                        "        DeepGEMM's kernels, FlashInfer autotune, then what the model itself warms, then\n"
                        "        dummy forwards of this pipeline stage.\n",
                    ),
                    before(
                        "        if self._should_run_flashinfer_autotune():\n",
                        "        # Before anything runs a forward.\n"
                        "        deep_gemm_wrapper.compile_utils.EXACT_WARMUP.warm(self)\n\n",
                    ),
                ],
            )
        ],
    },
)
