"""Let SGLang's dummy forward run an extend forward as a prefill does."""

from __future__ import annotations

import inspect
from types import ModuleType

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.sglang.seams import seam
from sglang_warmstart.sglang.seams.seam import EXTEND_EDIT

DUMMY_RUN = "_dummy_run"
OVERRIDE = "forward_mode_override"


class ForwardModes:
    """The edit of ``_dummy_run``, which several features need: made with the first, taken back with the last."""

    def __init__(self) -> None:
        self._hooks = Hooks("forward-modes")
        self._users = 0

    def install(self, hooks: Hooks, module: ModuleType) -> None:
        """See that ``_dummy_run`` takes ``forward_mode_override`` as long as these hooks are in place.

        Args:
            module: the seam's ``warm_up_module``.

        Raises:
            StandsAsideError: it cannot be edited.
        """
        runner_class = seam().dummy_runner(module)
        if not self._users:
            if _extends_as_a_prefill(getattr(runner_class, DUMMY_RUN, None)):
                return  # a patched or a later release
            self._hooks.edit(runner_class, DUMMY_RUN, seam().dummy_run_edits, seam().dummy_run_parameters)
        self._users += 1
        hooks.made(f"{runner_class.__module__}.{runner_class.__qualname__}.{DUMMY_RUN}", self._leave)

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._hooks.undo()


FORWARD_MODES = ForwardModes()


def takes_forward_mode(dummy_run: object) -> bool:
    """Whether a ``_dummy_run`` can be told the mode of its forward."""
    return callable(dummy_run) and OVERRIDE in inspect.signature(dummy_run).parameters


def _extends_as_a_prefill(dummy_run: object) -> bool:
    if not takes_forward_mode(dummy_run):
        return False
    try:
        return EXTEND_EDIT.anchor.strip() not in inspect.getsource(dummy_run)  # type: ignore[arg-type]
    except (OSError, TypeError) as error:
        raise StandsAsideError(DUMMY_RUN, f"its source cannot be read ({error})") from error
