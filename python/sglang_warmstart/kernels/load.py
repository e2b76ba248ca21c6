"""Load kernels into this process: each representative is called once, so that no request loads a cubin."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_warmstart.kernels import gemms
from sglang_warmstart.kernels.marker import TargetKernels
from sglang_warmstart.kernels.targets import Target


@dataclass
class Loaded:
    """What was loaded.

    Args:
        calls: GEMMs that ran.
        seconds: for all of it.
        left_out: (target, smallest M left out, bytes that it would take): left to first use, for want of memory.
    """

    calls: int = 0
    seconds: float = 0.0
    left_out: list[tuple[Target, int, int]] = field(default_factory=list)


def load(targets: Sequence[TargetKernels], free_bytes: Callable[[], int]) -> Loaded:
    """Call each representative of each target once, on the current device and stream, and wait for all.

    Args:
        free_bytes: the memory that may be taken now.

    Raises:
        Exception: whatever DeepGEMM raises for a call.
    """
    import deep_gemm
    import torch

    loaded, start = Loaded(), time.perf_counter()
    num_sms = deep_gemm.get_num_sms()
    try:
        for each in targets:
            representatives = sorted({use.m for use in each.kernels})
            fitting = [m for m in representatives if gemms.real_bytes(each.target, m) <= free_bytes()]
            if len(fitting) < len(representatives):
                m = representatives[len(fitting)]
                loaded.left_out.append((each.target, m, gemms.real_bytes(each.target, m)))
            if fitting:
                call: Any = gemms.prepare(each.target, fitting[-1], gemms.RealRoom())
                for m in fitting:
                    call(m)
                loaded.calls += len(fitting)
                torch.cuda.current_stream().synchronize()
                del call
    finally:
        deep_gemm.set_num_sms(num_sms)
        torch.cuda.empty_cache()
    loaded.seconds = time.perf_counter() - start
    return loaded
