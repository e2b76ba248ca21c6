"""Batch sizes of the dummy forwards that warm one pipeline stage."""

from __future__ import annotations

import math

# Rows of one tile of the GEMMs whose split count follows the batch size.
BLOCK_M = 64


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
