"""Restore a bundle of compiled kernels while weights load (:mod:`sglang_warmstart.bundle.at_launch`)."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_warmstart.base.events import timed
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import BUNDLE, BUNDLE_KEY, RESTORING, SERVICE
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.fast_warmup import COMPILE_UTILS, ENTRYPOINT
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.ranks import ENGINE, LAUNCH, before_the_ranks
from sglang_warmstart.sglang.seams import seam

logger = logging.getLogger(LOGGER_NAME)


def start_restoring(server_args: Any) -> None:
    """Begin to restore the bundle that the environment names. The service of the node waits for it, and so do ranks."""
    bundle = BUNDLE.value(os.environ)
    os.environ.pop(RESTORING, None)
    if not bundle:
        return
    # Here and not above: no rank needs these, and a server without a bundle does not either.
    from sglang_warmstart.sglang.exact_warmup.warmup import is_wanted

    on_gpu = seam().decided(server_args)["device"] == "cuda"
    if not on_gpu or not is_wanted() or importlib.util.find_spec("deep_gemm") is None:
        return
    try:
        from sglang_warmstart.bundle.start import start
        from sglang_warmstart.sglang.caches import deep_gemm_cache, server_environment

        # Not the switch's value, for which an empty word is none: an empty key is one that somebody meant to set.
        key, environment = os.environ.get(BUNDLE_KEY.name), server_environment(os.environ)
        lock = start(bundle, key, deep_gemm_cache(os.environ), environment)
    except Exception as error:
        # Whatever it is, the server starts without.
        logger.warning("warmstart: the bundle is not restored: %s", error)
    else:
        os.environ[RESTORING] = str(lock)


def install_switches(hooks: Hooks, environ: ModuleType) -> None:
    """Declare the switches on ``Envs``."""
    for switch in (BUNDLE, BUNDLE_KEY):
        declare(hooks, environ, switch)


def install_start(hooks: Hooks, engine: ModuleType) -> None:
    """Start restoring before the schedulers, and before the service, which reads where the lock is."""
    before_the_ranks(hooks, engine, start_restoring)


def install_wait(hooks: Hooks, compile_utils: ModuleType, _entrypoint: ModuleType) -> None:
    """In a rank of a node without exact warm-up's service, which waits itself: wait before weights are loaded."""

    def update_deep_gemm_config(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if RESTORING in os.environ and SERVICE not in os.environ:
            from sglang_warmstart.bundle import start

            with timed("step", "wait for the bundle"):
                if not start.wait(Path(os.environ[RESTORING]), start.WAIT_LIMIT_S):
                    logger.warning(
                        "warmstart: the bundle takes more than %g s: it is not waited for", start.WAIT_LIMIT_S
                    )
        original(*args, **kwargs)

    hooks.wrap(compile_utils, "update_deep_gemm_config", update_deep_gemm_config, "gpu_id, server_args", "gpu_id")


BUNDLE_RESTORE = Feature(
    name="bundle-restore",
    gains="kernels that were compiled elsewhere are restored while weights load; the start compiles none",
    hooks={
        f"{ENVIRON}.Envs.{BUNDLE.name}": "the switch, beside its neighbours",
        f"{ENVIRON}.Envs.{BUNDLE_KEY.name}": "whose signature the bundle must bear",
        LAUNCH: "runs once per node before any rank; wrapped after "
        "exact-warmup, so that restoring has begun when the service starts",
        f"{COMPILE_UTILS}.update_deep_gemm_config": "runs in each rank before it loads weights; without "
        "exact-warmup, whose service waits, the rank waits here until the bundle is restored",
    },
    upstream="none",
    drop_when="upstream restores a cache of kernels by itself, under any install path",
    built_in_as=(),
    steps=(
        Step((ENVIRON,), install_switches),
        Step((ENGINE,), install_start, required=False),
        # With the modules of exact-warmup's step: hooks on one function stack in one order.
        Step((COMPILE_UTILS, ENTRYPOINT), install_wait, required=False),
    ),
)
