"""Calls that may never return: a mount whose server is gone answers nothing, and no signal ends such a call."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import TypeVar

# What answers at all answers sooner.
ANSWER_S = 5.0

_T = TypeVar("_T")


def begun(call: Callable[[], _T]) -> Future[_T]:
    """What a call is going to return or raise. It runs in a thread of its own, which nobody waits for at the end."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    try:
        threading.Thread(target=run, name="warmstart-call", daemon=True).start()
    except RuntimeError:  # an interpreter that ends starts no more threads
        run()
    return answer


def answered(call: Callable[[], _T], limit_s: float | None = None) -> _T:
    """What a call returns or raises.

    Args:
        limit_s: seconds for the answer; ``ANSWER_S`` if it is None.

    Raises:
        TimeoutError: there was none. The call goes on in its thread.
    """
    limit_s = ANSWER_S if limit_s is None else limit_s
    try:
        return begun(call).result(limit_s)
    except Late:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {limit_s:g} s") from None
