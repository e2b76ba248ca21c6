"""F1: every pipeline rank warms its own kernels at the same time.

At start-up one request warms the pipeline, so stage k starts to compile only when stage k-1 has finished. Here each
rank runs dummy forwards of its own layers before that, all ranks at the same time.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from sglang_warmstart.base.errors import passing
from sglang_warmstart.base.hooks import Hooks, class_of
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import PP_PARALLEL
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.feature import Feature, Step
from sglang_warmstart.sglang.forward_modes import FORWARD_MODES
from sglang_warmstart.sglang.seams import seam
from sglang_warmstart.sglang.seams.seam import MODEL_RUNNER
from sglang_warmstart.sglang.votes import Votes

COMPILE_UTILS = "sglang.srt.layers.deep_gemm_wrapper.compile_utils"

# Rows of one tile of the GEMMs whose split count follows the batch size.
BLOCK_M = 64

# Dispatchers that have a low-latency mode, and their bound on a rank's tokens; all have the same default.
_DISPATCH_LIMITS = {
    "deepep": "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
    "mooncake": "SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
    "nixl": "SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
}
_DISPATCH_TOKENS = 128

logger = logging.getLogger(LOGGER_NAME)


def pp_warmup_batch_sizes(
    n_sms: int, *, attn_cp_size: int = 1, gathered_tp_size: int = 1, capacity: int | None = None
) -> list[int]:
    """Batch sizes that reach each bracket of ``n_splits ~ n_sms / ceil(batch_size / BLOCK_M)``.

    Args:
        n_sms: streaming multiprocessors of the GPU.
        attn_cp_size: context-parallel ranks of attention; every size is a multiple of it.
        gathered_tp_size: attention TP ranks where the model runner needs a gathered buffer, else 1. Every
            size is a multiple of it too, since 0.5.12's ``_dummy_run`` rounds a batch of 1 down to nothing.
        capacity: requests that the request pool holds. A larger batch never comes up in serving, and
            attention backends whose index buffers have the pool's size (triton, flashinfer) fail on it.

    Returns:
        Sizes ascending, without repeats, none below 1.

    Source: SGLang PR #26567.
    """
    multiple = math.lcm(max(attn_cp_size, 1), max(gathered_tp_size, 1))
    largest = math.inf if capacity is None else max(capacity // multiple, 1) * multiple
    wanted = (1, 2 * BLOCK_M, max(n_sms // 8, 2) * BLOCK_M, max(n_sms // 4, 4) * BLOCK_M, n_sms * BLOCK_M)
    return sorted({int(min(math.ceil(size / multiple) * multiple, largest)) for size in wanted})


def decode_limit_of_scratch(elements_per_request: int) -> int:
    """The largest decode batch whose scratch can be indexed in 32 bits.

    Triton's MLA decode kernels keep ``heads * splits * v_head_dim`` partial results per request in one buffer and
    compute offsets into it as int32. Beyond 2**31 elements they fault, in serving as in a warm-up.

    Args:
        elements_per_request: elements that one request takes of the buffer.

    Source: SGLang PR #28788, which widens the offsets.
    """
    return (1 << 31) // max(elements_per_request, 1)


def batch_sizes_of(model_runner: Any) -> list[int]:
    """The dummy batch sizes of a rank, from its GPU's SM count, its alignment and its request pool."""
    import torch

    n_sms = torch.cuda.get_device_properties(model_runner.device).multi_processor_count
    return pp_warmup_batch_sizes(
        n_sms,
        attn_cp_size=seam().cp_alignment(model_runner),
        gathered_tp_size=seam().gathered_tp_size(model_runner),
        capacity=model_runner.req_to_token_pool.size,
    )


def decode_limit_of(attn_backend: Any) -> float:
    """The largest decode batch that the attention backend survives. Only Triton's MLA kernels of 0.5.12 have one.

    Backends that combine others (prefill and decode, two-batch overlap, linear attention) are asked for the one that
    decodes.
    """
    for combined in ("decode_backend", "primary", "full_attn_backend"):
        if hasattr(attn_backend, combined):
            return decode_limit_of(getattr(attn_backend, combined))
    sizes = [getattr(attn_backend, name, None) for name in ("num_head", "max_kv_splits", "v_head_dim")]
    if not getattr(attn_backend, "use_mla", False) or not all(isinstance(size, int) for size in sizes):
        return math.inf
    return decode_limit_of_scratch(math.prod(size for size in sizes if size is not None))


def decode_limit_of_experts() -> float:
    """Tokens that a rank may send to the experts in one decode forward: low-latency dispatch has buffers of that size.

    Source: ``num_max_dispatch_tokens_per_rank`` of the dispatchers in ``sglang/srt/layers/moe/token_dispatcher``.
    """
    from sglang.srt.layers.moe.utils import get_deepep_mode, get_moe_a2a_backend

    limit = _DISPATCH_LIMITS.get(get_moe_a2a_backend().value)
    if limit is None or not get_deepep_mode().resolve(is_extend_in_batch=False).is_low_latency():
        return math.inf
    try:
        return int(os.environ.get(limit) or _DISPATCH_TOKENS)
    except ValueError:
        return _DISPATCH_TOKENS


