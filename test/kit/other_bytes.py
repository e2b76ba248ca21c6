"""Bytes that are not quite what they were."""

from __future__ import annotations

import random
from collections.abc import Sequence


def other_bytes(rng: random.Random, whole: bytes, special: Sequence[int], head: int | None = None) -> bytes:
    """Bytes with some flipped, cut out, put in, or taken from elsewhere.

    Args:
        special: values that mean something to a reader; some bytes become one of them.
        head: every second change is among so many bytes at the beginning.
    """
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        among = len(data) if head is None or rng.random() < 0.5 else min(len(data), head)
        at, length = rng.randrange(among + 1), rng.choice((1, 1, 2, 4, 8, 100, 512))
        match rng.randrange(8):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(data):
                data[at] = rng.choice(special)
            case 3:
                data[at : at + length] = rng.randbytes(length)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = rng.randbytes(length)
            case 6:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + length]
            case 7 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)
