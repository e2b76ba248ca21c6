"""The patches, in the order in which they build."""

from __future__ import annotations

from wiring.attn_tp_gather import ATTN_TP_GATHER
from wiring.exact_warmup import COMPILING, EXACT_WARMUP, RECORDING, SERVICE
from wiring.fast_list import FAST_LIST
from wiring.hc_prenorm import HC_PRENORM
from wiring.pp_parallel import PP_PARALLEL
from wiring.switches import SWITCHES

SERIES = (SWITCHES, FAST_LIST, ATTN_TP_GATHER, HC_PRENORM, PP_PARALLEL, COMPILING, RECORDING, SERVICE, EXACT_WARMUP)
