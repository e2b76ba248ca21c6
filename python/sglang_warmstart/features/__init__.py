"""The features: one file each, and the table that the plugin installs.

The order is that of installation. Hooks on one function stack in it, the later one outside: ``mhc-prewarm`` comes
before ``pp-parallel-warmup`` so that the latter's forwards are the last thing in ``ModelRunner.kernel_warmup``, and
``bundle-restore`` after ``exact-warmup`` so that restoring has begun when the service is started.
"""

from __future__ import annotations

from sglang_warmstart.features.attn_tp_gather import ATTN_TP_GATHER
from sglang_warmstart.features.bundle_restore import BUNDLE_RESTORE
from sglang_warmstart.features.exact_warmup import EXACT_WARMUP
from sglang_warmstart.features.fast_warmup import FAST_WARMUP
from sglang_warmstart.features.feature import Feature
from sglang_warmstart.features.hc_prenorm import HC_PRENORM
from sglang_warmstart.features.mhc_prewarm import MHC_PREWARM
from sglang_warmstart.features.pp_parallel_warmup import PP_PARALLEL_WARMUP

FEATURES: tuple[Feature, ...] = (
    FAST_WARMUP,
    HC_PRENORM,
    MHC_PREWARM,
    PP_PARALLEL_WARMUP,
    ATTN_TP_GATHER,
    EXACT_WARMUP,
    BUNDLE_RESTORE,
)
