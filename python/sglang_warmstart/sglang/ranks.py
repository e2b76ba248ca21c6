"""Where SGLang starts the ranks of a node: what serves the whole node begins just before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.base.guard import Around
from sglang_warmstart.base.hooks import Hooks, class_of

ENGINE = "sglang.srt.entrypoints.engine"
LAUNCH = f"{ENGINE}.Engine._launch_scheduler_processes"


def before_the_ranks(hooks: Hooks, engine: ModuleType, do: Callable[[Any], None]) -> None:
    """Call ``do(server_args)`` before the ranks of this node are started."""

    def launch_scheduler_processes(
        original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        do(server_args)
        return original(cls, server_args, *args, **kwargs)

    around_the_launch(hooks, engine, launch_scheduler_processes)


def around_the_launch(hooks: Hooks, engine: ModuleType, launch_scheduler_processes: Around) -> None:
    """Wrap the function that starts the ranks of this node.

    Raises:
        StandsAsideError: it takes other arguments than those of SGLang 0.5.12 to 0.5.23.
    """
    hooks.wrap(
        class_of(engine, "Engine"),
        "_launch_scheduler_processes",
        launch_scheduler_processes,
        "cls, server_args, port_args, run_scheduler_process_func",
        "cls, server_args, port_args, run_scheduler_process_func, placement_group",
    )
