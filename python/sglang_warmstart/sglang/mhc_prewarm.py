"""F4: warm mHC's split buckets at start-up, with one token count each.

The token count decides the number of splits of mHC's prenorm, and the kernels of both DeepGEMM and TileLang are
specialised on that number. The first request in a new bucket waits for them to compile: 20 to 40 s, says upstream.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.hc_prenorm import DEEPSEEK_V4, MHC
from sglang_warmstart.sglang.mhc_at_once import at_once
from sglang_warmstart.sglang.seams.seam import MODEL_RUNNER

if TYPE_CHECKING:
    import torch

NEXTN = "sglang.srt.models.deepseek_v4_nextn"
# The method of layers and models alike.
BUCKETS = "prewarm_mhc_token_count_buckets"

logger = logging.getLogger(LOGGER_NAME)


def largest_of_each_bucket(bucket_of: Callable[[int], int], max_num_tokens: int) -> tuple[int, ...]:
    """The largest token count of every bucket over ``1..max_num_tokens``, in order of the bucket.

    Args:
        bucket_of: the library's own rule, token count -> bucket (for mHC: ``num_splits``). It is asked for
            each count: a copy of the rule here would be wrong on the day the library changes it.
        max_num_tokens: the largest token count that can come up; nothing is returned below 1.

    Source: SGLang PR #25810.
    """
    largest = {bucket_of(num_tokens): num_tokens for num_tokens in range(1, max_num_tokens + 1)}
    return tuple(largest[bucket] for bucket in sorted(largest))


def get_mhc_pre_token_count_representatives(max_num_tokens: int, hc_hidden_size: int) -> tuple[int, ...]:
    """The largest token count of each distinct num_splits over 1..max_num_tokens, in order of num_splits.

    Args:
        max_num_tokens: tokens in a forward at the most; there are no buckets below 1.
        hc_hidden_size: hc_mult * hidden_size.

    Source: SGLang PR #25810.
    """
    from sglang.srt.layers import mhc

    return largest_of_each_bucket(
        lambda num_tokens: mhc._compute_num_split_for_mhc_pre(num_tokens, hc_hidden_size), max_num_tokens
    )


def prewarm_token_counts(layer: Any, token_counts: Sequence[int], device: torch.device | str) -> None:
    """Run the layer's real ``hc_pre``, attention and FFN path, on dummy residuals of each token count.

    Residuals are (num_tokens, hc_mult, hidden_size) bf16 and freed at once.
    """
    import torch

    paths = {
        "attention": (layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base, layer.input_layernorm),
        "ffn": (layer.hc_ffn_fn, layer.hc_ffn_scale, layer.hc_ffn_base, layer.post_attention_layernorm),
    }

    def run(say: Callable[..., None]) -> None:
        with torch.inference_mode():
            for num_tokens in token_counts:
                for path, (fn, scale, base, norm) in paths.items():
                    start = time.perf_counter()
                    shape = (num_tokens, layer.hc_mult, layer.hidden_size)
                    layer.hc_pre(torch.empty(shape, dtype=torch.bfloat16, device=device), fn, scale, base, norm=norm)
                    torch.get_device_module(device).synchronize()
                    say(path, num_tokens, time.perf_counter() - start)

    at_once(lambda: run(lambda *_: None))
    run(functools.partial(logger.info, "warmstart: mHC prewarm: path=%s num_tokens=%d in %.3f s"))


def prewarm_buckets_of_layer(layer: Any, max_num_tokens: int, device: torch.device | str) -> tuple[int, ...]:
    """Warm every bucket that ``1..max_num_tokens`` tokens can land in. Returns the token counts used."""
    from sglang.srt.layers.mhc import get_mhc_pre_token_count_representatives

    token_counts: tuple[int, ...] = get_mhc_pre_token_count_representatives(
        max_num_tokens, layer.hc_mult * layer.hidden_size
    )
    layer.prewarm_mhc_token_counts(token_counts, device)
    return token_counts


def prewarm_buckets_of_stage(model: Any, max_num_tokens: int, device: torch.device | str) -> tuple[int, ...]:
    """As for a layer, on the first decoder layer of this pipeline stage. A stage without layers has no buckets."""
    if model.start_layer == model.end_layer:
        return ()
    counts: tuple[int, ...] = getattr(model.layers[model.start_layer], BUCKETS)(max_num_tokens, device)
    return counts


def prewarm_buckets_of_wrapper(model: Any, max_num_tokens: int, device: torch.device | str) -> tuple[int, ...]:
    """As for a layer, on the model inside."""
    counts: tuple[int, ...] = getattr(model.model, BUCKETS)(max_num_tokens, device)
    return counts


def prewarm_buckets_of_nextn(model: Any, max_num_tokens: int, device: torch.device | str) -> tuple[int, ...]:
    """As for a layer, on NextN's only decoder layer."""
    counts: tuple[int, ...] = getattr(model.decoder, BUCKETS)(max_num_tokens, device)
    return counts


