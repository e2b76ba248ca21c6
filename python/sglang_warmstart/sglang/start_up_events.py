"""Record the steps of a start as events (:mod:`sglang_warmstart.base.events`), and count them in metrics."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.events import close_log, emit, log_of_process, now, open_log, timed
from sglang_warmstart.base.guard import Around
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import EVENTS, METRICS
from sglang_warmstart.sglang.caches import deep_gemm_cache
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.ranks import ENGINE, LAUNCH, around_the_launch
from sglang_warmstart.sglang.seams import SEAMS, seam

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
SCHEDULER = "sglang.srt.managers.scheduler"

logger = logging.getLogger(LOGGER_NAME)


def begin_run(server_args: Any) -> None:
    """Make the directory of this run, for this process and those that it starts."""
    from sglang_warmstart.base import runs

    directory, problem = runs.new_run(deep_gemm_cache(os.environ))
    if problem:
        logger.warning("warmstart: events of this run are not kept: %s", problem)
    os.environ[EVENTS] = str(directory)
    os.environ.pop(METRICS, None)
    if server_args.enable_metrics and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        os.environ[METRICS] = "1"
    log = open_log("main", os.environ)
    if log is not None:
        emit("step", "imports", log.process.started, now() - log.process.started)


def server_is_ready() -> None:
    """From now on, what is compiled is compiled while serving. Every process of the node learns of it."""
    from sglang_warmstart.base import runs

    log = log_of_process()
    if log is not None:
        emit("ready", "server", now())
        try:
            runs.say_ready(log.directory)
        except OSError as error:
            logger.warning(
                "warmstart: the ranks do not learn that the server is ready, so the JIT monitor reports nothing: %s",
                error,
            )


def install_run(hooks: Hooks, engine: ModuleType) -> None:
    """Begin a run with the first thing that belongs to it, and end its start-up where no HTTP server does."""

    def launch_scheduler_processes(
        original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        begin_run(server_args)
        with timed("step", "launch"):
            return original(cls, server_args, *args, **kwargs)

    cls = class_of(engine, "Engine")
    constructor = inspect.unwrap(vars(cls)["__init__"]).__code__

    def launch_subprocesses(
        original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        launched = original(cls, server_args, *args, **kwargs)
        # It cannot be seen at the constructor itself: that is what loads plugins.
        in_engine = any(frame.f_code is constructor for frame in _callers(sys._getframe()))
        if in_engine or _warms_up_elsewhere(server_args):
            server_is_ready()
        return launched

    around_the_launch(hooks, engine, launch_scheduler_processes)
    hooks.wrap_any(cls, "_launch_subprocesses", launch_subprocesses)
    hooks.also_undo(close_log)


def _warms_up_elsewhere(server_args: Any) -> bool:
    """Whether the HTTP server's own warm-up is made by processes of uvicorn's or Granian's, which load no plugin."""
    several = getattr(server_args, "tokenizer_worker_num", 1) > 1
    return server_args.node_rank == 0 and (several or getattr(server_args, "enable_http2", False))


def install_ready(hooks: Hooks, http_server: ModuleType) -> None:
    """The server is ready when its own warm-up has ended."""

    def _wait_and_warmup(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with timed("step", "server warm-up"):
            original(*args, **kwargs)
        server_is_ready()

    hooks.wrap(http_server, "_wait_and_warmup", _wait_and_warmup, "server_args, launch_callback, execute_warmup_func")


def install_rank(hooks: Hooks, scheduler: ModuleType) -> None:
    """A scheduler's process is a rank."""
    cls = class_of(scheduler, "Scheduler")
    signature = inspect.signature(vars(cls)["__init__"])

    def __init__(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        log = open_log("rank", os.environ, **_labels(signature.bind(*args, **kwargs).arguments))
        if log is not None:
            emit("step", "imports", log.process.started, now() - log.process.started)
        with timed("step", "scheduler"):
            original(*args, **kwargs)

    def run_event_loop(original: Callable[..., None], self: Any) -> None:
        # Further nodes have no HTTP server, and nobody tells them when that of the first one is ready.
        log = log_of_process()
        if self.server_args.node_rank > 0 and log is not None:
            emit("ready", "rank", now())
            log.begin_serving()
        original(self)

    hooks.wrap_any(cls, "__init__", __init__)
    hooks.wrap(cls, "run_event_loop", run_event_loop, "self")


def install_steps(hooks: Hooks, module: ModuleType) -> None:
    """Record how long each step of a rank's start-up takes."""
    for (where, owner, method), name in seam().steps.items():
        if where == module.__name__:
            try:
                hooks.wrap_any(class_of(module, owner), method, _timed(name))
            except StandsAsideError as error:
                hooks.lacks(f'start-up-events has no step "{name}": {error}')


def _timed(name: str) -> Around:
    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with timed("step", name):
            return original(*args, **kwargs)

    return step


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _labels(arguments: dict[str, Any]) -> dict[str, str]:
    names = ("dp_rank", "pp_rank", "tp_rank")
    given = {name: arguments[name] for name in names if name in arguments}
    if not given:
        # In 0.5.23 a rank finds its place by its runtime context.
        from sglang.srt.runtime_context import get_parallel

        given = {name: getattr(get_parallel(), name, None) for name in names}
    return {name: str(value) for name, value in given.items() if value is not None}


_STEPS = {module for each in SEAMS for module, _, _ in each.steps}

START_UP_EVENTS = Feature(
    name="start-up-events",
    gains="what each second of a start-up went to, as events for `sglang-warmstart report`, and metrics",
    hooks={
        LAUNCH: "runs once per node before any rank; wrapped last, so that the "
        "run begins before anything that has events",
        f"{ENGINE}.Engine._launch_subprocesses": "an engine without HTTP is ready when this ends; its constructor is "
        "what loads plugins, and cannot be hooked by one",
        f"{HTTP_SERVER}._wait_and_warmup": "when it ends, the server is ready",
        f"{SCHEDULER}.Scheduler.__init__": "the first thing in a rank that knows which one it is",
        f"{SCHEDULER}.Scheduler.run_event_loop": "further nodes have nobody else who says that they are ready",
        **{".".join(place): f"the step: {name}" for each in reversed(SEAMS) for place, name in each.steps.items()},
    },
    upstream="none",
    drop_when="upstream says what its start-up goes to",
    built_in_as=(),
    steps=(
        Step((ENGINE,), install_run, required=False),
        Step((HTTP_SERVER,), install_ready, required=False),
        Step((SCHEDULER,), install_rank, required=False),
        *(Step((name,), install_steps, required=False) for name in sorted(_STEPS)),
    ),
)
