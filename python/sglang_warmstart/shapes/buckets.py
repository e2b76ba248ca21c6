"""Which token counts stand for all others when a kernel depends on a bucket of them."""

from __future__ import annotations

from collections.abc import Callable


def largest_of_each_bucket(bucket_of: Callable[[int], int], max_num_tokens: int) -> tuple[int, ...]:
    """The largest token count of every bucket over ``1..max_num_tokens``, in order of the bucket.

    Args:
        bucket_of: the library's own rule, token count -> bucket (for mHC: ``num_splits``). It is asked for
            each count: a copy of the rule here would be wrong on the day the library changes it.
        max_num_tokens: the largest token count that can come up; nothing is returned below 1.

    Source: SGLang PR #25810.
    """
    largest = {bucket_of(num_tokens): num_tokens for num_tokens in range(1, max_num_tokens + 1)}
    return tuple(largest[bucket] for bucket in sorted(largest))
