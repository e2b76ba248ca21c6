"""Known limits: features that can be installed on a release of SGLang, but do not fully work there.

When a feature is fixed for a release, remove its line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """What a feature lacks.

    Args:
        since: the first release of which this is true, until the next limit of the feature.
        state: what is left of the feature. "works" ends the limit before.
        reason: why, in one line.
    """

    since: str
    state: Literal["works", "partly", "no effect"]
    reason: str = ""


LIMITS: Mapping[str, tuple[Limit, ...]] = {
    "bundle-restore": (
        Limit("0.5.18", "partly", "the caches of Triton, FlashInfer and TileLang are restored where they were before"),
    ),
    "jit-monitor": (Limit("0.5.18", "partly", "FlashInfer's compiles are not watched"),),
}


def limit_of(feature: str, release: str) -> Limit | None:
    """What is known not to work of a feature on a release, such as ``0.5.12.post1``, or None."""
    reached = [limit for limit in LIMITS.get(feature, ()) if _numbers(limit.since) <= _numbers(release)]
    return reached[-1] if reached and reached[-1].state != "works" else None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("+")[0]))
