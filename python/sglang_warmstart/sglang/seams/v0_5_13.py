"""SGLang 0.5.13: ``_dummy_run`` is told its mode, and batches are aligned for context parallelism."""

from __future__ import annotations

from typing import Any

from sglang_warmstart.sglang.seams.seam import EXTEND_EDIT
from sglang_warmstart.sglang.seams.v0_5_12 import Seam0512


class Seam0513(Seam0512):
    """0.5.13."""

    releases = "0.5.13"
    # Not what a patch of the series adds to 0.5.12.
    marks = ("sglang.srt.layers.utils.cp_utils:get_cp_padding_align_size",)
    dummy_run_edits = (EXTEND_EDIT,)
    dummy_run_parameters = "self, batch_size, run_ctx, forward_mode_override"

    def cp_alignment(self, model_runner: Any) -> int:
        """See :class:`Seam`."""
        from sglang.srt.layers.utils.cp_utils import get_cp_padding_align_size

        size: int = get_cp_padding_align_size()
        return size
