"""F6: the hooks of exact warm-up in SGLang (see :mod:`.warmup` for what it does)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks, check_parameters, class_of
from sglang_warmstart.base.switches import COMPILER
from sglang_warmstart.sglang.dummy_run_edits import FORWARD_MODES
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.fast_warmup import COMPILE_UTILS, ENTRYPOINT, chunked_prefill_size
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.hc_prenorm import DIRECT
from sglang_warmstart.sglang.pp_parallel_warmup import MODEL_RUNNER
from sglang_warmstart.sglang.ranks import ENGINE, LAUNCH, before_the_ranks

if TYPE_CHECKING:
    from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup

MAYBE_COMPILE = "_maybe_compile_deep_gemm_one_type_all"


def install_service(hooks: Hooks, engine: ModuleType) -> None:
    """Start the service with the schedulers: it ends with the process that starts them."""

    def start(server_args: Any) -> None:
        # Here and not above: what does the work is imported where there is work.
        from sglang_warmstart.sglang.exact_warmup.warmup import start_node_service

        start_node_service(server_args)

    before_the_ranks(hooks, engine, start)


def install_switch(hooks: Hooks, environ: ModuleType) -> None:
    """Declare the choice of the compiler on ``Envs``."""
    declare(hooks, environ, COMPILER)


class _Installed:
    """The one exact warm-up of this process, made by the step that has what it needs."""

    exact: ExactWarmup | None = None

    def hooks(self, hooks: Hooks, compile_utils: ModuleType, _entrypoint: ModuleType) -> None:
        """Connect each rank when its configuration is known, and take the place of SGLang's own decision."""
        from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup

        original = getattr(compile_utils, MAYBE_COMPILE, None)
        if original is None:
            raise StandsAsideError(f"{COMPILE_UTILS}.{MAYBE_COMPILE}", "not there")
        check_parameters(original, ("kernel_type, n, k, num_groups",), f"{COMPILE_UTILS}.{MAYBE_COMPILE}")
        exact = ExactWarmup(compile_utils, direct=lambda _, function: getattr(function, DIRECT, None) or function)
        self.exact = exact

        def update_deep_gemm_config(update: Callable[..., None], gpu_id: int, *args: Any, **kwargs: Any) -> None:
            update(gpu_id, *args, **kwargs)
            exact.connect(server_arguments(*args, **kwargs), chunked_prefill_size(compile_utils, *args, **kwargs))

        hooks.wrap(compile_utils, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")
        guard = functools.partial(hooks.guarded, f"{COMPILE_UTILS}.{MAYBE_COMPILE}")
        hooks.replace(compile_utils, MAYBE_COMPILE, exact.around(original, guard))
        hooks.also_undo(exact.forget)

    def forwards(self, hooks: Hooks, model_runner: ModuleType) -> None:
        """Tell the rank when a forward begins: the time that it may take in one is bounded."""

        def forward(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
            rank = None if self.exact is None else self.exact.rank
            if rank is not None:
                rank.begin_forward()
            return original(runner, *args, **kwargs)

        hooks.wrap(class_of(model_runner, "ModelRunner"), "forward", forward, "self, forward_batch")

    def discovery(self, hooks: Hooks, model_runner: ModuleType) -> None:
        """Warm all targets of the rank before anything else runs a forward."""
        runner_class = class_of(model_runner, "ModelRunner")
        if "kernel_warmup" not in vars(runner_class):
            return  # a later release: each target is met when it is first called
        try:
            FORWARD_MODES.install(hooks, runner_class)
        except StandsAsideError as error:
            hooks.notes.append(f"exact-warmup runs no dry forwards, and warms targets on their first call: {error}")

        def kernel_warmup(original: Callable[..., None], runner: Any) -> None:
            if self.exact is not None:
                self.exact.warm(runner)
            original(runner)

        hooks.wrap(runner_class, "kernel_warmup", kernel_warmup, "self")


def server_arguments(server_args: Any = None) -> Any:
    """The server's arguments, which 0.5.23 keeps in its runtime context."""
    if server_args is None:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    return server_args


INSTALLED = _Installed()

EXACT_WARMUP = Feature(
    name="exact-warmup",
    gains="each distinct DeepGEMM kernel is compiled once, all at the same time; a restart compiles none",
    hooks={
        f"{ENVIRON}.Envs.{COMPILER.name}": "the choice of the compiler, beside its neighbours",
        LAUNCH: "the process that starts the ranks starts the service, and they find it by their environment",
        f"{COMPILE_UTILS}.update_deep_gemm_config": "runs in each rank before it loads weights: it says hello, so that "
        "the service is ready when it asks",
        f"{COMPILE_UTILS}.{MAYBE_COMPILE}": "all wrapped GEMMs pass it, on every rank; replaced, not wrapped, since "
        "it is on the path of every call",
        f"{MODEL_RUNNER}.ModelRunner.forward": "the time that a target may take is bounded for each forward",
        f"{MODEL_RUNNER}.ModelRunner._dummy_run": "a dry forward needs to be told its mode; the same edit as "
        "pp-parallel-warmup's, made once for both",
        f"{MODEL_RUNNER}.ModelRunner.kernel_warmup": "after memory is measured and before any forward: the marker is "
        "read, or dry forwards find the targets, and all are warmed at once",
    },
    upstream="none",
    drop_when="upstream compiles each distinct kernel once, in parallel, before it serves",
    built_in_as=(f"{COMPILE_UTILS}:EXACT_WARMUP",),  # by a patch of the series
    steps=(
        Step((ENVIRON,), install_switch),
        Step((COMPILE_UTILS, ENTRYPOINT), INSTALLED.hooks),
        Step((ENGINE,), install_service, required=False),
        Step((MODEL_RUNNER,), INSTALLED.forwards, required=False),
        Step((MODEL_RUNNER,), INSTALLED.discovery, required=False),
    ),
)
