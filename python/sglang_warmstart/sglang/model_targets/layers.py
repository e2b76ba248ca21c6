"""Calls each layer of a model alone, and so finds out which GEMMs it calls.

A layer's quantisation method decides what is called. It sees its weights as after loading, and an input of the type of
the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from sglang_warmstart.sglang.model_targets.protocol import NotFound
from sglang_warmstart.sglang.model_targets.recorder import Recorder
from sglang_warmstart.sglang.model_targets.refusal import where

# A whole block of rows of every kernel: no layer has another path for it than for any other number of tokens.
_TOKENS = 128
# In 0.5.23 the model calls mHC's prenorm itself when its weights are loaded.
_BUCKETS_AT_LOAD = "_prewarm_mhc_kernels"
# With it, MLA in 0.5.12 multiplies by its absorbed weights with DeepGEMM.
_MLA_BY_DEEP_GEMM = "SGL_USE_DEEPGEMM_BMM"
# A weight of a layer with mHC.
_OF_MHC = "hc_attn_fn"


@dataclass
class Calls:
    """The layers that were called.

    Args:
        recorder: of the rank.
        dtype: of the model.
    """

    recorder: Recorder
    dtype: Any
    count: int = 0
    not_found: list[NotFound] = field(default_factory=list)

    def call(self, model: Any) -> None:
        """Call every layer of a model that has a quantisation method."""
        if os.environ.get(_MLA_BY_DEEP_GEMM, "false").lower() in ("1", "true"):
            self._not_found("attention", f"{_MLA_BY_DEEP_GEMM}: its GEMMs are in no layer, and are not called")
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if method is None or _holds_no_gemm(module, method):
                continue
            self.count += 1
            try:
                if not (hasattr(module, "is_weights_quantized") and module.is_weights_quantized()):
                    method.process_weights_after_loading(module)
                self._call(module, method)
            except Exception as error:
                # Whatever it is, it is this layer that is not known.
                if not _is_run_by_others(method):
                    self._not_found(name, f"{type(method).__name__}: its call failed: {where(error)}")
            for reason in self.recorder.unknown:
                self._not_found(name, f"deep_gemm.{reason}")
            self.recorder.unknown.clear()

    def call_split_buckets(self, runner: Any) -> None:
        """Call what a model has beside its layers: mHC's prenorm, once for each number of splits."""
        from sglang_warmstart.sglang.mhc_prewarm import BUCKETS, longest_forward

        model = runner.model
        try:
            if hasattr(model, BUCKETS):
                getattr(model, BUCKETS)(longest_forward(runner.server_args), runner.device)
            elif hasattr(model, _BUCKETS_AT_LOAD):
                getattr(model, _BUCKETS_AT_LOAD)()
            elif any(name.endswith(_OF_MHC) for name, _ in model.named_parameters()):
                self._not_found("mHC", "this release of SGLang has no function that calls its prenorm")
        except Exception as error:
            self._not_found("mHC", f"the call of its prenorm failed: {where(error)}")

    def _not_found(self, name: str, reason: str) -> None:
        self.not_found.append(NotFound(name, reason))

    def _call(self, module: Any, method: Any) -> None:
        import torch
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        if isinstance(module, FusedMoE):
            for layout in _layouts():
                with layout:
                    for dispatched in dispatched_to(module, self.dtype):
                        module.run_moe_core(dispatched)
            return
        width = getattr(module, "input_size_per_partition", None) or getattr(module, "input_size", None)
        if width is None:
            width = module.embedding_dim
        method.apply(module, torch.empty((_TOKENS, width), dtype=self.dtype, device="cuda"))


def _is_run_by_others(method: Any) -> bool:
    """Whether the experts of a layer are run by another library than DeepGEMM."""
    runner = getattr(method, "runner", None)
    return runner is not None and not runner.runner_backend.is_deep_gemm()


def _holds_no_gemm(module: Any, method: Any) -> bool:
    """Whether a layer only looks tokens up, or has a quantised cache and no weights."""
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    return isinstance(method, (BaseKVCacheMethod, UnquantizedEmbeddingMethod))


def _layouts() -> Iterator[AbstractContextManager[Any]]:
    """The layouts of rows by expert, between which later releases choose by the memory that is left."""
    from sglang.srt.environ import envs

    choice = getattr(envs, "SGLANG_DEEPGEMM_STANDARD_LAYOUT", None)
    if choice is None or choice.get().lower() != "auto":
        yield nullcontext()
        return
    for layout in ("masked", "compact"):
        yield choice.override(layout)


def dispatched_to(experts: Any, dtype: Any) -> Iterator[Any]:
    """What the dispatcher of a layer of experts hands to them, in each form that it has.

    Source: ``layers/moe/token_dispatcher`` of SGLang 0.5.12.
    """
    import torch
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    backend = get_moe_a2a_backend()
    if backend.is_deepep():
        yield from _by_deepep(experts, dtype)
        return
    if not backend.is_none():
        raise NotImplementedError(f"experts behind --moe-a2a-backend {backend.value}")
    hidden = torch.empty((_TOKENS, experts.hidden_size), dtype=dtype, device="cuda")
    yield experts.dispatcher.dispatch(hidden, _chosen(experts))


def _chosen(experts: Any) -> Any:
    """The experts of each token."""
    import torch
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    shape = (_TOKENS, experts.top_k)
    return StandardTopKOutput(
        torch.empty(shape, dtype=torch.float32, device="cuda"),
        torch.empty(shape, dtype=torch.int32, device="cuda"),
        torch.empty((_TOKENS, experts.num_experts), dtype=torch.float32, device="cuda"),
    )


def _by_deepep(experts: Any, dtype: Any) -> Iterator[Any]:
    """Prefill gets rows by expert in any number, decode a fixed number of rows for each expert."""
    import torch
    from sglang.srt.environ import envs
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput, DeepEPNormalDispatchOutput
    from sglang.srt.layers.moe.utils import get_deepep_mode

    if envs.SGLANG_DEEPEP_BF16_DISPATCH.get():
        raise NotImplementedError("SGLANG_DEEPEP_BF16_DISPATCH")
    if deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0:
        raise NotImplementedError("DeepEP on a GPU with packed scales")
    mode, k, local = get_deepep_mode(), experts.hidden_size, experts.num_local_experts

    def empty(*shape: int, dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device="cuda")

    weights, ids, _ = _chosen(experts)
    if mode.enable_normal():
        yield DeepEPNormalDispatchOutput(
            empty(_TOKENS, k, dtype=torch.float8_e4m3fn),
            empty(_TOKENS, k // 128, dtype=torch.float32),
            ids.to(torch.int64),
            weights,
            [_TOKENS] * local,
        )
    if mode.enable_low_latency():
        yield DeepEPLLDispatchOutput(
            empty(local, _TOKENS, k, dtype=torch.float8_e4m3fn),
            empty(local, k // 128, _TOKENS, dtype=torch.float32).transpose(1, 2),
            ids.to(torch.int64),
            weights,
            empty(local, dtype=torch.int32),
            _TOKENS,
        )
