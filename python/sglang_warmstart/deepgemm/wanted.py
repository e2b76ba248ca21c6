"""Targets that somebody asks for in a file: read, checked, and completed with what SGLang's calls have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from sglang_warmstart.deepgemm.gemms import GEMMS
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import Target

# Where the file does not say: the end of SGLang's full list for prefill chunks of up to 8192 tokens.
M_MAX = 16384

# What SGLang's calls have, by kernel type: layouts of the scales, result, rows of a group in the contiguous layout.
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "GEMM_NT_F8F8BF16": {"lhs_scale": "tma", "rhs_scale": "k"},
    "GROUPED_GEMM_NT_F8F8BF16_CONTIG": {"lhs_scale": "tma", "rhs_scale": "k", "m_alignment": 128},
    "GROUPED_GEMM_NT_F8F8BF16_MASKED": {"lhs_scale": "tma", "rhs_scale": "k"},
    "GEMM_NT_BF16BF16F32": {"out_dtype": "float32"},
    "TF32_HC_PRENORM_GEMM": {"out_dtype": "float32", "num_groups": 0},
}

# Larger than any model's, and small enough for the arithmetic of a call.
_LIMITS = {"n": 1 << 22, "k": 1 << 22, "num_groups": 1 << 16, "m_max": 1 << 20, "num_sms": 9999, "m_alignment": 1 << 12}


class WantedError(Exception):
    """What is wrong with a file of targets, in one line."""


def read(data: bytes, gpu: Gpu) -> list[Target]:
    """The targets of a file: a JSON list of objects with the fields of :class:`Target`.

    ``kernel_type``, ``n`` and ``k`` are needed. What else is left out is as in SGLang's calls, with all SMs of the GPU.

    Raises:
        WantedError: it is none, or a target in it is none that DeepGEMM could have; names the target by its number.
    """
    try:
        items = msgspec.json.decode(data, type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WantedError(f"not a list of targets: {error}") from error
    if not items:
        raise WantedError("there is no target in it")
    targets = [_target(number, item, gpu) for number, item in enumerate(items, 1)]
    return list(dict.fromkeys(targets))


def _target(number: int, item: dict[str, Any], gpu: Gpu) -> Target:
    kind = item.get("kernel_type")
    if kind not in GEMMS:
        raise WantedError(f"target {number}: kernel_type is {_shown(kind)}; there are: {', '.join(GEMMS)}")
    unknown = sorted(set(item) - set(Target.__struct_fields__))
    if unknown:
        raise WantedError(f"target {number}: {unknown[0]!r} is no field of a target")
    given = {"num_groups": 1, "num_sms": gpu.num_sms, "m_max": M_MAX, **_USUAL[str(kind)], **item}
    try:
        target = msgspec.convert(given, Target)
    except msgspec.ValidationError as error:
        raise WantedError(f"target {number}: {error}") from error
    for name, limit in _LIMITS.items():
        value = getattr(target, name)
        least = 0 if name == "num_groups" and kind == "TF32_HC_PRENORM_GEMM" else 1
        if not least <= value <= limit:
            raise WantedError(f"target {number}: {name} is {value}, expected {least} to {limit}")
    if not re.fullmatch(r"bfloat16|float16|float32", target.out_dtype):
        raise WantedError(f"target {number}: out_dtype is {_shown(target.out_dtype)}, expected bfloat16 or float32")
    return target


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
