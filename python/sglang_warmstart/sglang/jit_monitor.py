"""Report or refuse a kernel that is compiled while serving (:mod:`sglang_warmstart.libraries.monitor`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from sglang_warmstart.base.errors import StandsAsideError, is_intended
from sglang_warmstart.base.events import log_of_process
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import JIT_MONITOR, SERVICE
from sglang_warmstart.libraries.deep_gemm import DeepGemm
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.fast_warmup import COMPILE_UTILS, ENTRYPOINT
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.seams import seam
from sglang_warmstart.sglang.start_up_events import SCHEDULER

if TYPE_CHECKING:
    from sglang_warmstart.libraries.deep_gemm_watch import DeepGemmWatch
    from sglang_warmstart.libraries.monitor import JitWhileServingError, Mode

DEEP_GEMM = LIBRARIES[DeepGemm.name]

logger = logging.getLogger(LOGGER_NAME)


def mode_of(environment: Mapping[str, str]) -> Mode:
    """What is to become of a JIT compile while serving."""
    return cast("Mode", JIT_MONITOR.value(environment))


def install_switch(hooks: Hooks, environ: ModuleType) -> None:
    """Declare the switch on ``Envs``, and say if its value is none that it has."""
    declare(hooks, environ, JIT_MONITOR)
    complaint = JIT_MONITOR.read(os.environ)[1]
    if complaint:
        hooks.notes.append(complaint)


def install_listener(hooks: Hooks, scheduler: ModuleType) -> None:
    """In a rank, hear of every compile from when its events are recorded."""

    def run_event_loop(original: Callable[..., None], self: Any) -> None:
        mode = mode_of(os.environ)
        log = log_of_process()
        if mode != "off" and log is None:
            logger.warning("warmstart: the JIT monitor watches nothing here: no events are recorded in this process")
        if mode != "off" and log is not None:
            further = self.server_args.node_rank > 0
            if mode == "error" and further:
                logger.warning(
                    "warmstart: on this node JIT is reported but not refused: further nodes do not learn when the "
                    "server is ready"
                )
            # Here and not above: what watches is imported where there is something to watch.
            from sglang_warmstart.libraries.monitor import JitMonitor

            log.listeners.append(JitMonitor("warn" if further else mode))
        original(self)

    hooks.wrap(class_of(scheduler, "Scheduler"), "run_event_loop", run_event_loop, "self")


def _watching(library: Library, install: Callable[..., None]) -> Callable[..., None]:
    """A step that watches a library. Where that looks different it is not watched, which is said; the others are."""

    def install_watch(hooks: Hooks, *modules: ModuleType) -> None:
        if mode_of(os.environ) == "off":
            return
        try:
            install(hooks, *modules)
        except StandsAsideError as error:
            hooks.lacks(f"the JIT monitor does not watch {library.name}: {error.target}: {error.reason}")

    return install_watch


def watch_deep_gemm_here(hooks: Hooks, compile_utils: ModuleType, entrypoint: ModuleType) -> None:
    """Stand before DeepGEMM's compiler in each rank, before SGLang first calls DeepGEMM.

    A DeepJIT asks for its compiler then, even if the call is one that compiles nothing (``set_pdl``).
    """
    refuse = mode_of(os.environ) == "error"
    watch: DeepGemmWatch | None = None

    def update_deep_gemm_config(original: Callable[..., None], gpu_id: int, *args: Any, **kwargs: Any) -> None:
        if watch is None:
            begin(*args, **kwargs)
        original(gpu_id, *args, **kwargs)

    def begin(*args: Any, **kwargs: Any) -> None:
        nonlocal watch
        log = log_of_process()
        if log is None or not compile_utils.ENABLE_JIT_DEEPGEMM:
            return
        from sglang_warmstart.deepgemm.compiler import CompilerError
        from sglang_warmstart.libraries.deep_gemm_watch import DeepGemmWatch
        from sglang_warmstart.sglang.exact_warmup.warmup import is_wanted

        try:
            further = seam().server_arguments(*args, **kwargs).node_rank > 0
            watch = DeepGemmWatch(
                log, os.environ, refuse=refuse and not further, exact=is_wanted() and SERVICE in os.environ
            )
        except (CompilerError, OSError) as error:
            logger.warning("warmstart: the JIT monitor does not watch %s: %s", DEEP_GEMM.name, error)
        else:
            hooks.also_undo(watch.stop)

    def deep_gemm_execution_hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inside = original(*args, **kwargs)
        if watch is None:
            return inside
        # SGLang leaves the context later, outside of this hook.
        name = f"{COMPILE_UTILS}.deep_gemm_execution_hook"
        return _Refusing(inside, hooks.guarded(name, _refusal_of(watch), lambda: None))

    hooks.wrap(entrypoint, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")
    if refuse:
        # DeepGEMM's own error does not say what failed, and why. Not in the default mode: it is on every call's path.
        hooks.wrap(
            compile_utils, "deep_gemm_execution_hook", deep_gemm_execution_hook, "m, n, k, num_groups, kernel_type"
        )


def _refusal_of(watch: DeepGemmWatch) -> Callable[..., JitWhileServingError | None]:
    return lambda _: watch.refusal()


@dataclass
class _Refusing(AbstractContextManager[None]):
    """What SGLang puts around a GEMM, and an error that says why if the GEMM was made to fail."""

    inside: AbstractContextManager[None]
    refusal: Callable[[], JitWhileServingError | None]

    def __enter__(self) -> None:
        self.inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        try:
            self.inside.__exit__(kind, error, traceback)
        finally:
            if isinstance(error, RuntimeError) and not is_intended(error):
                refusal = self.refusal()
                if refusal is not None:
                    raise refusal from error
        return False


JIT_MONITORING = Feature(
    name="jit-monitor",
    gains="a kernel that is compiled while serving is reported, or refused, with what would have covered it",
    hooks={
        f"{ENVIRON}.Envs.{JIT_MONITOR.name}": "the switch, beside its neighbours",
        f"{SCHEDULER}.Scheduler.run_event_loop": "a rank that begins to serve hears of compiles from now on",
        f"{ENTRYPOINT}.update_deep_gemm_config": "runs in each rank before SGLang first calls DeepGEMM, which asks for "
        "its compiler then",
        f"{COMPILE_UTILS}.deep_gemm_execution_hook": "in mode error only: around every wrapped GEMM, so that one that "
        "is refused says why",
        **{target: why for library in LIBRARIES.values() for target, why in library.hooks.items()},
    },
    upstream="none",
    drop_when="upstream reports what is compiled while serving",
    built_in_as=(),
    steps=(
        Step((ENVIRON,), install_switch),
        Step((SCHEDULER,), install_listener, required=False),
        Step((COMPILE_UTILS, ENTRYPOINT), _watching(DEEP_GEMM, watch_deep_gemm_here), required=False),
        *(
            Step((library.module,), _watching(library, library.watch), required=False)
            for library in LIBRARIES.values()
            if library.module
        ),
    ),
)
