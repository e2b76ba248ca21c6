"""The table of the features that the plugin installs.

They are installed in this order. If several hook one function, the later one is outside. So ``mhc-prewarm`` comes
before ``pp-parallel-warmup``: the forwards of the latter must be the last thing in ``ModelRunner.kernel_warmup``. And
``bundle-restore`` comes after ``exact-warmup``: restoring must have begun when the service starts; ``build-ahead``
comes before it, and asks that service. What watches comes last: ``jit-monitor``, then ``start-up-events``, whose run
begins before everything else and whose steps contain everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_warmstart.base.errors import printable
from sglang_warmstart.base.switches import ONLY
from sglang_warmstart.sglang.attn_tp_gather import ATTN_TP_GATHER
from sglang_warmstart.sglang.build_ahead import BUILDING_AHEAD
from sglang_warmstart.sglang.bundle_restore import BUNDLE_RESTORE
from sglang_warmstart.sglang.exact_warmup.hooks import EXACT_WARMUP
from sglang_warmstart.sglang.fast_warmup import FAST_WARMUP
from sglang_warmstart.sglang.feature import Feature
from sglang_warmstart.sglang.hc_prenorm import HC_PRENORM
from sglang_warmstart.sglang.jit_monitor import JIT_MONITORING
from sglang_warmstart.sglang.mhc_prewarm import MHC_PREWARM
from sglang_warmstart.sglang.pp_parallel_warmup import PP_PARALLEL_WARMUP
from sglang_warmstart.sglang.start_up_events import START_UP_EVENTS

FEATURES: tuple[Feature, ...] = (
    FAST_WARMUP,
    HC_PRENORM,
    MHC_PREWARM,
    PP_PARALLEL_WARMUP,
    ATTN_TP_GATHER,
    BUILDING_AHEAD,
    EXACT_WARMUP,
    BUNDLE_RESTORE,
    JIT_MONITORING,
    START_UP_EVENTS,
)


def chosen_features(environment: Mapping[str, str]) -> tuple[tuple[Feature, ...], str | None]:
    """The features to install: those that ``SGLANG_WARMSTART_ONLY`` names, or all where it is not set.

    Returns:
        The features, and a complaint (one line) about names that are none. Those name nothing.
    """
    wanted = ONLY.value(environment)
    if not wanted:
        return FEATURES, None
    known = {feature.name for feature in FEATURES}
    words = ", ".join(f'"{name}"' for name in wanted if name not in known)
    complaint = printable(f"{ONLY.name}: there is no feature {words}: choose among {', '.join(sorted(known))}")
    return tuple(feature for feature in FEATURES if feature.name in wanted), complaint if words else None