def forward_modes_of(model_runner: Any) -> list[Any]:
    """The modes of the forwards that this node runs when it serves: DECODE, EXTEND, or both."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    disaggregation_mode = seam().disaggregation_mode(model_runner)
    modes = []
    # In disaggregated serving a node has room for the batches of its own half only.
    if model_runner.is_generation and disaggregation_mode != "prefill":
        modes.append(ForwardMode.DECODE)
    if disaggregation_mode != "decode":
        modes.append(ForwardMode.EXTEND)
    return modes


def pp_parallel_deep_gemm_warmup(model_runner: Any) -> None:
    """Run dummy forwards of this rank's own layers, over batch sizes that reach every bracket of split counts.

    For each size: a DECODE forward if the model generates, this is no prefill-only node, and the attention backend can
    decode that many; an EXTEND forward unless this is a decode-only node. Every rank runs the same forwards in the same
    order, as the collectives in them need. An exception is not swallowed: the group's other ranks would wait.

    Source: SGLang PR #26567.
    """
    import torch
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch_sizes = batch_sizes_of(model_runner)
    decode_limit = min(decode_limit_of(model_runner.attn_backend), decode_limit_of_experts())
    modes = forward_modes_of(model_runner)

    logger.info(
        "warmstart: PP-parallel warm-up starts: pp_rank=%d tp_rank=%d batch_sizes=%s disaggregation_mode=%s",
        model_runner.pp_rank,
        model_runner.tp_rank,
        batch_sizes,
        model_runner.server_args.disaggregation_mode,
    )
    start = time.perf_counter()
    with torch.inference_mode():
        for batch_size in batch_sizes:
            for mode in modes:
                if mode == ForwardMode.DECODE and batch_size > decode_limit:
                    logger.info(
                        "warmstart: no DECODE warm-up of %d: the most that can be decoded is %d",
                        batch_size,
                        decode_limit,
                    )
                    continue
                model_runner._dummy_run(batch_size=batch_size, forward_mode_override=mode)
    set_is_extend_in_batch(False)  # as it was before a forward that extends
    torch.get_device_module(model_runner.device).synchronize()
    logger.info(
        "warmstart: PP-parallel warm-up done in %.2f s: pp_rank=%d", time.perf_counter() - start, model_runner.pp_rank
    )


def is_possible(model_runner: Any) -> bool:
    """Whether this start-up may run the warm-up. All of it comes from arguments that every rank shares."""
    return (
        model_runner.device == "cuda" and model_runner.pp_size > 1 and not model_runner.spec_algorithm.is_speculative()
    )


def is_wanted(compile_utils: ModuleType) -> bool:
    """Whether the environment wishes it. That of another node may not."""
    from sglang.srt.environ import envs

    return bool(
        envs.SGLANG_WARMSTART.get()
        and envs.SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP.get()
        and compile_utils.ENABLE_JIT_DEEPGEMM
    )


def install_switch(hooks: Hooks, environ: ModuleType) -> None:
    """Declare the switch on ``Envs``."""
    declare(hooks, environ, PP_PARALLEL)


def install_warmup(hooks: Hooks, compile_utils: ModuleType, model_runner: ModuleType) -> None:
    """Add the function, teach ``_dummy_run`` the forward mode, and call it at the end of ``kernel_warmup``."""
    votes, runners = Votes("pp-parallel-warmup"), itertools.count(1)

    def update_deep_gemm_config(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        with suppress(Exception):  # without, this rank does not take part
            votes.join()

    def kernel_warmup(original: Callable[..., None], self: Any) -> None:
        original(self)
        if not is_possible(self):
            return
        wanted = is_wanted(compile_utils)
        if votes.least(self.tp_group.ranks, f"runner {next(runners)}", int(wanted), absent=0):
            # A forward that fails on this rank ends the start: the others wait in its collectives.
            with passing():
                compile_utils.pp_parallel_deep_gemm_warmup(self)
        elif wanted:
            logger.warning("warmstart: no PP-parallel warm-up: not all ranks of this stage take part")

    hooks.add(compile_utils, "pp_parallel_deep_gemm_warmup", pp_parallel_deep_gemm_warmup)
    runner_class = class_of(model_runner, "ModelRunner")
    FORWARD_MODES.install(hooks, model_runner)
    hooks.wrap(runner_class, "kernel_warmup", kernel_warmup, "self")
    hooks.wrap_any(compile_utils, "update_deep_gemm_config", update_deep_gemm_config)


PP_PARALLEL_WARMUP = Feature(
    name="pp-parallel-warmup",
    gains="every pipeline rank warms its own kernels at the same time",
    hooks={
        f"{ENVIRON}.Envs.{PP_PARALLEL.name}": "the switch, beside its neighbours",
        f"{COMPILE_UTILS}.pp_parallel_deep_gemm_warmup": "where upstream has it from 0.5.13 on",
        f"{COMPILE_UTILS}.update_deep_gemm_config": "runs in each rank before it loads weights: it says that it takes "
        "part, since the forwards hold collectives",
        f"{MODEL_RUNNER}.ModelRunner._dummy_run": "it can run a decode forward of a generation model only; edited in "
        "place, since what has to change lies between its lines",
        f"{MODEL_RUNNER}.ModelRunner.kernel_warmup": "the last thing before CUDA graphs are captured, on every rank",
    },
    upstream="#26567",
    drop_when="SGLang 0.5.13 and later have it",
    built_in_as=(f"{COMPILE_UTILS}:pp_parallel_deep_gemm_warmup",),
    steps=(
        Step((ENVIRON,), install_switch),
        Step((COMPILE_UTILS, MODEL_RUNNER), install_warmup),
    ),
)
