"""Start the process that restores a bundle, and wait for it. A server itself does nothing else with a bundle.

This module imports nothing that opens bundles. That process does (:mod:`.at_launch`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from sglang_warmstart.base import processes
from sglang_warmstart.base.private_directory import ALIVE
from sglang_warmstart.base.switches import BUNDLE
from sglang_warmstart.node.restoring import wait_until_unlocked

# Longer than the process gives itself.
WAIT_LIMIT_S = 150.0
_PROGRAM = "sglang_warmstart.bundle.at_launch"


def start(bundle: str, key: str | None, cache: Path, environment: Mapping[str, str]) -> Path:
    """Begin to restore a bundle in a process that ends with this one.

    Args:
        bundle: a path or URL.
        key: path of the public key that must have signed it, or None.
        cache: root of DeepGEMM's cache.
        environment: the server's. It says where the caches of other libraries are.

    Returns:
        A file that is locked until that process has ended.

    Raises:
        OSError: no directory or no process can be made.
    """
    arguments = ["--cache", str(cache), *([f"--key={key}"] if key is not None else [])]
    started = processes.start(
        _PROGRAM,
        lambda directory: [*arguments, "--directory", str(directory)],
        # Not among the arguments, which everybody can read: a URL may have a password in it.
        {**environment, BUNDLE.name: bundle},
    )
    return started.directory / ALIVE


def wait(lock: Path, limit_s: float) -> bool:
    """Wait until a bundle is restored, or given up.

    Args:
        lock: as :func:`start` has returned it.
        limit_s: seconds to wait at most.

    Returns:
        False if the time was up.
    """
    return asyncio.run(wait_until_unlocked(lock, limit_s))
