"""mHC's TileLang kernels of all split buckets, built all at once before each is run once.

SGLang 0.5.14 and later runs a token count of every bucket, one after another, when weights have been loaded; for
0.5.12 and 0.5.13 :mod:`.mhc_prewarm` does. TileLang compiles a kernel for each, in this process, 12 to 15 s long. Here
the same run is made first with these compiles postponed, and the node's service builds the kernels meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.events import timed
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import BUILD_AHEAD, SERVICE, STRICT
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.tilelang import TileLang
from sglang_warmstart.libraries.tilelang_ahead import postponed
from sglang_warmstart.node.client import ServiceClient

# Stock SGLang compiles one after another here, longer than this.
BUILD_WAIT_S = 150.0
# One of them, alone; for the order.
_KERNEL_SECONDS = 14.0

# SGLang's own function that runs each bucket, by release.
_PREWARM = ("prewarm_mhc_pre", "_prewarm_mhc_pre")

_WITHOUT_PRENORM: ContextVar[bool] = ContextVar("without_prenorm", default=False)

logger = logging.getLogger(LOGGER_NAME)


def is_without_prenorm() -> bool:
    """Whether the prenorm GEMM of a new bucket is to do nothing: its kernel would be waited for."""
    return _WITHOUT_PRENORM.get()


@contextlib.contextmanager
def _without_prenorm() -> Iterator[None]:
    token = _WITHOUT_PRENORM.set(True)
    try:
        yield
    finally:
        _WITHOUT_PRENORM.reset(token)


def build_at_once(run: Callable[[], object]) -> None:
    """Have the service build the TileLang kernels that ``run`` would compile. Does nothing without a service.

    Args:
        run: runs each bucket once. It is called up to twice here, on all ranks of a node alike or not: nothing in it
            may wait for other ranks.

    Raises:
        ServiceGoneError: the service does not answer.
    """
    path = os.environ.get(SERVICE)
    if path is None or not BUILD_AHEAD.value(os.environ):
        return
    kernels: dict[str, Recipe] = {}
    client, library = ServiceClient(Path(path)), TileLang()

    def found(form: dict[str, Any], entry: str) -> None:
        recipe = library.recipe_at(entry, form, _KERNEL_SECONDS)
        if recipe.key not in kernels:
            kernels[recipe.key] = recipe
            client.build(recipe)

    try:
        with timed("step", "mHC's kernels at once", kernels=0) as details:
            with postponed(found), _without_prenorm():
                run()
            details["kernels"] = len(kernels)
            if not kernels:
                return
            # DeepGEMM's part, of all buckets at once too, while the service builds.
            with postponed(lambda *_: None):
                run()
            built = client.await_builds(BUILD_WAIT_S)
    finally:
        client.close()
    for reason in built.failed:
        logger.warning("warmstart: not built ahead: %s", reason)
    if built.not_ready:
        logger.warning("warmstart: %d kernels of mHC are not ready after %g s", built.not_ready, BUILD_WAIT_S)
    logger.info("warmstart: mHC: %d kernels of TileLang built at once", built.built)


def at_once(run: Callable[[], object]) -> None:
    """As :func:`build_at_once`; what fails is said, and ``run`` then compiles as it does without us."""
    try:
        build_at_once(run)
    except Exception as error:
        if STRICT.value(os.environ):
            raise
        logger.warning("warmstart: mHC's kernels are compiled one after another: %s", first_line(error))


def install(hooks: Hooks, mhc: ModuleType) -> None:
    """Build at once what SGLang's own prewarm would compile. 0.5.12 and 0.5.13 have none."""

    def prewarm(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        # An allocation in symmetric memory waits for other ranks, which may have nothing to build.
        if not ("use_symmetric_memory" in vars(mhc) and _is_memory_symmetric()):
            at_once(lambda: original(*args, **kwargs))
        original(*args, **kwargs)

    for name in _PREWARM:
        if name in vars(mhc):
            hooks.wrap_any(mhc, name, prewarm)


def _is_memory_symmetric() -> bool:
    from sglang.srt.distributed.device_communicators.pynccl_allocator import is_symmetric_memory_enabled

    return bool(is_symmetric_memory_enabled())