def longest_forward(server_args: Any) -> int:
    """Tokens that a forward can have at the most."""
    chunk: int | None = server_args.chunked_prefill_size
    longest: int = chunk if chunk is not None and chunk >= 1 else server_args.max_prefill_tokens
    return longest


def kernel_warmup_of_model(model: Any, model_runner: Any) -> None:
    """Warm the buckets of every token count that a forward of this server can have.

    That is the chunked prefill size, already divided by dp_size under DP attention; where prefill is not chunked,
    ``max_prefill_tokens``. A failure is said and leaves the buckets to first use, unless strict mode raises it.
    """
    from sglang.srt.environ import envs

    wanted = (
        envs.SGLANG_WARMSTART.get()
        and model_runner.is_hybrid_swa
        and envs.SGLANG_OPT_DEEPGEMM_HC_PRENORM.get()
        and envs.SGLANG_OPT_USE_TILELANG_MHC_PRE.get()
    )
    if not wanted:
        return
    max_num_tokens = longest_forward(model_runner.server_args)
    start = time.perf_counter()
    try:
        token_counts = getattr(model, BUCKETS)(max_num_tokens, model_runner.device)
    except Exception as error:
        if envs.SGLANG_WARMSTART_STRICT.get():
            raise
        logger.warning("warmstart: mHC prewarm failed, its kernels compile on first use: %s", error)
        return
    logger.info(
        "warmstart: mHC prewarm: %d buckets of up to %d tokens in %.2f s: %s",
        len(token_counts),
        max_num_tokens,
        time.perf_counter() - start,
        token_counts,
    )


def install_representatives(hooks: Hooks, mhc: ModuleType) -> None:
    """Add the function that lists a token count for each bucket, by the module's own rule."""
    hooks.add(mhc, "get_mhc_pre_token_count_representatives", get_mhc_pre_token_count_representatives)


def install_methods(hooks: Hooks, deepseek_v4: ModuleType) -> None:
    """Add the methods to the decoder layer, the model and its wrapper. The layer of 0.5.13 has its own."""
    layer = class_of(deepseek_v4, "DeepseekV4DecoderLayer")
    wrapper = class_of(deepseek_v4, "DeepseekV4ForCausalLM")
    if not hasattr(layer, BUCKETS):
        hooks.add(layer, "prewarm_mhc_token_counts", prewarm_token_counts)
        hooks.add(layer, BUCKETS, prewarm_buckets_of_layer)
    hooks.add(class_of(deepseek_v4, "DeepseekV4Model"), BUCKETS, prewarm_buckets_of_stage)
    hooks.add(wrapper, BUCKETS, prewarm_buckets_of_wrapper)
    hooks.add(wrapper, "kernel_warmup", kernel_warmup_of_model)


def install_nextn(hooks: Hooks, nextn: ModuleType) -> None:
    """Add the method to NextN's model; its wrapper inherits from the target's."""
    hooks.add(class_of(nextn, "DeepseekV4ModelNextN"), BUCKETS, prewarm_buckets_of_nextn)


def install_call(hooks: Hooks, model_runner: ModuleType) -> None:
    """Call the model's own ``kernel_warmup``, if it has one, after autotune."""

    def kernel_warmup(original: Callable[..., None], self: Any) -> None:
        original(self)
        model_warmup = getattr(self.model, "kernel_warmup", None)
        if self.device == "cuda" and model_warmup is not None:
            model_warmup(self)

    hooks.wrap(class_of(model_runner, "ModelRunner"), "kernel_warmup", kernel_warmup, "self")


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
    drop_when="SGLang 0.5.12.post1, 0.5.14 and later have it; 0.5.13 has the methods of a layer, and nobody calls them",
    built_in_as=(
        f"{DEEPSEEK_V4}:{BUCKETS} called in {DEEPSEEK_V4}",
        f"{MHC}:_prewarm_mhc_pre called in {MHC}",
        f"{MHC}:prewarm_mhc_pre called in {DEEPSEEK_V4}",
        f"sglang.kernels.ops.layernorm.mhc:prewarm_mhc_pre called in {DEEPSEEK_V4}",
    ),
    steps=(
        Step((MODEL_RUNNER,), install_call),
        Step((DEEPSEEK_V4,), install_methods, required=False),
        Step((NEXTN,), install_nextn, required=False),
        Step((MHC,), install_representatives, required=False),
    ),
)
