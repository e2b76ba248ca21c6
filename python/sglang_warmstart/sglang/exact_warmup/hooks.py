"""F6: the hooks of exact warm-up in SGLang (see :mod:`.warmup` for what it does)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks, check_parameters, class_of
from sglang_warmstart.base.switches import COMPILER
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.fast_warmup import COMPILE_UTILS, ENTRYPOINT
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.forward_modes import FORWARD_MODES
from sglang_warmstart.sglang.hc_prenorm import DIRECT
from sglang_warmstart.sglang.ranks import ENGINE, LAUNCH, before_the_ranks
from sglang_warmstart.sglang.seams import SEAMS, seam

if TYPE_CHECKING:
    from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup

EXECUTORS = "_BaseWarmupExecutor"
TAKE_OVER = "set_gemm_warmup_provider"
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


@dataclass(frozen=True)
class _Provider:
    """What a patched SGLang asks (patches/sglang-0.5.23, the last patch).

    Args:
        warmup_group: see to the kernels of a GEMM that is about to be called; whether that leaves SGLang nothing to do.
        warmup_runner: warm all targets of a model runner before its first forward.
    """

    warmup_group: Callable[[Any, int, int, int], bool]
    warmup_runner: Callable[[Any], None]


def _nothing(*_: Any) -> None:
    """What SGLang does there without it."""


class _Installed:
    """The one exact warm-up of this process, made by the step that has what it needs."""

    exact: ExactWarmup | None = None
    provides = False  # SGLang itself asks, and calls before the first forward

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
            chunk = seam().chunked_prefill_size(compile_utils, *args, **kwargs)
            exact.connect(seam().server_arguments(*args, **kwargs), chunk)

        hooks.wrap(compile_utils, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")
        guard = functools.partial(hooks.guarded, f"{COMPILE_UTILS}.{MAYBE_COMPILE}")
        decide = exact.around(original, guard)
        take_over = getattr(compile_utils, TAKE_OVER, None)
        if take_over is None:
            hooks.replace(compile_utils, MAYBE_COMPILE, decide)
        else:
            warm = hooks.guarded(f"{COMPILE_UTILS}.{TAKE_OVER}", lambda _, runner: exact.warm_runner(runner), _nothing)
            take_over(_Provider(decide, warm))
            hooks.made(f"{COMPILE_UTILS}.{TAKE_OVER}", lambda: take_over(None))
            self.provides = True
        hooks.also_undo(exact.forget)

        def create(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return exact.bounded(original(*args, **kwargs))

        hooks.wrap(class_of(compile_utils, EXECUTORS), "create", create, "kernel_type, kwargs")

    def forwards(self, hooks: Hooks, module: ModuleType) -> None:
        """Tell the rank when a forward begins: the time that it may take in one is bounded."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            rank = None if self.exact is None else self.exact.rank
            if rank is not None:
                rank.begin_forward()
            return original(*args, **kwargs)

        for _, owner, method in (each for each in seam().forwards if each[0] == module.__name__):
            try:
                hooks.wrap_any(class_of(module, owner), method, forward)
            except StandsAsideError as error:
                hooks.lacks(f"exact-warmup does not see where a forward begins: {error}")

    def discovery(self, hooks: Hooks, module: ModuleType) -> None:
        """Warm all targets of the rank before anything else runs a forward."""
        if module.__name__ != seam().warm_up_module:
            return

        def warm(model_runner: Any, runner: Any) -> None:
            if self.exact is not None:
                self.exact.warm(model_runner, runner)

        try:
            if not self.provides:
                seam().hook_warm_up(hooks, module, warm)
            FORWARD_MODES.install(hooks, module)
        except StandsAsideError as error:
            hooks.lacks(f"exact-warmup runs no dry forwards, and warms targets on their first call: {error}")


INSTALLED = _Installed()
_FORWARDS = {module for each in SEAMS for module, _, _ in each.forwards}
_WARM_UPS = {each.warm_up_module for each in SEAMS}

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
        f"{COMPILE_UTILS}.{TAKE_OVER}": "in a patched SGLang, which asks before a GEMM and calls before the first "
        "forward; then neither the function above nor the warm-up below is touched",
        f"{COMPILE_UTILS}.{EXECUTORS}.create": "SGLang's own warm-up, where a target is left to it, ends with the "
        "time of the forward",
        **dict.fromkeys(
            (".".join(place) for each in reversed(SEAMS) for place in each.forwards),
            "the time that a target may take is bounded for each forward, and for each graph that is captured",
        ),
        **dict.fromkeys(
            (each.dummy_run for each in reversed(SEAMS)),
            "a dry forward is to be of a mode, and an extend forward is to choose kernels as a prefill does; the same "
            "edit as pp-parallel-warmup's, made once for both",
        ),
        **dict.fromkeys(
            (name for each in reversed(SEAMS) for name in each.warm_up),
            "after memory is measured and before any forward: the marker is read, or dry forwards find the targets, "
            "and all are warmed at once",
        ),
    },
    upstream="none",
    drop_when="upstream compiles each distinct kernel once, in parallel, before it serves",
    built_in_as=(f"{COMPILE_UTILS}:EXACT_WARMUP",),  # by a patch of the series
    steps=(
        Step((ENVIRON,), install_switch),
        Step((COMPILE_UTILS, ENTRYPOINT), INSTALLED.hooks),
        Step((ENGINE,), install_service, required=False),
        *(Step((name,), INSTALLED.forwards, required=False) for name in sorted(_FORWARDS)),
        *(Step((name,), INSTALLED.discovery, required=False) for name in sorted(_WARM_UPS)),
    ),
)
