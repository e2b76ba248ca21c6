"""SGLang 0.5.19 to 0.5.23: what a server has decided on is in a context of the process, not in its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sglang_warmstart.sglang.seams.v0_5_14 import Seam0514


class Seam0519(Seam0514):
    """0.5.19 to 0.5.23, and later ones as far as they are alike."""

    releases = "0.5.19 to 0.5.23"
    marks = (*Seam0514.marks, "sglang.srt.server_args:resolved_dict")

    def decided(self, server_args: Any) -> Mapping[str, Any]:
        """See :class:`Seam`: the record itself has only what the user gave."""
        found: Mapping[str, Any] = server_args.resolved_dict()
        return found

    def server_arguments(self, given: Any = None) -> Any:
        """See :class:`Seam`."""
        if given is not None:
            return given
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()

    def chunked_prefill_size(self, compile_utils: ModuleType, given: Any = None) -> int:
        """See :class:`Seam`."""
        size: int = compile_utils.get_schedule().chunked_prefill_size
        return size

    def tp_group(self, model_runner: Any) -> Any:
        """See :class:`Seam`."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_group

    def disaggregation_mode(self, model_runner: Any) -> str:
        """See :class:`Seam`."""
        from sglang.srt.runtime_context import get_disagg

        mode: str = get_disagg().disaggregation_mode
        return mode

    def _gathers(self, model_runner: Any) -> bool:
        from sglang.srt.utils import require_gathered_buffer

        return bool(require_gathered_buffer())
