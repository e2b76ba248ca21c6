"""A plugin of its own that writes down what a scheduler process does, whether or not warmstart is there.

One JSON line per event in the directory ``$WARMSTART_PROBE_DIR``, one file per process: CUDA graphs captured and with
how many tokens, DeepGEMM warm-ups with their Ms, dummy forwards.
"""

import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEDULER = "sglang.srt.managers.scheduler"


def write(event: str, **what: object) -> None:
    line = json.dumps({"event": event, "time": time.time(), "pid": os.getpid(), **what})
    with Path(os.environ["WARMSTART_PROBE_DIR"], f"{os.getpid()}.jsonl").open("a") as file:
        file.write(line + "\n")


def rank_known(self: Any) -> None:
    write("rank", pp_rank=self.pp_rank, tp_rank=self.tp_rank, gpu_id=self.gpu_id)


def planned(result: Any, *args: Any, **kwargs: Any) -> None:
    write("planned", batch_sizes=result[0])


def capture(original: Callable[..., Any], self: Any, bs: int, forward: Callable[..., Any], *args: Any) -> Any:
    seen: list[int] = []

    # `wraps`: the runner looks at the signature to see what the model takes.
    @functools.wraps(forward)
    def watched(input_ids: Any, positions: Any, forward_batch: Any, **kwargs: Any) -> Any:
        # Before the first of its forwards: without its gather, a model may wait in a collective for ever.
        if not seen:
            seen.append(int(input_ids.shape[0]))
            write("capture", batch_size=bs, num_tokens=seen[0], gathered_buffer=forward_batch.global_dp_buffer_len)
        return forward(input_ids, positions, forward_batch, **kwargs)

    return original(self, bs, watched, *args)


def timed(event: str, describe: Callable[..., dict[str, object]]) -> Callable[..., Any]:
    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.time()
        try:
            return original(*args, **kwargs)
        finally:
            write(event, start=start, **describe(*args, **kwargs))

    return around


def load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    # SGLang does it at the end of load_weights, which dummy weights never come to. It does nothing a second time.
    prewarm = getattr(self.model, "_prewarm_mhc_kernels", None)
    if prewarm is not None:
        start = time.time()
        prewarm()
        write("mhc_prewarm", start=start)
    return result


def describe_warmup(kernel_type: Any, n: int, k: int, num_groups: int, m_list: list[int]) -> dict[str, object]:
    return {"target": f"{kernel_type.name} N={n} K={k} num_groups={num_groups}", "calls": len(m_list)}


def describe_dummy(self: Any, batch_size: int, run_ctx: Any = None, forward_mode_override: Any = None) -> dict:
    mode = forward_mode_override.name if forward_mode_override is not None else None
    return {"batch_size": batch_size, "mode": mode}


def register() -> None:
    # Schedulers only: in the main process a hook's target would be imported before its arguments are parsed.
    if SCHEDULER not in sys.modules or "WARMSTART_PROBE_DIR" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    graphs = "sglang.srt.model_executor.cuda_graph_runner"
    compile_one = "sglang.srt.layers.deep_gemm_wrapper.compile_utils._compile_deep_gemm_one_type_all"
    HookRegistry.register(compile_one, timed("warmup", describe_warmup), HookType.AROUND)
    HookRegistry.register(f"{runner}.load_model", load_model, HookType.AROUND)
    if importlib.util.find_spec("sglang.srt.model_executor.runner") is not None:  # from 0.5.14 on
        graphs = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
        HookRegistry.register(f"{graphs}.get_batch_sizes_to_capture", planned, HookType.AFTER)
        HookRegistry.register(f"{graphs}.DecodeCudaGraphRunner.capture_one_shape", capture, HookType.AROUND)
        return  # all else has moved
    HookRegistry.register(f"{runner}.kernel_warmup", rank_known, HookType.BEFORE)
    HookRegistry.register(f"{graphs}.get_batch_sizes_to_capture", planned, HookType.AFTER)
    HookRegistry.register(f"{graphs}.CudaGraphRunner.capture_one_batch_size", capture, HookType.AROUND)
    HookRegistry.register(f"{runner}._dummy_run", timed("dummy_run", describe_dummy), HookType.AROUND)
    HookRegistry.register(f"{runner}.kernel_warmup", timed("kernel_warmup", lambda self: {}), HookType.AROUND)
