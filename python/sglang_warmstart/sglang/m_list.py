"""The values of M (rows of the left operand) that DeepGEMM's warm-up runs."""

from __future__ import annotations

# Decode batches can be larger than a small prefill chunk, so these are always there, one by one.
DENSE_LIMIT = 1024

_FAST_CAP = 32 * 1024
_FAST_DEFAULT = 16 * 1024
_FULL_DEFAULT = 16 * 1024
_FULL_UNCHUNKED = 64 * 1024
_FULL_CAP = 128 * 1024
_DOUBLING_ABOVE = 8192


def fast_m_list(chunked_prefill_size: int) -> list[int]:
    """A sample of 1..max_prefill_bs that keeps rank 0 short enough for the others to wait.

    Every M up to 1024, then a step that doubles with each power of two: 2 in [1024, 2048), 4 in
    [2048, 4096), and so on, and ``max_prefill_bs`` itself. Nothing lies above ``max(1024, max_prefill_bs)``.

    Args:
        chunked_prefill_size: tokens in a prefill chunk; below 1 means that prefill is not chunked.

    Returns:
        M values, ascending, without repeats: 2560 of them for 8192, 3072 for 16384.

    Source: SGLang PRs #18111 and #23756, whose list runs past the cap where that is no power of two.
    """
    max_prefill_bs = min(chunked_prefill_size, _FAST_CAP) if chunked_prefill_size >= 1 else _FAST_DEFAULT
    sample = {*range(1, DENSE_LIMIT + 1), max_prefill_bs}
    start, step = DENSE_LIMIT, 2
    while start < max_prefill_bs:
        sample.update(range(start, min(2 * start, max_prefill_bs), step))
        start, step = 2 * start, 2 * step
    return sorted(sample)


def full_m_list(chunked_prefill_size: int) -> range:
    """Every M that SGLang sweeps without the fast list.

    Args:
        chunked_prefill_size: tokens in a prefill chunk; below 1 means that prefill is not chunked.

    Returns:
        ``range(1, m_max + 1)``: m_max is 16384; 65536 where prefill is not chunked; twice the chunk where
        that is over 8192; never over 131072.

    Source: ``update_deep_gemm_config`` of SGLang 0.5.12, ``layers/deep_gemm_wrapper/compile_utils.py``.
    """
    m_max = _FULL_DEFAULT
    if chunked_prefill_size < 1:
        m_max = _FULL_UNCHUNKED
    elif chunked_prefill_size > _DOUBLING_ABOVE:
        m_max = 2 * chunked_prefill_size
    return range(1, min(m_max, _FULL_CAP) + 1)
