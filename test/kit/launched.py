"""A server's processes, with SGLang's own start of its schedulers and one rank that does nothing but connect."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kit.arguments import with_values


def launch(server_args: Any, scheduler: Any, device: str = "cuda") -> Any:
    """Start the schedulers, wait until they are ready, and return what SGLang returns of them."""
    from sglang.srt.entrypoints import engine

    before, engine.mp = engine.mp, multiprocessing.get_context("fork")
    try:
        arguments = with_values(server_args, device=device)
        result, processes = engine.Engine._launch_scheduler_processes(arguments, None, scheduler)
        result.wait_for_ready()
        for process in processes:
            process.join()
    finally:
        engine.mp = before
    return result


def ready(*arguments: Any) -> None:
    """In the place of a scheduler process."""
    arguments[-1].send({"status": "ready"})


def _connect_and_look(*arguments: Any) -> None:
    # What a rank's ModelRunner does before it loads weights.
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils

    compile_utils.update_deep_gemm_config(0, SimpleNamespace(chunked_prefill_size=8192, base_gpu_id=0, node_rank=0))
    cache = Path(os.environ["SGLANG_DG_CACHE_DIR"]) / "cache"
    print("kernels", json.dumps(sorted(path.name for path in cache.glob("*"))), flush=True)
    ready(*arguments)


def server_with_one_rank(model: str) -> None:
    """A main process: it loads its plugins, and starts one rank, which prints the kernels that it finds.

    The main process prints which modules it has imported for that.
    """
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils  # noqa: F401
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    before = set(sys.modules)
    load_plugins()
    launch(ServerArgs(model_path=model, device="cpu"), _connect_and_look)
    print("modules", json.dumps(sorted(set(sys.modules) - before)), flush=True)
