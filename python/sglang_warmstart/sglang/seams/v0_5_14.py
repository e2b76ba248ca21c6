"""SGLang 0.5.14 to 0.5.18: runners beside ``ModelRunner`` warm kernels, and own the dummy forward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, ClassVar

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.sglang.seams.seam import MODEL_RUNNER, BeforeForwards, Seam, Steps

RUNNERS = "sglang.srt.model_executor.runner"
BASE_RUNNER = f"{RUNNERS}.base_runner"
AUTOTUNE = "should_run_flashinfer_autotune"
_EAGLE = "sglang.srt.speculative.eagle_draft"
# Where the padding of context parallelism is: from 0.5.16 on the first.
_CP_PADDING = ("sglang.srt.layers.cp.padding", "sglang.srt.layers.utils.cp_utils")


class Seam0514(Seam):
    """0.5.14 to 0.5.18."""

    releases = "0.5.14 to 0.5.18"
    marks: ClassVar[tuple[str, ...]] = (f"{BASE_RUNNER}:BaseRunner",)
    warm_up_module = BASE_RUNNER
    dummy_run = f"{BASE_RUNNER}.BaseRunner._dummy_run"
    warm_up = (
        f"{BASE_RUNNER}.BaseRunner.warmup",
        f"{BASE_RUNNER}.BaseRunner._{AUTOTUNE}",
        f"{BASE_RUNNER}.{AUTOTUNE}",
    )
    dummy_run_parameters = "self, batch_size, run_ctx, forward_mode_override, buffers"
    forwards = (
        (MODEL_RUNNER, "ModelRunner", "forward"),
        (f"{RUNNERS}.decode_cuda_graph_runner", "DecodeCudaGraphRunner", "capture_one_shape"),
        (f"{RUNNERS}.prefill_cuda_graph_runner", "PrefillCudaGraphRunner", "capture_one_shape"),
        (f"{_EAGLE}_cuda_graph_runner", "EAGLEDraftCudaGraphRunner", "capture_one_shape"),
        (f"{_EAGLE}_extend_cuda_graph_runner", "EAGLEDraftExtendCudaGraphRunner", "capture_one_shape"),
    )
    steps: ClassVar[Steps] = {
        (MODEL_RUNNER, "ModelRunner", "init_torch_distributed"): "distributed",
        (MODEL_RUNNER, "ModelRunner", "load_model"): "load weights",
        (MODEL_RUNNER, "ModelRunner", "alloc_memory_pool"): "memory pool",
        (MODEL_RUNNER, "ModelRunner", "init_attention_backends"): "attention backend",
        (BASE_RUNNER, "BaseRunner", "warmup"): "kernel warm-up",
        (MODEL_RUNNER, "ModelRunner", "init_cuda_graphs"): "CUDA graphs",
    }

    def hook_warm_up(self, hooks: Hooks, module: ModuleType, do: BeforeForwards) -> None:
        """See :class:`Seam`: where ``BaseRunner.warmup`` asks whether FlashInfer is to be autotuned.

        It is called for each runner of a model runner, and asks in the first only, once the workspaces of all-reduces
        are there: what follows may run forwards.
        """
        cls = class_of(module, "BaseRunner")
        running: list[Any] = []

        def asked(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
            if running:
                runner = running.pop()
                do(runner.model_runner, runner)
            return original(*args, **kwargs)

        def warmup(original: Callable[..., None], runner: Any) -> None:
            running.append(runner)
            try:
                original(runner)
            finally:
                running.clear()

        if f"_{AUTOTUNE}" in vars(cls):  # 0.5.14
            hooks.wrap(cls, f"_{AUTOTUNE}", asked, "self")
        elif AUTOTUNE in vars(module):
            hooks.wrap(module, AUTOTUNE, asked, "model_runner", "mr")
        else:
            raise StandsAsideError(f"{BASE_RUNNER}.{AUTOTUNE}", "not there")
        hooks.wrap(cls, "warmup", warmup, "self")

    def layouts(self) -> Sequence[AbstractContextManager[object]]:
        """See :class:`Seam`: from 0.5.18 on, free memory decides for each batch, where nobody else does.

        Source: ``_should_use_masked_standard_layout`` in ``layers/moe/moe_runner/deep_gemm.py``.
        """
        from sglang.srt.environ import envs

        switch = getattr(envs, "SGLANG_DEEPGEMM_STANDARD_LAYOUT", None)
        if switch is None or switch.get().lower() != "auto":
            return super().layouts()
        return tuple(switch.override(layout) for layout in ("masked", "compact"))

    def dummy_forward(self, runner: Any, batch_size: int, mode: Any) -> None:
        """See :class:`Seam`: this one has no buffers of its own."""
        buffers = runner._alloc_dummy_decode_buffers(batch_size)
        runner._dummy_run(batch_size=batch_size, forward_mode_override=mode, buffers=buffers)

    def cp_alignment(self, model_runner: Any) -> int:
        """See :class:`Seam`."""
        for name in _CP_PADDING:
            try:
                padding = importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            size: int = padding.get_cp_padding_align_size()
            return size
        return 1

    def gathered_tp_size(self, model_runner: Any) -> int:
        """See :class:`Seam`."""
        from sglang.srt.runtime_context import get_parallel

        size: int = get_parallel().attn_tp_size if self._gathers(model_runner) else 1
        return size

    def _gathers(self, model_runner: Any) -> bool:
        from sglang.srt.utils import require_gathered_buffer

        return bool(require_gathered_buffer(model_runner.server_args))
