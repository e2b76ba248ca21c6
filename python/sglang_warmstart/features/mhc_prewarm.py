"""F4: mHC's split buckets are warmed at start-up (:mod:`sglang_warmstart.rank.mhc_prewarm`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.features.feature import Feature, Step
from sglang_warmstart.features.hc_prenorm import DEEPSEEK_V4
from sglang_warmstart.features.pp_parallel_warmup import MODEL_RUNNER
from sglang_warmstart.patch import Patch, class_of
from sglang_warmstart.rank import mhc_prewarm
from sglang_warmstart.rank.mhc_prewarm import BUCKETS

MHC = "sglang.srt.layers.mhc"
NEXTN = "sglang.srt.models.deepseek_v4_nextn"


def install_representatives(patch: Patch, mhc: ModuleType) -> None:
    """Add the function that lists a token count for each bucket, by the module's own rule."""
    patch.add(mhc, "get_mhc_pre_token_count_representatives", mhc_prewarm.get_mhc_pre_token_count_representatives)


def install_methods(patch: Patch, deepseek_v4: ModuleType) -> None:
    """Add the methods to the decoder layer, the model and its wrapper."""
    layer = class_of(deepseek_v4, "DeepseekV4DecoderLayer")
    wrapper = class_of(deepseek_v4, "DeepseekV4ForCausalLM")
    patch.add(layer, "prewarm_mhc_token_counts", mhc_prewarm.prewarm_token_counts)
    patch.add(layer, BUCKETS, mhc_prewarm.prewarm_buckets_of_layer)
    patch.add(class_of(deepseek_v4, "DeepseekV4Model"), BUCKETS, mhc_prewarm.prewarm_buckets_of_stage)
    patch.add(wrapper, BUCKETS, mhc_prewarm.prewarm_buckets_of_wrapper)
    patch.add(wrapper, "kernel_warmup", mhc_prewarm.kernel_warmup_of_model)


def install_nextn(patch: Patch, nextn: ModuleType) -> None:
    """Add the method to NextN's model; its wrapper inherits from the target's."""
    patch.add(class_of(nextn, "DeepseekV4ModelNextN"), BUCKETS, mhc_prewarm.prewarm_buckets_of_nextn)


def install_call(patch: Patch, model_runner: ModuleType) -> None:
    """Call the model's own ``kernel_warmup``, if it has one, after autotune."""

    def kernel_warmup(original: Callable[..., None], self: Any) -> None:
        original(self)
        model_warmup = getattr(self.model, "kernel_warmup", None)
        if self.device == "cuda" and model_warmup is not None:
            model_warmup(self)

    patch.wrap(class_of(model_runner, "ModelRunner"), "kernel_warmup", kernel_warmup, "self")


MHC_PREWARM = Feature(
    name="mhc-prewarm",
    gains="no compile when a request first lands in a split bucket of mHC",
    hooks={
        f"{MHC}.get_mhc_pre_token_count_representatives": "beside the rule for num_splits that it asks",
        f"{DEEPSEEK_V4}.DeepseekV4DecoderLayer.prewarm_mhc_token_counts": "the layer has the weights and the real path",
        f"{DEEPSEEK_V4}.DeepseekV4DecoderLayer.{BUCKETS}": "one token count for each bucket",
        f"{DEEPSEEK_V4}.DeepseekV4Model.{BUCKETS}": "delegates to the first layer of this pipeline stage",
        f"{DEEPSEEK_V4}.DeepseekV4ForCausalLM.{BUCKETS}": "delegates to the model",
        f"{DEEPSEEK_V4}.DeepseekV4ForCausalLM.kernel_warmup": "knows the range of token counts and the gates",
        f"{NEXTN}.DeepseekV4ModelNextN.{BUCKETS}": "NextN has one layer, under another name",
        f"{MODEL_RUNNER}.ModelRunner.kernel_warmup": "calls the model's own warm-up after autotune",
    },
    upstream="#25810",
    drop_when="SGLang 0.5.12.post1 and later have it",
    built_in_as=(
        f"{MHC}:get_mhc_pre_token_count_representatives",
        f"{DEEPSEEK_V4}:{BUCKETS}",
        "sglang.kernels.ops.layernorm.mhc:get_mhc_pre_token_count_representatives",
    ),
    steps=(
        Step((MODEL_RUNNER,), install_call),
        Step((DEEPSEEK_V4,), install_methods, required=False),
        Step((NEXTN,), install_nextn, required=False),
        Step((MHC,), install_representatives, required=False),
    ),
)
