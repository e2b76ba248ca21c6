"""Makes the list for first starts of a release out of the plans that starts on a GPU have left.

    first_starts.py RELEASE ARCHITECTURE:HIDDEN_SIZE=PLAN ...

PLAN is a file of `warmstart/ahead` below DeepGEMM's cache of a server of that release, and ARCHITECTURE and HIDDEN_SIZE
what the model's configuration says. What belongs to a feature is told by its name and module, below. What the list has
already stays in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.sglang import first_start
from sglang_warmstart.sglang.first_start import FirstStarts

# DeepGEMM's targets are the model's and its parallel sizes' alone.
LIBRARIES = ("triton", "sglang-jit", "flashinfer", "tvm-ffi", "tilelang")
# The first that matches "LIBRARY MODULE NAME" says to which group it belongs; else it is the architecture's.
FEATURES = (
    (r"triton \S*attention\S* (_fwd|get_num_kv_splits|create_flashinfer_kv|copy_page)", "attention-triton"),
    (r"set_mla_kv_buffer|fused_rope_false_64_", "mla"),
    (r"triton \S*\.moe\.|_moe_sum_reduce|moe_align|_router_triton", "moe"),
    (r"per_token_group_quant", "fp8"),
    (r"flashinfer  norm$|_clamp_position|_resolve_future|jit_activation", "any"),
    (r"triton \S* (write_req_to|alloc_|compute_position|_small_copy)", "any"),
)
_HOPPER = {"FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
_ARCH = ("sglang.jit_kernel.utils:override_jit_cuda_arch", 9, 0)
# Their commands name the host's compiler, and tvm-ffi's directories are a hash of paths: the library is called.
CALLS: dict[str, dict[str, Any]] = {
    "flashinfer norm": {"call": "flashinfer.jit.norm:gen_norm_module", "variables": _HOPPER},
    "flashinfer dsv3_fused_routing": {
        "call": "flashinfer.jit.dsv3_optimizations:gen_dsv3_fused_routing_module",
        "variables": _HOPPER,
    },
    "tvm-ffi fused_rope_false_64_true_bf16_t": {
        "call": "sglang.jit_kernel.rope:_jit_fused_rope_module",
        "arguments": [False, 64, "torch.bfloat16"],
    },
    "tvm-ffi activation_bf16_t_true": {
        "call": "sglang.jit_kernel.activation:_jit_activation_module",
        "arguments": ["torch.bfloat16"],
    },
    "tvm-ffi resolve_future_token_ids_int64_t": {
        "call": "sglang.jit_kernel.resolve_future_token_ids:_jit_resolve_future_token_ids_module",
        "arguments": ["torch.int64"],
    },
    "tvm-ffi clamp_position_int64_t": {
        "call": "sglang.jit_kernel.clamp_position:_jit_clamp_position_module",
        "arguments": ["torch.int64"],
    },
    "tvm-ffi set_mla_kv_buffer_1024_128_1024_128_true": {
        "call": "sglang.jit_kernel.set_mla_kv_buffer:_jit_set_mla_kv_buffer_module",
        "arguments": [1024, 128, True],
    },
}
# How long they took where the plan does not say: a rank found them, built by the service.
SECONDS = {"norm": 40.0, "clamp_position": 10.0, "set_mla_kv_buffer": 12.0}


def general(recipe: Recipe) -> Recipe:
    """A recipe that holds on another machine with the same library."""
    name = recipe.name.removeprefix("sgl_kernel_jit_")
    seconds = recipe.seconds or next((each for start, each in SECONDS.items() if name.startswith(start)), 0.0)
    recipe = msgspec.structs.replace(recipe, seconds=round(seconds, 2))
    if recipe.library == "tvm-ffi":
        form = {**CALLS[f"tvm-ffi {name}"], "within": _ARCH, "builds": True}
        return msgspec.structs.replace(recipe, form=form, made=f"{recipe.name}_*/*.so")
    if recipe.library == "tilelang":
        return msgspec.structs.replace(recipe, made="")  # a hash that its own library is part of
    if recipe.library == "flashinfer":
        return msgspec.structs.replace(recipe, form=CALLS[f"flashinfer {name}"])
    return recipe


def groups(plans: dict[str, build_plan.BuildPlan]) -> Iterator[tuple[str, Recipe]]:
    """Each recipe with the feature that it belongs to."""
    for model, plan in plans.items():
        architecture, _, size = model.partition(":")
        for name in LIBRARIES:
            for recipe in plan.parts[name].recipes if name in plan.parts else ():
                said = f"{name} {recipe.form.get('module', '')} {recipe.name}"
                own = f"{architecture} {size}" if name == "tilelang" else architecture
                feature = next((feature for pattern, feature in FEATURES if re.search(pattern, said)), own)
                yield feature, general(recipe)


def main() -> None:
    """Write the list, or what it lacks into it."""
    release, plans = sys.argv[1], {}
    path = first_start.LISTS / f"{release}{first_start.SUFFIX}"
    for word in sys.argv[2:]:
        model, _, plan = word.partition("=")
        plans[model] = build_plan.decode(Path(plan).read_bytes(), plan)
    found: dict[str, dict[str, Recipe]] = {}
    if path.is_file():
        for feature, recipes in first_start.of_release(release).groups.items():
            found[feature] = {recipe.key: recipe for recipe in recipes}
    for feature, recipe in groups(plans):
        of_feature = found.setdefault(feature, {})
        known = of_feature.get(recipe.key)
        if known is None or known.seconds < recipe.seconds:
            of_feature[recipe.key] = recipe
    parts = [plan.parts for plan in plans.values()]
    made = FirstStarts(
        capability=parts[0]["triton"].capability,
        # Triton's options and TileLang's functions are in the recipes.
        libraries={
            name: each[name].versions[name] for name in ("triton", "tilelang") for each in parts if name in each
        },
        groups={name: tuple(each.values()) for name, each in sorted(found.items())},
    )
    path.write_bytes(zstandard.compress(msgspec.json.encode(made), 19))


if __name__ == "__main__":
    main()
