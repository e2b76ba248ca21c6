"""mHC's split buckets on a GPU: TileLang's part of them, built at once by the service, and one kernel alone.

``mhc.py cold|warm|alone``, with a HOME of its own. DeepGEMM's prenorm is left out: it is a target as others are. Prints
one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

# DeepSeek-V4-Flash's, and what its server has.
HC_MULT, HIDDEN, CHUNK = 4, 4096, int(os.environ.get("WARMSTART_MHC_CHUNK", "4096"))


def module() -> Any:
    """SGLang's module, as it is in a server of one GPU."""
    import sglang.srt.runtime_context as context
    from sglang.kernels.ops.layernorm import mhc
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    schedule = SimpleNamespace(chunked_prefill_size=CHUNK, max_prefill_tokens=CHUNK)
    context.get_schedule = lambda: schedule
    mhc.get_parallel = lambda: SimpleNamespace(tp_group=None)
    mhc.is_allocation_symmetric = lambda: False
    mhc.use_symmetric_memory = lambda *_, **__: contextlib.nullcontext()
    entrypoint.tf32_hc_prenorm_gemm = lambda *_, **__: None
    return mhc


def arguments() -> list[Any]:
    """Of ``prewarm_mhc_pre``."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    mixes = HC_MULT * (HC_MULT + 2)
    residual = zeros(1, HC_MULT, HIDDEN, dtype=torch.bfloat16)
    norm = zeros(HIDDEN, dtype=torch.bfloat16)
    weights = (zeros(mixes, HC_MULT * HIDDEN), zeros(3), zeros(mixes))
    return [residual, *weights, 1e-6, 1e-6, 1e-6, 2.0, 20, 1, 32, norm, 1e-6]


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


def main(state: str) -> None:
    mhc = module()
    mhc._load_tilelang()
    given = arguments()
    buckets = mhc.get_mhc_pre_token_count_representatives(CHUNK, HC_MULT * HIDDEN)
    seen: dict[str, Any] = {"state": state, "buckets": len(buckets), "tokens": buckets, "cores": os.cpu_count()}
    if state == "alone":
        seen["seconds"] = {}
        for tokens in (buckets[0], buckets[len(buckets) // 2], buckets[-1]):
            mhc.get_mhc_pre_token_count_representatives = lambda *_, tokens=tokens: (tokens,)
            seen["seconds"][tokens] = timed(lambda: mhc.prewarm_mhc_pre(*given))
    else:
        from sglang_warmstart.node.launch import start_service
        from sglang_warmstart.sglang.mhc_at_once import build_at_once

        service = start_service()
        os.environ["SGLANG_WARMSTART_SERVICE"] = str(service.socket)
        seen["at_once_s"] = timed(lambda: build_at_once(lambda: mhc.prewarm_mhc_pre(*given)))
        seen["then_s"] = timed(lambda: mhc.prewarm_mhc_pre(*given))
        service.stop()
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
