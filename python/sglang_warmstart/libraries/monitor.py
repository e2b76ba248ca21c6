"""Report or refuse a kernel that is compiled while serving."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from sglang_warmstart.base.errors import IntendedError
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.log import LOGGER_NAME

Mode = Literal["warn", "error", "off"]

logger = logging.getLogger(LOGGER_NAME)


class JitWhileServingError(IntendedError, RuntimeError):
    """A kernel was compiled while serving, and the monitor's mode is "error"; names kernel, shape and remedy."""


@dataclass(frozen=True)
class JitMonitor:
    """Listens to the events of a process.

    Args:
        mode: what becomes of a JIT compile while serving: a warning, or an error in the call that needed it.
    """

    mode: Literal["warn", "error"]

    def __call__(self, event: Event) -> None:
        """Warn of a JIT compile while serving, or refuse it. All other events pass.

        Raises:
            JitWhileServingError: in mode "error".
        """
        if event.kind != "jit" or event.phase != "serving" or event.cached:
            return
        message = message_of(event)
        # A call whose compile has failed fails by itself.
        if self.mode == "error" and not event.error:
            raise JitWhileServingError(message)
        logger.warning("warmstart: %s", message)


def message_of(event: Event) -> str:
    """What is said of a JIT compile: library, kernel, shape, seconds, and what would have covered it."""
    shape = f" for {event.shape}" if event.shape else ""
    what = f"{event.library} {'failed to compile' if event.error else 'compiled'} {event.name}{shape}"
    parts = [f"JIT while serving: {what} in {event.seconds:.2f} s", event.error, event.remedy]
    return "; ".join(filter(None, parts))
