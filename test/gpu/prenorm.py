"""The hc_prenorm wrapper against DeepGEMM's own function on a GPU: equal bits, and what the wrapper costs per call.

Run by measure.py in a process of its own; prints one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable

import sglang.srt.managers.scheduler  # noqa: F401  (as in a scheduler process: before plugins are loaded)
import torch
from sglang.srt.plugins import load_plugins

N, K = 24, 28672  # DeepSeek-V4's mix_hc and hc_mult * hidden_size
SPLITS = (None, 1, 4, 16)
ROWS = (1, 64, 4096)
CALLS, ROUNDS = 1000, 21


def tensors(m: int, num_splits: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    leading = (m,) if num_splits is None else (num_splits, m)
    # NaN wherever the kernel does not write
    out = torch.full((*leading, N), float("nan"), device="cuda")
    return out, torch.full(leading, float("nan"), device="cuda")


def seconds_per_call(call: Callable[[], None]) -> float:
    """Host time of one call: what Python spends before the kernel is queued."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS


def main() -> None:
    load_plugins()
    import deep_gemm
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint

    direct = deep_gemm.tf32_hc_prenorm_gemm
    wrapper = entrypoint.tf32_hc_prenorm_gemm
    torch.manual_seed(0)
    fn = torch.randn(N, K, device="cuda")
    comparisons = []
    for num_splits in SPLITS:
        for m in ROWS:
            x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
            expected, found = tensors(m, num_splits), tensors(m, num_splits)
            direct(x, fn, *expected, num_splits=num_splits)
            start = time.perf_counter()
            wrapper(x, fn, *found, num_splits=num_splits)
            torch.cuda.synchronize()
            first_call = time.perf_counter() - start
            out, sqrsum = (found[0].sum(0), found[1].sum(0)) if num_splits else found
            reference = x.double() @ fn.double().T
            comparisons.append(
                {
                    "num_splits": num_splits,
                    "m": m,
                    "equal_bits": all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)),
                    "relative_error": ((out - reference).norm() / reference.norm()).item(),
                    "sqrsum_relative_error": (
                        (sqrsum - x.double().square().sum(-1)).norm() / x.double().square().sum(-1).norm()
                    ).item(),
                    "wrapper_call_s": first_call,
                }
            )
    cost = []
    for num_splits in (None, 16):
        x = torch.randn(64, K, device="cuda", dtype=torch.bfloat16)
        out, sqrsum = tensors(64, num_splits)
        rounds: dict[str, list[float]] = {"direct": [], "wrapper": []}
        for _ in range(ROUNDS):
            for name, function in (("direct", direct), ("wrapper", wrapper)):
                call = lambda f=function: f(x, fn, out, sqrsum, num_splits=num_splits)  # noqa: B023, E731
                rounds[name].append(seconds_per_call(call) * 1e6)
        medians = {name: statistics.median(times) for name, times in rounds.items()}
        difference = [b - a for a, b in zip(rounds["direct"], rounds["wrapper"], strict=True)]
        cost.append(
            {
                "num_splits": num_splits,
                "m": 64,
                "direct_us": medians["direct"],
                "wrapper_us": medians["wrapper"],
                "cost_us": statistics.median(difference),
                "rounds_us": rounds,
            }
        )
    warmed = [list(map(int, key)) for key in compile_utils._INITIALIZATION_DICT]
    print(json.dumps({"n": N, "k": K, "comparisons": comparisons, "cost": cost, "warmed_keys": warmed}))


if __name__ == "__main__":
    main()
