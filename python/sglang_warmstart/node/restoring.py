"""Wait for another process that restores kernels into the cache."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from sglang_warmstart.base.locks import NoLocksError, try_lock

_TRY_AGAIN_S = 0.05


async def wait_until_unlocked(path: Path, limit_s: float) -> bool:
    """Return when nobody holds the lock of a file, or it is gone: its holder is done, or has ended in another way.

    Args:
        path: locked by ``flock`` as long as its holder lives.
        limit_s: seconds after which to give up.

    Returns:
        False if the time was up.
    """
    end = time.monotonic() + limit_s
    while await asyncio.to_thread(_is_locked, path):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(_TRY_AGAIN_S)
    return True


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not try_lock(file, "shared")
    except (OSError, NoLocksError):
        return False
