"""Calls on a cache's file system, with a bound. One whose server is gone does not answer, and nothing ends the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sglang_warmstart.base.answers import begun
from sglang_warmstart.base.mounts import mount_of

# Publishing waits for the disk, kernel by kernel; a shared one may be slow, and is not gone for it.
ANSWER_S = 30.0

P = ParamSpec("P")
T = TypeVar("T")


class NoAnswerError(OSError):
    """A file system does not answer; says which."""


class Disk:
    """A cache's file system. Once it has not answered, no further call waits for it.

    Args:
        root: of the cache.
        answer_s: seconds for a call.
    """

    def __init__(self, root: Path, answer_s: float | None = None) -> None:
        self._root = root
        self._answer_s = ANSWER_S if answer_s is None else answer_s
        self._problem: str | None = None
        self._asked: set[asyncio.Future[Any]] = set()

    async def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call returns or raises. It runs in a thread of its own, which nobody waits for at the end.

        Raises:
            NoAnswerError: it takes too long, or another one did before.
        """
        if self._problem is not None:
            raise NoAnswerError(self._problem)
        answer = asyncio.wrap_future(begun(lambda: call(*args, **kwargs)))
        self._asked.add(answer)
        answer.add_done_callback(self._asked.discard)
        done, _ = await asyncio.wait([answer], timeout=self._answer_s)
        if not done:
            self._problem = (
                f"{self._root}: no answer in {self._answer_s:g} s from its file system ({mount_of(self._root)})"
            )
            raise NoAnswerError(self._problem)
        return done.pop().result()

    async def rest(self) -> None:
        """Return when no call is under way: what is being published is then there, and nothing of it elsewhere."""
        while self._asked and self._problem is None:
            await asyncio.wait(self._asked)
