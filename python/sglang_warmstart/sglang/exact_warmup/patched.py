"""What the last patch of the series calls: exact warm-up in a patched SGLang."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang.exact_warmup.warmup import ExactWarmup
from sglang_warmstart.sglang.exact_warmup.warmup import start_node_service as _start_node_service


class PatchedExactWarmup:
    """Exact warm-up in this process. Whatever fails in it is one warning, and SGLang goes on.

    Args:
        compile_utils: SGLang's DeepGEMM warm-up.
    """

    def __init__(self, compile_utils: ModuleType) -> None:
        exact, hooks = ExactWarmup(compile_utils), Hooks("exact-warmup")

        def begin_forward(_: Callable[..., None]) -> None:
            if exact.rank is not None:
                exact.rank.begin_forward()

        def around(original: Callable[..., None]) -> Callable[..., bool]:
            return exact.around(original, lambda meet, sweep: hooks.guarded(original.__name__, meet, sweep))

        self.forget = exact.forget
        self.around = around
        self.connect = hooks.guarded("connect", lambda _, server_args: exact.connect(server_args), _nothing)
        self.warm = hooks.guarded("warm", lambda _, model_runner: exact.warm(model_runner), _nothing)
        self.begin_forward = hooks.guarded("begin_forward", begin_forward, _nothing)


def start_node_service(server_args: Any) -> None:
    """Start the service beside the ranks (see :func:`.warmup.start_node_service`). Whatever fails is one warning."""
    hooks = Hooks("exact-warmup")
    hooks.guarded("start_node_service", lambda _, arguments: _start_node_service(arguments), _nothing)(server_args)


def _nothing(*_: Any) -> None:
    """What SGLang does at these places without it."""
