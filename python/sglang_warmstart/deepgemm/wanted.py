"""Targets that somebody asks for in a file: read, checked, and completed with what SGLang's calls have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.deepgemm.gemms import BLOCKS, GEMMS, gemm_of, gemm_of_call, wrong_recipe
from sglang_warmstart.deepgemm.gemms import recipes as recipes_of
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import Target

# Where the file does not say: the end of SGLang's full list for prefill chunks of up to 8192 tokens.
M_MAX = 16384

# What SGLang's calls have, by kernel type: layouts of the scales, result, rows of a group in the contiguous layout.
_SCALES = {"lhs_scale": "tma", "rhs_scale": "k"}
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "GEMM_NT_F8F8BF16": _SCALES,
    "GEMM_NT_F8F8BF16_BLOCK32": {**_SCALES, "recipe": (1, 32, 32)},
    "GROUPED_GEMM_NT_F8F8BF16_CONTIG": {**_SCALES, "m_alignment": 128},
    "GROUPED_GEMM_NT_F8F8BF16_MASKED": _SCALES,
    "GEMM_NT_BF16BF16F32": {"out_dtype": "float32"},
    "GROUPED_GEMM_NT_BF16_CONTIG": {"m_alignment": 128},
    "GROUPED_GEMM_NT_BF16_MASKED": {},
    "TF32_HC_PRENORM_GEMM": {"out_dtype": "float32", "num_groups": 0},
}
# The same where the GPU's kernels read packed scales. Of block 32, SGLang leaves the right ones to DeepGEMM.
_PACKED = {"lhs_scale": "packed", "rhs_scale": "packed"}
_PACKED_BLOCK32 = {"lhs_scale": "packed"}
_BLACKWELL = (10, 0)
# The recipes of experts in FP4, and of MXFP8, which SGLang calls by another function than other FP8.
_FP4 = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
_MXFP8 = {"recipe_a": (1, 32), "recipe_b": (1, 32)}
# TMA takes FP4 in boxes of so many columns.
_FP4_COLUMNS = 128

# Larger than any model's, and small enough for the arithmetic of a call.
_LIMITS = {"n": 1 << 22, "k": 1 << 22, "num_groups": 1 << 16, "m_max": 1 << 20, "num_sms": 9999, "m_alignment": 1 << 12}


class WantedError(QuotingError):
    """What is wrong with a file of targets, in one line."""


def read(data: bytes, gpu: Gpu) -> list[Target]:
    """The targets of a file: a JSON list of objects with the fields of :class:`Target`.

    ``kernel_type``, ``n`` and ``k`` are needed. What else is left out is as in SGLang's calls on that GPU, with all its
    SMs.

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


def moved(target: Target, num_sms: int, gpu: Gpu) -> Target:
    """A target as a server has it on another GPU: as many SMs less than all, and the scales that are usual there.

    Args:
        num_sms: all SMs of the GPU that it is from.
    """
    sms = target.num_sms if target.num_sms > num_sms else max(gpu.num_sms - (num_sms - target.num_sms), 1)
    gemm = GEMMS[target.kernel_type]
    changed: dict[str, Any] = {"num_sms": sms}
    if gemm.scaled and ("packed" in (target.lhs_scale, target.rhs_scale)) != (gpu.capability >= _BLACKWELL):
        usual = _usual(target.kernel_type, {}, gpu)
        changed |= {name: usual[name] for name in _SCALES}
    return msgspec.structs.replace(target, **changed)


def _target(number: int, item: dict[str, Any], gpu: Gpu) -> Target:
    kind = item.get("kernel_type")
    if kind not in GEMMS:
        raise WantedError(f"target {number}: kernel_type is {_shown(kind)}; there are: {', '.join(GEMMS)}")
    unknown = sorted(set(item) - set(Target.__struct_fields__))
    if unknown:
        raise WantedError(f"target {number}: {unknown[0]!r} is no field of a target")
    given = {"num_groups": 1, "num_sms": gpu.num_sms, "m_max": M_MAX, **_usual(str(kind), item, gpu), **item}
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
    if wrong := _wrong(target, gpu):
        raise WantedError(f"target {number}: {wrong}")
    return target


def _usual(kind: str, item: Mapping[str, Any], gpu: Gpu) -> dict[str, Any]:
    """What the calls of a target have that the file says nothing of."""
    usual = dict(_USUAL[kind])
    if not GEMMS[kind].scaled:
        return usual
    if gpu.capability >= _BLACKWELL:
        usual |= _PACKED_BLOCK32 if GEMMS[kind].recipe else _PACKED
    if "recipe" in item or "recipe_a" in item or "recipe_b" in item:
        usual.pop("recipe", None)
    elif item.get("rhs_type") == "fp4":
        usual |= _FP4
    elif item.get("function"):
        usual |= _MXFP8 | {"disable_ue8m0_cast": gpu.capability >= _BLACKWELL}
    return usual


def _wrong(target: Target, gpu: Gpu) -> str:
    """Why DeepGEMM can have no such target on a GPU; empty if it can."""
    gemm, kind = gemm_of(target), target.kernel_type
    if gemm is None:
        return f"function is {_shown(target.function)}, and SGLang calls no such function by {kind}"
    if not gemm.scaled:
        on_scales = ("lhs_scale", "rhs_scale", "recipe", "recipe_a", "recipe_b", "rhs_type", "disable_ue8m0_cast")
        return next((f"{name} is set, and {kind} has no scales" for name in on_scales if getattr(target, name)), "")
    if not (target.lhs_scale and target.rhs_scale):
        return f"{kind} has scales: lhs_scale and rhs_scale cannot be empty"
    if (target.lhs_major, target.rhs_major) != ("k", "k"):
        return f"operands of {kind} are K-major"
    if gemm_of_call(gemm.function, target.recipe).kernel_type != kind:
        return f"recipe is {_shown(target.recipe)}, and SGLang calls that by another kernel type than {kind}"
    if wrong := wrong_recipe(target.recipe, target.recipe_a, target.recipe_b):
        return f"{wrong}: DeepGEMM has blocks of {' and '.join(map(str, BLOCKS))} columns"
    if (target.recipe_a is None) != (target.recipe_b is None):
        return "recipe_a and recipe_b go together"
    packed = [name for name in ("lhs_scale", "rhs_scale") if getattr(target, name) == "packed"]
    if gpu.capability < _BLACKWELL and (packed or target.rhs_type):
        what = f"{packed[0]} is packed" if packed else "rhs_type is fp4"
        return f"{what}, which needs Blackwell, and {gpu.name} has compute capability {_version(gpu)}"
    recipes = dict(zip(("lhs_scale", "rhs_scale"), recipes_of(target), strict=True))
    for name in packed:
        rows, columns = recipes[name]
        if rows != 1:
            return f"{name} is packed: there is one for each row, and not for {rows}"
        if target.k % columns:
            return f"K is {target.k}, and packed scales of {columns} columns each need a multiple"
    if target.rhs_type and target.k % _FP4_COLUMNS:
        return f"K is {target.k}, and FP4 needs a multiple of {_FP4_COLUMNS}"
    return ""


def _version(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
