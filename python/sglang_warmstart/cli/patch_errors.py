"""Errors that end a ``patches`` command."""

from __future__ import annotations

NO_TREE = 2


class PatchesError(Exception):
    """A command cannot do what it was asked for.

    Args:
        message: one line that says what is wrong, where, and what to do.
        status: exit status. ``NO_TREE`` where there is nothing to work on: no SGLang, another version, or no git.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
