"""The shapes that the warm-ups run, against their plain definitions: found by trying every value."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_warmstart.sglang.m_list import fast_m_list, full_m_list
from sglang_warmstart.sglang.mhc_prewarm import largest_of_each_bucket
from sglang_warmstart.sglang.pp_parallel_warmup import decode_limit_of_scratch, pp_warmup_batch_sizes

CHUNK_SIZES = (-1, 0, 1, 512, 1000, 1024, 1025, 5000, 8192, 10000, 16384, 40000)
SM_COUNTS = (78, 108, 132, 148)  # H20, A100, H100 and H200, B200

chunk_sizes = st.integers(-1, 150_000)
parallel_sizes = st.integers(1, 9)


def largest_prefill(chunked_prefill_size: int) -> int:
    return min(chunked_prefill_size, 32768) if chunked_prefill_size >= 1 else 16384


def is_sampled(m: int, largest: int) -> bool:
    if m <= 1024 or m == largest:
        return True
    # [1024, 2048) has bit length 11 and step 2, and both grow by one bit together.
    step = 2 ** (m.bit_length() - 10)
    return m < largest and m % step == 0


@pytest.mark.parametrize("chunk", CHUNK_SIZES)
def test_fast_list_is_the_sample_of_the_definition(chunk: int) -> None:
    largest = largest_prefill(chunk)
    assert fast_m_list(chunk) == [m for m in range(1, 70_000) if is_sampled(m, largest) and m <= max(1024, largest)]


@pytest.mark.parametrize(
    ("chunk", "count", "last"),
    [
        (-1, 3072, 16384),
        (0, 3072, 16384),
        (1, 1024, 1024),
        (1000, 1024, 1024),
        (1024, 1024, 1024),
        (1025, 1025, 1025),
        (8192, 2560, 8192),
        (10000, 2673, 10000),
        (16384, 3072, 16384),
        (40000, 3584, 32768),
    ],
)
def test_fast_list_has_the_documented_size_and_end(chunk: int, count: int, last: int) -> None:
    ms = fast_m_list(chunk)
    assert (len(ms), ms[0], ms[-1]) == (count, 1, last)


@given(chunk_sizes)
def test_fast_list_ascends_without_repeats_and_keeps_to_its_cap(chunk: int) -> None:
    ms = fast_m_list(chunk)
    assert all(left < right for left, right in pairwise(ms))
    assert ms[:1024] == list(range(1, 1025))
    assert ms[-1] == max(1024, largest_prefill(chunk))


@given(chunk_sizes)
def test_fast_list_skips_less_than_a_five_hundredth_of_any_size(chunk: int) -> None:
    ms = fast_m_list(chunk)
    assert all((right - left) * 512 <= max(left, 512) for left, right in pairwise(ms))


@given(chunk_sizes)
def test_fast_list_is_part_of_the_full_one(chunk: int) -> None:
    assert set(fast_m_list(chunk)) <= set(full_m_list(chunk))


@pytest.mark.parametrize(
    ("chunk", "m_max"),
    [
        (-1, 65536),
        (0, 65536),
        (1, 16384),
        (512, 16384),
        (1000, 16384),
        (1024, 16384),
        (1025, 16384),
        (5000, 16384),
        (8192, 16384),
        (8193, 16386),
        (10000, 20000),
        (16384, 32768),
        (40000, 80000),
        (65536, 131072),
        (65537, 131072),
        (1_000_000, 131072),
    ],
)
def test_full_list_is_every_m_up_to_its_maximum(chunk: int, m_max: int) -> None:
    assert list(full_m_list(chunk)) == list(range(1, m_max + 1))


def batch_sizes_by_counting(n_sms: int, attn_cp_size: int, gathered_tp_size: int) -> list[int]:
    def round_up(size: int) -> int:
        while size % attn_cp_size or size % gathered_tp_size:
            size += 1
        return size

    wanted = [1, 2 * 64, max(n_sms // 8, 2) * 64, max(n_sms // 4, 4) * 64, n_sms * 64]
    return sorted({round_up(size) for size in wanted})


@pytest.mark.parametrize("n_sms", SM_COUNTS)
@pytest.mark.parametrize("attn_cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("gathered_tp_size", [1, 2, 3, 8])
def test_batch_sizes_are_those_of_the_definition(n_sms: int, attn_cp_size: int, gathered_tp_size: int) -> None:
    sizes = pp_warmup_batch_sizes(n_sms, attn_cp_size=attn_cp_size, gathered_tp_size=gathered_tp_size)
    assert sizes == batch_sizes_by_counting(n_sms, attn_cp_size, gathered_tp_size)


@pytest.mark.parametrize(
    ("n_sms", "sizes"),
    [
        (78, [1, 128, 576, 1216, 4992]),
        (108, [1, 128, 832, 1728, 6912]),
        (132, [1, 128, 1024, 2112, 8448]),
        (148, [1, 128, 1152, 2368, 9472]),
    ],
)
def test_batch_sizes_of_known_gpus(n_sms: int, sizes: list[int]) -> None:
    assert pp_warmup_batch_sizes(n_sms) == sizes


def test_batch_sizes_reach_every_bracket_of_split_counts() -> None:
    splits = [132 // -(-size // 64) for size in pp_warmup_batch_sizes(132)]
    assert splits == [132, 66, 8, 4, 1]


def test_a_batch_of_one_is_rounded_up_where_the_runner_would_round_it_down_to_nothing() -> None:
    assert pp_warmup_batch_sizes(132, gathered_tp_size=8)[0] == 8
    assert pp_warmup_batch_sizes(132, attn_cp_size=2, gathered_tp_size=3)[0] == 6


def test_a_group_size_of_zero_counts_as_one() -> None:
    assert pp_warmup_batch_sizes(132, attn_cp_size=0, gathered_tp_size=0) == pp_warmup_batch_sizes(132)


@given(st.integers(1, 256), parallel_sizes, parallel_sizes)
def test_batch_sizes_without_capacity_are_those_of_the_definition(n_sms: int, cp: int, tp: int) -> None:
    sizes = pp_warmup_batch_sizes(n_sms, attn_cp_size=cp, gathered_tp_size=tp)
    assert sizes == batch_sizes_by_counting(n_sms, cp, tp)


@given(st.integers(1, 256), parallel_sizes, parallel_sizes, st.integers(1, 20_000))
def test_capacity_cuts_only_the_sizes_that_the_request_pool_cannot_hold(
    n_sms: int, cp: int, tp: int, capacity: int
) -> None:
    uncut = batch_sizes_by_counting(n_sms, cp, tp)
    sizes = pp_warmup_batch_sizes(n_sms, attn_cp_size=cp, gathered_tp_size=tp, capacity=capacity)

    fitting = [size for size in range(1, capacity + 1) if size % cp == 0 and size % tp == 0]
    # One multiple of the groups is the least that a forward takes, also where the pool is smaller.
    largest = fitting[-1] if fitting else uncut[0]
    assert sizes == sorted({min(size, largest) for size in uncut})


def test_capacity_stands_in_for_everything_above_it() -> None:
    assert pp_warmup_batch_sizes(132, capacity=2048) == [1, 128, 1024, 2048]
    assert pp_warmup_batch_sizes(132, capacity=100, gathered_tp_size=8) == [8, 96]


@given(st.integers(1, 1 << 33))
def test_the_decode_limit_is_the_largest_batch_whose_scratch_has_offsets_of_32_bits(elements: int) -> None:
    limit = decode_limit_of_scratch(elements)
    last_offset = limit * elements - 1
    assert last_offset < 2**31 <= last_offset + elements


def test_the_decode_limit_is_below_the_batch_that_faulted() -> None:
    assert decode_limit_of_scratch(128 * 256 * 512) == 128  # heads, splits, v_head_dim; 256 requests faulted


@given(st.lists(st.integers(-3, 5), max_size=60))
def test_the_largest_of_each_bucket_stands_for_it_whatever_the_rule(buckets: list[int]) -> None:
    by_count = dict(enumerate(buckets, 1))
    expected = tuple(
        max(count for count, each in by_count.items() if each == bucket) for bucket in sorted(set(buckets))
    )
    # A KeyError here: the rule was asked for a count outside of 1..max_num_tokens.
    assert largest_of_each_bucket(by_count.__getitem__, len(buckets)) == expected


@given(st.integers(1, 2000), st.integers(1, 200))
def test_each_token_count_has_a_representative_in_its_own_bucket(max_num_tokens: int, n_sms: int) -> None:
    def splits(num_tokens: int) -> int:
        return max(n_sms // -(-num_tokens // 64), 1)

    representatives = largest_of_each_bucket(splits, max_num_tokens)
    warmed = [splits(count) for count in representatives]
    assert warmed == sorted({splits(count) for count in range(1, max_num_tokens + 1)})


@pytest.mark.parametrize("max_num_tokens", [0, -1, -8192])
def test_there_is_no_bucket_below_one_token(max_num_tokens: int) -> None:
    assert largest_of_each_bucket(lambda count: count, max_num_tokens) == ()
