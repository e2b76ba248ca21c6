"""Errors, and how one is said in a line."""

from __future__ import annotations


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


def first_line(said: BaseException | str) -> str:
    """What is said of an error in one line."""
    lines = str(said).strip().splitlines()
    return lines[0] if lines else "" if isinstance(said, str) else type(said).__name__
