"""Error classes, and functions that put an error into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LINE_LIMIT = 1000


def printable(message: str) -> str:
    """A line that may quote a file or a variable of somebody else, for a log or a terminal.

    What is not printable is escaped, and the middle of a long line left out.
    """
    if len(message) > _LINE_LIMIT:
        message = f"{message[: _LINE_LIMIT // 2]} ... {message[-_LINE_LIMIT // 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


class QuotingError(Exception):
    """What is wrong with something that may come from anybody, in one printable line.

    Args:
        message: may quote it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StandsAsideError(Exception):
    """A feature cannot be installed as it is meant, so it is not installed at all.

    Args:
        target: full dotted name of what was looked at in SGLang.
        reason: what is different there, in a few words.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"{target}: {reason}")
        self.target = target
        self.reason = reason


class IntendedError(Exception):
    """An error of ours that is to reach SGLang: the guard of every hook lets it pass (see :mod:`.guard`)."""


@contextmanager
def passing() -> Iterator[None]:
    """Errors of SGLang's own code that is called inside reach SGLang as they are."""
    try:
        yield
    except Exception as error:
        error.__warmstart_passes__ = True  # type: ignore[attr-defined]
        raise


def is_intended(error: BaseException) -> bool:
    """Whether an error is to reach SGLang."""
    return isinstance(error, IntendedError) or hasattr(error, "__warmstart_passes__")


def first_line(error: BaseException | str) -> str:
    """An error in one printable line: the first one of its text, or its type's name where it has no text."""
    lines = str(error).strip().splitlines()
    return printable((lines or ["" if isinstance(error, str) else type(error).__name__])[0])


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"
