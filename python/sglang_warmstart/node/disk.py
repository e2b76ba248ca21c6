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
        self._publishing: set[asyncio.Future[Any]] = set()

    async def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call returns or raises. It runs in a thread of its own, which nobody waits for at the end.

        Raises:
            NoAnswerError: it takes too long, or another one did before.
        """
        return await self._wait(self._begin(lambda: call(*args, **kwargs)))

    async def publish(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As :meth:`ask`, of a call that takes no lock and leaves something half made where it is cut off."""
        answer = self._begin(lambda: call(*args, **kwargs))
        self._publishing.add(answer)
        answer.add_done_callback(self._publishing.discard)
        return await self._wait(answer)

    def _begin(self, call: Callable[[], T]) -> asyncio.Future[T]:
        if self._problem is not None:
            raise NoAnswerError(self._problem)
        return asyncio.wrap_future(begun(call))

    async def _wait(self, answer: asyncio.Future[T]) -> T:
        done, _ = await asyncio.wait([answer], timeout=self._answer_s)
        if not done:
            self._problem = (
                f"{self._root}: no answer in {self._answer_s:g} s from its file system ({mount_of(self._root)})"
            )
            raise NoAnswerError(self._problem)
        return done.pop().result()

    async def rest(self) -> None:
        """Return when nothing is being published: it is then there, and no half of it elsewhere."""
        while self._publishing and self._problem is None:
            await asyncio.wait(self._publishing)
