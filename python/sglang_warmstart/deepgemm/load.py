"""Load kernels into this process: each representative is called once, so that no request loads a cubin."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sglang_warmstart.deepgemm import gemms
from sglang_warmstart.deepgemm.marker import TargetKernels
from sglang_warmstart.deepgemm.target import Target


@dataclass
class Loaded:
    """What was loaded.

    Args:
        calls: GEMMs that ran.
        seconds: for all of it.
        left_out: (target, smallest M left out, bytes that it would take): left to first use, for want of memory.
        failed: targets of which a call raised, and what.
    """

    calls: int = 0
    seconds: float = 0.0
    left_out: list[tuple[Target, int, int]] = field(default_factory=list)
    failed: list[tuple[Target, Exception]] = field(default_factory=list)


def load(targets: Sequence[TargetKernels], free_bytes: Callable[[], int]) -> Loaded:
    """Call each representative of each target once, on the current device and stream, and wait for all.

    Args:
        free_bytes: the memory that may be taken now.
    """
    import deep_gemm
    import torch

    loaded, start = Loaded(), time.perf_counter()
    num_sms = deep_gemm.get_num_sms()
    try:
        for each in targets:
            try:
                _load_target(each, free_bytes(), loaded)
            except Exception as error:
                # It is this target's: the others may do.
                loaded.failed.append((each.target, error))
    finally:
        deep_gemm.set_num_sms(num_sms)
        torch.cuda.empty_cache()
    loaded.seconds = time.perf_counter() - start
    return loaded


def _load_target(each: TargetKernels, free_bytes: int, loaded: Loaded) -> None:
    import torch

    representatives = sorted({use.m for use in each.kernels})
    fitting = [m for m in representatives if gemms.real_bytes(each.target, m) <= free_bytes]
    if len(fitting) < len(representatives):
        m = representatives[len(fitting)]
        loaded.left_out.append((each.target, m, gemms.real_bytes(each.target, m)))
    if fitting:
        call = gemms.prepare(each.target, fitting[-1], gemms.RealRoom())
        for m in fitting:
            call(m)
            loaded.calls += 1
        # Its tensors go with this call, and their memory is there for the next target.
        torch.cuda.current_stream().synchronize()
