"""SGLang 0.5.12: ``ModelRunner`` does everything."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.source_edit import Edit
from sglang_warmstart.sglang.seams.seam import EXTEND_EDIT, MODEL_RUNNER, BeforeForwards, Seam, Steps

_CUDA_GRAPHS = "sglang.srt.model_executor.cuda_graph_runner"
_PIECEWISE = "sglang.srt.model_executor.piecewise_cuda_graph_runner"
_EAGLE = "sglang.srt.speculative.eagle_draft"
_CACHES = f"{MODEL_RUNNER}_kv_cache_mixin"


class Seam0512(Seam):
    """0.5.12, and what fits no other seam."""

    releases = "0.5.12"
    warm_up_module = MODEL_RUNNER
    dummy_run = f"{MODEL_RUNNER}.ModelRunner._dummy_run"
    warm_up = (f"{MODEL_RUNNER}.ModelRunner.kernel_warmup",)
    # Teach it the mode of its forward; a patch of the series makes the same edits.
    dummy_run_edits: ClassVar[tuple[Edit, ...]] = (
        Edit(
            "    def _dummy_run(self, batch_size: int, run_ctx=None):",
            "    def _dummy_run(\n"
            "        self,\n"
            "        batch_size: int,\n"
            "        run_ctx=None,\n"
            "        forward_mode_override: Optional[ForwardMode] = None,\n"
            "    ):",
        ),
        # The override wins over is_generation; a speculative algorithm wins over both, as before.
        Edit(
            "        if self.is_generation:\n            capture_forward_mode = ForwardMode.DECODE\n",
            "        if forward_mode_override is not None:\n"
            "            capture_forward_mode = forward_mode_override\n"
            "        elif self.is_generation:\n"
            "            capture_forward_mode = ForwardMode.DECODE\n",
        ),
        # Models with mHC hand a wider hidden state from stage to stage.
        Edit(
            "            enable_mamba_track=False,\n",
            "            enable_mamba_track=False,\n"
            '            hc_hidden_size=getattr(self.model_config, "hc_hidden_size", None),\n',
        ),
        Edit(
            "        if not self.is_generation:\n            extend_prefix_lens_cpu = [0] * batch_size\n",
            "        if capture_forward_mode == ForwardMode.EXTEND:\n"
            "            extend_prefix_lens_cpu = [0] * batch_size\n",
        ),
        # The first stage hands on hidden states that are already split over the context-parallel ranks.
        Edit(
            "        if self.server_args.pp_size > 1:\n            pp_proxy_tensors = PPProxyTensors(\n"
            "                {k: v[:num_tokens] for k, v in buffers.pp_proxy_tensors.items()}\n",
            "        if self.server_args.pp_size > 1:\n"
            "            pp_num_tokens = num_tokens\n"
            "            if capture_forward_mode == ForwardMode.EXTEND and self.pp_rank != 0:\n"
            "                pp_num_tokens = num_tokens // max(self.attn_cp_size, 1)\n"
            "            pp_proxy_tensors = PPProxyTensors(\n"
            "                {k: v[:pp_num_tokens] for k, v in buffers.pp_proxy_tensors.items()}\n",
        ),
        EXTEND_EDIT,
    )
    forwards = (
        (MODEL_RUNNER, "ModelRunner", "forward"),
        (_CUDA_GRAPHS, "CudaGraphRunner", "capture_one_batch_size"),
        (_PIECEWISE, "PiecewiseCudaGraphRunner", "capture_one_batch_size"),
        (f"{_EAGLE}_cuda_graph_runner", "EAGLEDraftCudaGraphRunner", "capture_one_batch_size"),
        (f"{_EAGLE}_extend_cuda_graph_runner", "EAGLEDraftExtendCudaGraphRunner", "capture_one_batch_size"),
    )
    steps: ClassVar[Steps] = {
        (MODEL_RUNNER, "ModelRunner", "init_torch_distributed"): "distributed",
        (MODEL_RUNNER, "ModelRunner", "load_model"): "load weights",
        (_CACHES, "ModelRunnerKVCacheMixin", "init_memory_pool"): "memory pool",
        (MODEL_RUNNER, "ModelRunner", "init_attention_backend"): "attention backend",
        (MODEL_RUNNER, "ModelRunner", "kernel_warmup"): "kernel warm-up",
        (MODEL_RUNNER, "ModelRunner", "init_device_graphs"): "CUDA graphs",
        (MODEL_RUNNER, "ModelRunner", "init_piecewise_cuda_graphs"): "piecewise CUDA graphs",
    }

    def hook_warm_up(self, hooks: Hooks, module: ModuleType, do: BeforeForwards) -> None:
        """See :class:`Seam`: at the beginning of ``ModelRunner.kernel_warmup``."""

        def kernel_warmup(original: Callable[..., None], model_runner: Any) -> None:
            if model_runner.device == "cuda":
                do(model_runner, model_runner)
            original(model_runner)

        hooks.wrap(class_of(module, "ModelRunner"), "kernel_warmup", kernel_warmup, "self")

    def cp_alignment(self, model_runner: Any) -> int:
        """See :class:`Seam`."""
        size: int = model_runner.attn_cp_size
        return size

    def gathered_tp_size(self, model_runner: Any) -> int:
        """See :class:`Seam`."""
        from sglang.srt.layers.dp_attention import get_attention_tp_size
        from sglang.srt.utils import require_gathered_buffer

        size: int = get_attention_tp_size() if require_gathered_buffer(model_runner.server_args) else 1
        return size
