"""The edits that let ``ModelRunner._dummy_run`` of SGLang 0.5.12 run an extend forward of a generation model.

The same edits go into the patch series.
"""

from __future__ import annotations

import inspect

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.source_edit import Edit

DUMMY_RUN = "_dummy_run"
OVERRIDE = "forward_mode_override"

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


class ForwardModes:
    """The edit of ``_dummy_run``, which several features need: made with the first, taken back with the last."""

    def __init__(self) -> None:
        self._hooks = Hooks("forward-modes")
        self._users = 0

    def install(self, hooks: Hooks, runner_class: type) -> None:
        """See that ``runner_class._dummy_run`` takes ``forward_mode_override`` as long as these hooks are in place.

        Raises:
            StandsAsideError: it cannot be edited.
        """
        if not self._users:
            if takes_forward_mode(getattr(runner_class, DUMMY_RUN, None)):
                return  # a later release
            self._hooks.edit(runner_class, DUMMY_RUN, DUMMY_RUN_EDITS, "self, batch_size, run_ctx")
        self._users += 1
        hooks.made(f"{runner_class.__module__}.{runner_class.__qualname__}.{DUMMY_RUN}", self._leave)

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._hooks.undo()


FORWARD_MODES = ForwardModes()


def takes_forward_mode(dummy_run: object) -> bool:
    """Whether a ``_dummy_run`` can be told the mode of its forward."""
    return callable(dummy_run) and OVERRIDE in inspect.signature(dummy_run).parameters
