"""Locks among processes, by ``flock``. Every wait has a bound, and work goes on where a file system has no locks.

What a lock guards is published atomically, so doing it twice costs time but does no harm. A file system may refuse to
lock (ENOLCK, ENOSYS). If its lock manager is gone, it never answers, not even a non-blocking call.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_warmstart.base.answers import ANSWER_S, answered
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.mounts import mount_of

_TRY_AGAIN_S = 0.02

logger = logging.getLogger(LOGGER_NAME)


class NoLocksError(Exception):
    """The file system does not lock; says what showed that."""


def try_lock(file: Any, operation: Literal["exclusive", "shared"] = "exclusive", answer_s: float = ANSWER_S) -> bool:
    """Lock an open file until it is closed, unless another process has locked it.

    Args:
        answer_s: seconds for the file system to answer.

    Returns:
        Whether we hold the lock now.

    Raises:
        NoLocksError: it cannot be locked.
    """
    flags = (fcntl.LOCK_EX if operation == "exclusive" else fcntl.LOCK_SH) | fcntl.LOCK_NB
    try:
        # A lock that comes after all goes with the file, which is closed by then.
        answered(lambda: fcntl.flock(file, flags), answer_s)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocksError(first_line(error)) from error
    return True


class Held:
    """A lock that we hold, or do without."""

    def __init__(self, file: Any = None) -> None:
        self._file = file

    def release(self) -> None:
        """Let go. Nothing was written, so what the file system says of that is no matter."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class Locks:
    """Locks by name, each a file in one directory. A lock ends with its holder, however that ends.

    Args:
        directory: it is made if it is not there.
        answer_s: see :func:`try_lock`.
    """

    directory: Path
    answer_s: float = ANSWER_S
    _work: bool = field(default=True, init=False)

    def take(self, name: str) -> Held | None:
        """The lock, or None while another process holds it. May take ``answer_s`` once: call it in a thread.

        Raises:
            OSError: its file cannot be made.
        """
        if not self._work:
            return Held()
        self.directory.mkdir(parents=True, exist_ok=True)
        file = (self.directory / f"{name}.lock").open("ab")  # NFS locks what is open for writing
        try:
            if try_lock(file, answer_s=self.answer_s):
                return Held(file)
        except NoLocksError as error:
            if self._work:
                self._work = False
                logger.warning(
                    "warmstart: %s has no working file locks (%s; %s): processes that share it may do the same work "
                    "twice",
                    self.directory,
                    error,
                    mount_of(self.directory),
                )
            file.close()
            return Held()
        file.close()
        return None

    @contextmanager
    def held(self, name: str, limit_s: float) -> Iterator[None]:
        """Hold a lock, or go on without it when the time is up.

        Raises:
            OSError: its file cannot be made.
        """
        end = time.monotonic() + limit_s
        while (held := self.take(name)) is None and time.monotonic() < end:
            time.sleep(_TRY_AGAIN_S)
        with held or Held():
            yield
