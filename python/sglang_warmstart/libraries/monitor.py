"""Report or refuse a kernel that is compiled while serving."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sglang_warmstart.base.errors import IntendedError
from sglang_warmstart.base.events import Event, emit, log_of_process, now, timed
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import JIT_MONITOR

if TYPE_CHECKING:
    from sglang_warmstart.libraries.library import Library

Mode = Literal["warn", "error", "off"]

# The error of an event whose kernel was refused before it was compiled.
REFUSED = f"refused before it was compiled: {JIT_MONITOR.name}=error"

logger = logging.getLogger(LOGGER_NAME)


class JitWhileServingError(IntendedError, RuntimeError):
    """A kernel was needed that nobody had compiled, while serving, and the monitor's mode is "error".

    It names the kernel, the shape and the remedy.
    """


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
        if self.mode == "error" and event.error in ("", REFUSED):
            raise JitWhileServingError(message)
        logger.warning("warmstart: %s", message)


def is_refusing() -> bool:
    """Whether a kernel that has to be compiled now is to be refused: the server is ready, and the mode is "error"."""
    log = log_of_process()
    return log is not None and JitMonitor("error") in log.listeners and log.phase == "serving"


def refuse(library: Library, name: str, shape: str = "") -> None:
    """Refuse a kernel that is about to be compiled, where :func:`is_refusing`.

    Raises:
        JitWhileServingError: it was refused.
    """
    if is_refusing():
        emit("jit", name, now(), library=library.name, shape=shape, error=REFUSED, remedy=library.remedy)


@contextmanager
def compiling(library: Library, name: str, shape: str = "") -> Iterator[None]:
    """Record the compile that takes place inside, or refuse it before it begins.

    Raises:
        JitWhileServingError: it was refused.
    """
    refuse(library, name, shape)
    with timed("jit", name, library=library.name, shape=shape, remedy=library.remedy):
        yield


def message_of(event: Event) -> str:
    """What is said of a JIT compile: library, kernel, shape, seconds, and what would have covered it."""
    shape = f" for {event.shape}" if event.shape else ""
    if event.error == REFUSED:
        what = f"{event.library} needs {event.name}{shape}"
    else:
        done = "failed to compile" if event.error else "compiled"
        what = f"{event.library} {done} {event.name}{shape} in {event.seconds:.2f} s"
    return "; ".join(filter(None, (f"JIT while serving: {what}", event.error, event.remedy)))
