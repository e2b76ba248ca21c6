"""Names that modules took from each other by ``from module import name``, mended when a function is replaced."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class _Pending(threading.local):
    """What this thread has replaced since its outermost `mended_together` began."""

    def __init__(self) -> None:
        self.depth = 0
        self.replaced: list[tuple[object, object]] = []


_pending = _Pending()


def mend_copies(old: object, new: object) -> None:
    """Rebind every name of a loaded module that stands for ``old`` to ``new``; see `mended_together` for when."""
    with mended_together():
        _pending.replaced.append((old, new))


@contextmanager
def mended_together() -> Iterator[None]:
    """Look for the copies of all that is replaced within once, at the end.

    A look goes through every name of every module: 15 ms in a server, and some thirty functions are replaced there.
    """
    _pending.depth += 1
    try:
        yield
    finally:
        _pending.depth -= 1
        if not _pending.depth and _pending.replaced:
            replaced, _pending.replaced = _pending.replaced, []
            _mend(replaced)


def _mend(replaced: list[tuple[object, object]]) -> None:
    wanted = {id(old) for old, _ in replaced}
    for module in list(sys.modules.values()):
        # Lazy modules of other libraries are proxies: looking into them would load them.
        # `map` looks through the hundred thousand names of a server without a loop in Python.
        if type(module) is not ModuleType or wanted.isdisjoint(map(id, list(vars(module).values()))):
            continue
        for name, found in list(vars(module).items()):
            value = found
            for old, new in replaced:  # in their order: what came in place of one may have been replaced itself
                if value is old:
                    value = new
            if value is not found:
                setattr(module, name, value)
