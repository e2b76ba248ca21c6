"""Patch 4: the mHC prenorm GEMM is warmed, and its split buckets."""

from __future__ import annotations

from sglang_warmstart.base.source_edit import Edit
from sglang_warmstart.sglang.hc_prenorm import KERNEL_TYPE
from sglang_warmstart.sglang.mhc_prewarm import BUCKETS

from wiring.commit import Commit
from wiring.edits import Within, after, before
from wiring.fast_list import COMPILE_ONE, COMPILE_UTILS, ENTRYPOINT, IMPORTS
from wiring.numbers import host_of, result
from wiring.places import IN_SGLANG

MODEL_RUNNER = "sglang/srt/model_executor/model_runner.py"
DEEPSEEK_V4 = "sglang/srt/models/deepseek_v4.py"

_WRAPPER = f"""\
tf32_hc_prenorm_gemm = hc_prenorm_wrapper(
    sys.modules[__name__], compile_utils.DeepGemmKernelType.{KERNEL_TYPE}
)


"""
_ONE_M = f"""\
        elif kernel_type == DeepGemmKernelType.{KERNEL_TYPE}:
            # Its kernel does not depend on M.
            m_list = m_list[:1]
"""
_MEMORY = f"""\
        elif kernel_type == DeepGemmKernelType.{KERNEL_TYPE}:
            return hc_prenorm.memory_requirement(max_m, n, k, num_groups)
"""
_MODEL_WARMUP = """\

        model_warmup = getattr(self.model, "kernel_warmup", None)
        if model_warmup is not None:
            model_warmup(self)
"""
# The call sites import the library inside the function.
_THROUGH_THE_WRAPPER = [
    Edit("import deep_gemm\n", "from sglang.srt.layers import deep_gemm_wrapper\n"),
    Edit("deep_gemm.tf32_hc_prenorm_gemm(", "deep_gemm_wrapper.tf32_hc_prenorm_gemm("),
]


def _costs() -> str:
    rows = result("prenorm")["cost"]
    return " and ".join(f"{row['cost_us']:.1f} us on {row['direct_us']:.1f}" for row in rows)


def _method(name: str, function: str) -> str:
    return f"    {name} = mhc_prewarm.{function}\n"


HC_PRENORM = Commit(
    subject="deepseek_v4: warm the mHC prenorm GEMM and its split buckets",
    why="""
        mHC's prenorm calls deep_gemm.tf32_hc_prenorm_gemm past DeepGEMM's warm-up. Its kernel, and TileLang's that
        follows it, are specialised on the number of splits, which follows the token count: the first request that
        lands in a bucket not seen before waits 20 to 40 s for them.

        The GEMM gets a wrapper beside those of the others, with a kernel type, an executor and a memory estimate of its
        own, and all call sites go through it. The kernel depends on (n, k, num_splits) and not on M, so one M warms a
        bucket; the list is not walked in the middle of serving. ModelRunner.kernel_warmup() calls the model's own
        kernel_warmup(), which runs hc_pre of one layer, attention and FFN path, at the largest token count of each
        bucket up to the chunked prefill size.
    """,
    off="""
        with SGLANG_WARMSTART=0 no bucket is warmed, and the wrapper calls the GEMM and does nothing else; likewise
        no bucket is warmed without SGLANG_OPT_DEEPGEMM_HC_PRENORM and SGLANG_OPT_USE_TILELANG_MHC_PRE. Other models
        have no kernel_warmup().
    """,
    tested=f"""
        on the real layers of DeepSeek-V4 and NextN with stand-ins for the two GPU kernels; buckets against their
        definition. As a plugin of an earlier state, on {host_of(result("prenorm"))}:
        the wrapper's results equal those of the direct call bit for bit,
        at {_costs()} of host time. DeepSeek-V4 itself was not run.
    """,
    features=("hc-prenorm", "mhc-prewarm"),
    upstream="#25810",
    modules=("shapes/buckets.py", "rank/hc_prenorm.py", "rank/mhc_prewarm.py"),
    changes={
        COMPILE_UTILS: [
            after(IMPORTS, f"from {IN_SGLANG}.rank import hc_prenorm\n"),
            Within(
                "DeepGemmKernelType", [after("    GEMM_NT_BF16BF16F32 = auto()\n", f"    {KERNEL_TYPE} = auto()\n")]
            ),
            Within(
                COMPILE_ONE,
                [before("        elif kernel_type == DeepGemmKernelType.GROUPED_GEMM_NT_BF16_CONTIG:\n", _ONE_M)],
            ),
            Within(
                "_BaseWarmupExecutor",
                [
                    after(
                        "_BF16GroupedMaskedWarmupExecutor,\n",
                        f"            DeepGemmKernelType.{KERNEL_TYPE}: hc_prenorm.HcPrenormWarmupExecutor,\n",
                    ),
                    before('        else:\n            raise ValueError(f"Invalid kernel type', _MEMORY),
                ],
            ),
        ],
        ENTRYPOINT: [
            after("import logging\n", "import sys\n"),
            after(
                "from sglang.srt.server_args import ServerArgs\n",
                f"from {IN_SGLANG}.rank.hc_prenorm import hc_prenorm_wrapper\n",
            ),
            before("def update_deep_gemm_config(", _WRAPPER),
        ],
        "sglang/srt/layers/mhc.py": [
            after(
                "from sglang.srt.layers.utils.common import strict_contiguous\n",
                f"from {IN_SGLANG}.rank.mhc_prewarm import (  # noqa: F401\n"
                "    get_mhc_pre_token_count_representatives,\n)\n",
            ),
            *_THROUGH_THE_WRAPPER,
        ],
        DEEPSEEK_V4: [
            after(
                "from sglang.srt.utils.hf_transformers_utils import get_rope_config\n",
                f"from {IN_SGLANG}.rank import mhc_prewarm\n",
            ),
            Within(
                "DeepseekV4DecoderLayer",
                [
                    *_THROUGH_THE_WRAPPER,
                    before(
                        "    def hc_post(",
                        _method("prewarm_mhc_token_counts", "prewarm_token_counts")
                        + _method(BUCKETS, "prewarm_buckets_of_layer")
                        + "\n",
                    ),
                ],
            ),
            Within(
                "DeepseekV4Model", [before("    def hc_head(", _method(BUCKETS, "prewarm_buckets_of_stage") + "\n")]
            ),
            Within(
                "DeepseekV4ForCausalLM",
                [
                    before(
                        "    def get_embed_and_head(",
                        _method(BUCKETS, "prewarm_buckets_of_wrapper")
                        + _method("kernel_warmup", "kernel_warmup_of_model")
                        + "\n",
                    )
                ],
            ),
        ],
        "sglang/srt/models/deepseek_v4_nextn.py": [
            after("from sglang.srt.utils import add_prefix\n", f"from {IN_SGLANG}.rank import mhc_prewarm\n"),
            Within(
                "DeepseekV4ModelNextN",
                [before("    def hc_head(", _method(BUCKETS, "prewarm_buckets_of_nextn") + "\n")],
            ),
        ],
        MODEL_RUNNER: [
            Within(
                "ModelRunner.kernel_warmup",
                [
                    Edit(
                        "        Currently only doing FlashInfer autotune.\n",
                        "        FlashInfer autotune, then what the model itself warms.\n",
                    ),
                    after("            self._flashinfer_autotune()\n", _MODEL_WARMUP),
                ],
            )
        ],
    },
)
