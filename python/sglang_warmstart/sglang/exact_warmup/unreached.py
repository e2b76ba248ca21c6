"""Targets that a dry forward of one token cannot reach, added by rule to those that it found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang.seams import seam


def unreached(found: Iterable[Target], model_runner: Any, library: Any) -> list[Target]:
    """Further targets of a rank: those found, on the numbers of SMs that serving changes to.

    Args:
        found: by dry forwards.
        library: the module ``deep_gemm``.
    """
    found = list(found)
    num_sms = library.get_num_sms()
    further = {
        msgspec.structs.replace(target, num_sms=fewer): None
        for fewer, wanted in _fewer_sms(model_runner, num_sms)
        for target in found
        if target.num_sms == num_sms and (wanted is None or (target.n, target.k) in wanted)
    }
    return [target for target in further if target not in found]


def _fewer_sms(model_runner: Any, num_sms: int) -> Iterator[tuple[int, set[tuple[int, int]] | None]]:
    """Numbers of SMs, and the (n, k) of the GEMMs that are called with them; None: of all.

    Source: ``batch_overlap/operations_strategy.py`` and the indexers of DSA in ``layers/attention``.
    """
    if seam().decided(model_runner.server_args).get("enable_two_batch_overlap"):
        with contextlib.suppress(Exception):  # a fork's DeepEP says it in another way: they are met on their first call
            from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPConfig

            yield num_sms - DeepEPConfig.get_instance().num_sms, None
    halves: dict[int, set[tuple[int, int]]] = {}
    for module in model_runner.model.modules():
        half, projection = getattr(module, "half_device_sm_count", None), getattr(module, "wq_b", None)
        if half is not None and projection is not None:
            n, k = projection.weight.shape
            halves.setdefault(half, set()).add((n, k))
    yield from halves.items()
