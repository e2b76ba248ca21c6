"""Guard every call from SGLang into our code: if ours fails, it logs one warning and SGLang goes on without us."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from sglang_warmstart.base.errors import is_intended, one_line
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import STRICT

Around = Callable[..., Any]


class _Original:
    """One call's original function, and what became of it."""

    __slots__ = ("error", "function", "result", "returned")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.returned = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.result = self.function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        self.returned = True
        return self.result


def warn(line: str) -> None:
    """Log a warning of ours."""
    logging.getLogger(LOGGER_NAME).warning("%s", line)


def nothing() -> None:
    """What is done where nothing is to be done."""


def guarded(
    where: str,
    around: Around,
    original: Callable[..., Any],
    warn: Callable[[str], None] = warn,
    if_it_fails: Callable[[], object] = nothing,
) -> Callable[..., Any]:
    """``around(original, *args, **kwargs)`` as a function that does not fail because of us.

    If ``around`` raises an error of its own, the caller gets what ``original`` returned or raised. If ``original`` was
    not called yet, it is called now, with the caller's arguments. It is never called a second time. Errors that
    ``original`` raised, and those that are intended (see :mod:`.errors`), pass. In strict mode all errors pass.

    Args:
        where: the feature and the hook, for the warning. There is one warning per guard and process.
        if_it_fails: is called then, before the original is.
    """
    warned = False

    @functools.wraps(original)
    def guard(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        call = _Original(original)
        try:
            return around(call, *args, **kwargs)
        except Exception as error:
            if error is call.error or is_intended(error) or STRICT.value(os.environ):
                raise
            if not warned:
                warned = True
                warn(f"warmstart: {where} failed, SGLang goes on without it: {one_line(error)}")
                if_it_fails()
        # Outside of the handler: what the original raises is not to carry our error as its context.
        if call.error is not None:
            raise call.error
        return call.result if call.returned else original(*args, **kwargs)

    return guard
