"""Patch 5: dummy forwards of either mode, and every pipeline rank warms its own kernels at the same time."""

from __future__ import annotations

from sglang_warmstart.base.source_edit import Edit
from sglang_warmstart.base.switches import PP_PARALLEL as SWITCH
from sglang_warmstart.sglang.dummy_run_edits import DUMMY_RUN_EDITS

from wiring.commit import Commit
from wiring.edits import Within, after
from wiring.fast_list import COMPILE_UTILS
from wiring.hc_prenorm import MODEL_RUNNER
from wiring.numbers import host_of, result, run_of
from wiring.places import IN_SGLANG

_WARMUP = """\

        if pp_parallel_warmup.is_wanted(self, deep_gemm_wrapper.compile_utils):
            deep_gemm_wrapper.compile_utils.pp_parallel_deep_gemm_warmup(self)
"""


def _ready(name: str) -> float:
    seconds: float = run_of(result("pp"), name)["ready_s"]
    return seconds


PP_PARALLEL = Commit(
    subject="model_runner: pipeline ranks warm their kernels at the same time",
    why=f"""
        At start-up one request warms the pipeline, so stage k starts to compile when stage k-1 has finished, and with a
        pipeline of four the compile times add up. With {SWITCH.name} each rank runs dummy forwards of its own layers at
        the end of kernel_warmup(), all ranks at once. The batch sizes reach each bracket of
        n_splits ~ n_sms / ceil(batch_size / 64); DECODE unless this is a prefill-only node, EXTEND unless it is a
        decode-only node. No batch is larger than the request pool, and no DECODE batch larger than what Triton's MLA
        decode kernels index in 32 bits (#28788).

        For that _dummy_run() takes forward_mode_override. Extend-mode buffers follow the effective mode, proxy tensors
        of later stages are cut to their context-parallel share, and models with mHC hand on states of their width.
    """,
    off=f"""
        without {SWITCH.name}, or without pipeline stages, or with speculative decoding nothing runs. Callers of
        _dummy_run() that name no mode see what they saw, but for pipelines of models with mHC, whose dummy states now
        have the right width, and of embedding models with context parallelism, whose later stages get their share.
    """,
    tested=f"""
        _dummy_run() and kernel_warmup() on real model runners, two pipeline stages in two processes among them. As a
        plugin, together with the exact warm-up of the last patch, on {host_of(result("pp"))}, PP 2, every cache cold,
        one start each: ready after {_ready("pp-switch"):.0f} s where stock needs {_ready("pp-stock"):.0f} s.
    """,
    features=("pp-parallel-warmup",),
    upstream="#26567",
    modules=("shapes/batch_sizes.py", "rank/pp_parallel_warmup.py"),
    changes={
        COMPILE_UTILS: [
            after(
                f"from {IN_SGLANG}.rank import hc_prenorm\n",
                f"from {IN_SGLANG}.rank.pp_parallel_warmup import pp_parallel_deep_gemm_warmup  # noqa: F401\n",
            )
        ],
        MODEL_RUNNER: [
            after(
                "from sglang.srt.utils.weight_checker import WeightChecker\n",
                f"from {IN_SGLANG}.rank import pp_parallel_warmup\n",
            ),
            Within("ModelRunner._dummy_run", DUMMY_RUN_EDITS),
            Within(
                "ModelRunner.kernel_warmup",
                [
                    Edit(
                        "        FlashInfer autotune, then what the model itself warms.\n",
                        "        FlashInfer autotune, then what the model itself warms, then dummy forwards\n"
                        "        of this pipeline stage.\n",
                    ),
                    after("            model_warmup(self)\n", _WARMUP),
                ],
            ),
        ],
    },
)
