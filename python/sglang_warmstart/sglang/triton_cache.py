"""One place for Triton's kernels, from the start of a server to its end.

Releases before 0.5.18 name no directory to Triton. The first kernel of torch's Inductor then sets ``TRITON_CACHE_DIR``
in its process (``CachingAutotuner`` in ``torch/_inductor/runtime/triton_heuristics.py``), below Inductor's own cache.
Whatever Triton compiles later goes there. So a start finds part of its kernels in each place, by the order of calls,
and compiles some that the other place has. Inductor leaves a variable alone that is set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from sglang_warmstart.base.answers import answered
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.switches import BUILD_AHEAD

TRITON_CACHE = "TRITON_CACHE_DIR"
# In 0.5.18 and later, SGLang's own function that names a place.
_DEFAULTS = "third_party_cache_defaults"


def usual_root(environment: Mapping[str, str]) -> Path | None:
    """Where Triton keeps its kernels if nobody says where; None without a home, or where it cannot write."""
    # Here and not above: the processes that a server starts find the variable set, and need none of it.
    from sglang_warmstart.libraries import machine
    from sglang_warmstart.libraries.triton import Triton

    if "TRITON_HOME" not in environment and machine.home(environment) is None:
        return None
    root = Triton().root(environment)
    try:
        return root if root is not None and answered(lambda: _can_be_made(root)) else None
    except OSError:
        return None


def install_one_place(hooks: Hooks, environ: ModuleType) -> None:
    """Name Triton's usual place in this process, for those that it starts too, unless somebody names any."""
    if TRITON_CACHE in os.environ or hasattr(environ, _DEFAULTS) or not BUILD_AHEAD.value(os.environ):
        return
    root = usual_root(os.environ)
    if root is None:
        return
    os.environ[TRITON_CACHE] = str(root)

    def undo() -> None:
        if os.environ.get(TRITON_CACHE) == str(root):
            del os.environ[TRITON_CACHE]

    hooks.made(f"os.environ.{TRITON_CACHE}", undo)


def _can_be_made(directory: Path) -> bool:
    there = next(each for each in (directory, *directory.parents) if each.exists())
    return os.access(there, os.W_OK | os.X_OK)
