"""The edits that let ``ModelRunner._dummy_run`` of SGLang 0.5.12 run an extend forward of a generation model.

The same edits go into the patch series.
"""

from __future__ import annotations

from sglang_warmstart.base.source_edit import Edit

DUMMY_RUN_EDITS = (
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
    # Expert-parallel backends choose their kernels for prefill by this; without an override nothing changes.
    Edit(
        "            set_is_extend_in_batch(False)\n",
        "            set_is_extend_in_batch(forward_mode_override == ForwardMode.EXTEND)\n",
    ),
)
