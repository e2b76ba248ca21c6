"""F1: every pipeline rank warms its own kernels at the same time (:mod:`sglang_warmstart.rank.pp_parallel_warmup`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.features.dummy_run_edits import DUMMY_RUN_EDITS
from sglang_warmstart.features.envs import ENVIRON, declare_bool
from sglang_warmstart.features.feature import Feature, Step
from sglang_warmstart.patch import Patch, class_of
from sglang_warmstart.rank.pp_parallel_warmup import is_wanted, pp_parallel_deep_gemm_warmup
from sglang_warmstart.switches import PP_PARALLEL

COMPILE_UTILS = "sglang.srt.layers.deep_gemm_wrapper.compile_utils"
MODEL_RUNNER = "sglang.srt.model_executor.model_runner"


def install_switch(patch: Patch, environ: ModuleType) -> None:
    """Declare the switch on ``Envs``."""
    declare_bool(patch, environ, PP_PARALLEL)


def install_warmup(patch: Patch, compile_utils: ModuleType, model_runner: ModuleType) -> None:
    """Add the function, teach ``_dummy_run`` the forward mode, and call it at the end of ``kernel_warmup``."""

    def kernel_warmup(original: Callable[..., None], self: Any) -> None:
        original(self)
        if is_wanted(self, compile_utils):
            compile_utils.pp_parallel_deep_gemm_warmup(self)

    patch.add(compile_utils, "pp_parallel_deep_gemm_warmup", pp_parallel_deep_gemm_warmup)
    runner_class = class_of(model_runner, "ModelRunner")
    patch.edit(runner_class, "_dummy_run", DUMMY_RUN_EDITS, "self, batch_size, run_ctx")
    patch.wrap(runner_class, "kernel_warmup", kernel_warmup, "self")


PP_PARALLEL_WARMUP = Feature(
    name="pp-parallel-warmup",
    gains="every pipeline rank warms its own kernels at the same time",
    hooks={
        f"{ENVIRON}.Envs.{PP_PARALLEL.name}": "the switch, beside its neighbours",
        f"{COMPILE_UTILS}.pp_parallel_deep_gemm_warmup": "where upstream has it from 0.5.13 on",
        f"{MODEL_RUNNER}.ModelRunner._dummy_run": "it can run a decode forward of a generation model only; edited in "
        "place, since what has to change lies between its lines",
        f"{MODEL_RUNNER}.ModelRunner.kernel_warmup": "the last thing before CUDA graphs are captured, on every rank",
    },
    upstream="#26567",
    drop_when="SGLang 0.5.13 and later have it",
    built_in_as=(f"{COMPILE_UTILS}:pp_parallel_deep_gemm_warmup",),
    steps=(
        Step((ENVIRON,), install_switch),
        Step((COMPILE_UTILS, MODEL_RUNNER), install_warmup),
    ),
)
