"""Calls of Triton kernels without a GPU, and the recipes of what they compile.

A call is made by Triton's own launcher, up to the launch (``warmup``). A driver stands in for that of a GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from sglang_warmstart.libraries import recipe
from sglang_warmstart.libraries.recipe import Recipe

from kit.environment import child_environment, python_path
from kit.release import installed_release

_HERE = Path(__file__).parents[1]

# One is defined otherwise where there is no GPU, as many of SGLang's are. The others: decorated, and given a function.
OWN_KERNELS = """
import torch
import triton
import triton.language as tl

HOPPER = tl.constexpr(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0))
WARP = tl.constexpr(torch.cuda.get_device_properties(0).warp_size)

@triton.jit
def square(x):
    return x * x

@triton.constexpr_function
def twice(n):
    return 2 * n

@triton.jit
def by_gpu(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if HOPPER:
        tl.store(y + at, tl.load(x + at) + WARP)
    else:
        tl.store(y + at, tl.load(x + at))

@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % 2 == 0})
@triton.jit
def tuned(x, y, n, low, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + low, mask=at < n)

class Kernels:
    @triton.jit
    def with_values(xs, y, F: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, NAME: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, F(tl.load(xs[0] + at)).to(D))

def local():
    @triton.jit
    def inside(x, y, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at))
    return inside
"""


class _Driver:
    """Triton's driver of an H100 on which nothing runs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def pretend() -> None:
    """Let torch and Triton find an H100 in this process."""
    import torch
    from triton.runtime.driver import driver

    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        setattr(torch.cuda, name, lambda _value=value: _value)
    torch.cuda.get_device_capability = lambda _device=None: (9, 0)
    torch.cuda.get_device_properties = lambda _device=None: SimpleNamespace(warp_size=32, multi_processor_count=132)
    torch.cuda.get_device_name = lambda _device=None: "NVIDIA H100 80GB HBM3"
    driver.set_active(_Driver())


def pointer(dtype: str = "bfloat16") -> Any:
    """A tensor, as Triton sees one."""
    import torch
    from triton.runtime.jit import MockTensor

    return MockTensor(getattr(torch, dtype))


def call(kernel: Any, **given: Any) -> None:
    """Call a kernel. Pointers that are not given are to bf16, numbers are 64, and what has to be constant is false.

    Args:
        given: arguments and options; those that the kernel of this release does not have are left out.
    """
    function, decided = kernel, set()
    while hasattr(function, "fn") and not hasattr(function, "params"):
        decided |= set(getattr(function, "values", ()))
        decided |= {name for config in getattr(function, "configs", ()) for name in config.kwargs}
        function = function.fn
    arguments = {name: value for name, value in given.items() if name in function.arg_names or name.startswith("num_")}
    for param in function.params:
        if param.name in arguments or param.name in decided or param.has_default:
            continue
        is_pointer = param.name.endswith(("ptr", "indices", "indptr")) or param.name in ("s", "o", "x", "y")
        arguments[param.name] = False if param.is_constexpr else pointer() if is_pointer else 64
    for config in getattr(kernel, "configs", [None]):
        launched, more = (kernel, {}) if config is None else (kernel.fn, config.all_kwargs())
        launched.run(grid=(1,), warmup=True, **{**arguments, **more})


def sglang_calls() -> dict[str, Callable[[], None]]:
    """Calls of kernels of the installed SGLang."""
    import triton.language as tl

    def kernel(*modules: str, name: str) -> Any:
        for module in modules:  # where it was, and where it is
            try:
                return getattr(importlib.import_module(f"sglang.{module}"), name)
            except ModuleNotFoundError as error:
                if error.name is None or not error.name.startswith("sglang"):
                    raise
        raise AssertionError(f"SGLang has no {name}")

    old = "srt.layers.attention"
    new = "kernels.ops"

    def plain() -> None:
        name = "create_flashinfer_kv_indices_triton"
        found = kernel(f"{new}.attention.kv_indices", f"{old}.utils", name=name)
        numbers = ("req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_indptr", "kv_indices_ptr")
        pointers = {each: pointer("int32") for each in numbers}
        call(found, **pointers, kv_start_idx=None, req_to_token_ptr_stride=4096, NUM_TOKEN_BLOCKS=1)

    def with_a_dtype_and_a_call() -> None:
        found = kernel(
            f"{new}.moe.fused_moe_triton_kernels",
            "srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_kernels",
            name="fused_moe_kernel",
        )
        sizes = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
        nothing = dict.fromkeys(("a_desc", "b_desc", "bias_ptr", "a_scale_ptr", "b_scale_ptr", "add_mask_ptr"))
        numbers = ("sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr")
        call(
            found,
            **sizes,
            **nothing,
            **{each: pointer("int32") for each in numbers},
            topk_weights_ptr=pointer("float32"),
            group_n=0,
            group_k=0,
            top_k=8,
            ROUTER_TOPK=8,
            even_Ks=True,
            filter_expert=True,
            compute_type=tl.bfloat16,
            num_warps=4,
            num_stages=4,
        )

    def with_heuristics() -> None:
        found = kernel(
            f"{new}.mamba.triton_ops.mamba_ssm", f"{old}.mamba.ops.mamba_ssm", name="_selective_scan_update_kernel"
        )
        call(
            found,
            z_ptr=None,
            intermediate_states_buffer=None,
            retrieve_parent_token_ptr=None,
            intermediate_state_indices_ptr=None,
            state_batch_indices_ptr=pointer("int32"),
            rand_seed_ptr=None,
            dstate=16,
            pad_slot_id=-1,
            BLOCK_SIZE_M=8,
            PHILOX_ROUNDS=0,
            num_warps=4,
        )

    def with_a_call() -> None:
        found = kernel(
            f"{new}.attention.decode_attention", f"{old}.triton_ops.decode_attention", name="_fwd_kernel_stage1"
        )
        sizes = {"BLOCK_DMODEL": 64, "BLOCK_DV": 64, "BLOCK_N": 32, "MIN_BLOCK_KV": 32, "Lk": 64, "Lv": 64}
        tensors = {each: pointer() for each in ("Q", "K_Buffer", "V_Buffer", "Att_Out", "Att_Lse")}
        call(
            found,
            **sizes,
            **tensors,
            kv_indptr=pointer("int32"),
            kv_indices=pointer("int32"),
            num_kv_splits=pointer("int32"),
            sm_scale_withk=0.125,
            kv_group_num=4,
            logit_cap=30.0,
            xai_temperature_len=-1,
            PAGE_SIZE=1,
            num_warps=4,
            num_stages=2,
        )

    def autotuned() -> None:
        found = kernel(
            f"{new}.diffusion.rope.rotary_triton",
            "jit_kernel.diffusion.triton.rotary",
            name="_rotary_embedding_kernel",
        )
        found.configs = found.configs[:2]
        call(found)

    def in_a_module_that_asks_triton_for_the_gpu() -> None:
        found = kernel(
            f"{new}.attention.fla.layernorm_gated", f"{old}.fla.layernorm_gated", name="_layer_norm_fwd_1pass_kernel"
        )
        tensors = {"X": pointer(), "Y": pointer(), "W": pointer(), "Rstd": pointer("float32")}
        nothing = dict.fromkeys(("B", "Z", "Mean"))
        settings = {"N": 128, "BLOCK_N": 128, "ROWS_PER_BLOCK": 4, "IS_RMS_NORM": True, "ACTIVATION": "swish"}
        call(found, **tensors, **nothing, **settings, eps=1e-6, num_warps=1)

    calls = [
        plain,
        with_a_dtype_and_a_call,
        with_heuristics,
        with_a_call,
        in_a_module_that_asks_triton_for_the_gpu,
    ]
    if installed_release().since("0.5.20"):
        calls.append(autotuned)  # those before import packages that are not here, or use what Triton no longer has
    return {each.__name__: each for each in calls}


def own_calls() -> dict[str, Callable[[], None]]:
    """Calls of the kernels that are in ``OWN_KERNELS``."""
    import own_kernels as own
    import triton.language as tl

    values = {"F": own.square, "D": tl.float16, "LOW": float("-inf"), "NAME": "é", "N": 64}
    return {
        "by_gpu": lambda: call(own.by_gpu, BLOCK=64),
        "tuned": lambda: call(own.tuned, n=100, low=0.5),
        "with_values": lambda: call(own.Kernels.with_values, xs=(pointer("float32"), 3, None), **values),
        "with_a_number": lambda: call(own.Kernels.with_values, xs=(pointer(), 1), **{**values, "LOW": own.twice}),
        "local": lambda: call(own.local(), BLOCK=64),
    }


def _entries() -> dict[str, list[str]]:
    import triton

    return {
        place.name: sorted(file.name for file in place.iterdir()) for place in Path(triton.knobs.cache.dir).iterdir()
    }


def record(which: str) -> None:
    """Make the calls, build their recipes in another process, make them again; print what came of it, as JSON.

    To be run in a process of its own.
    """
    from sglang_warmstart.base.hooks import Hooks
    from sglang_warmstart.libraries.triton import Triton

    pretend()
    import triton

    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    hooks = Hooks("test")
    Triton().watch(hooks, triton)
    calls = own_calls() if which == "own" else sglang_calls()
    said: dict[str, Any] = {"calls": {}, "notes": hooks.notes}
    recipes: list[Recipe] = []
    found: list[Recipe] = []
    recipe.listen(lambda each: (recipes if each.form else found).append(each))
    for name, make in calls.items():
        before, number = time.perf_counter(), len(recipes)
        make()
        made = [[each.name, each.form, each.made, each.seconds] for each in recipes[number:]]
        said["calls"][name] = {"seconds": time.perf_counter() - before, "recipes": made}
    said["misses"], said["first"] = hits.count(False), _entries()
    shutil.rmtree(triton.knobs.cache.dir)

    forms = Path("forms.json")
    forms.write_text(json.dumps([each.form for each in recipes]))
    code = "from kit.triton_calls import build_all; build_all('forms.json')"
    # Without what stands in for a GPU: its environment is that of the recipes, in a place where there is none.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    said["built"], said["second"] = json.loads(done.stdout.splitlines()[-1]), _entries()

    hits.clear()
    for make in calls.values():
        _forget()
        make()
    said["hits"], said["third"] = hits, _entries()
    said["found"] = [[each.library, each.name, each.made] for each in found]
    print(json.dumps(said))


def _forget() -> None:
    """Empty the memory that kernels have of what was compiled."""
    from triton.runtime.jit import JITFunction

    for each in gc.get_objects():
        if isinstance(each, JITFunction):
            each.device_caches.clear()


def build_all(forms: str) -> None:
    """Build what a file has, as a builder does it: each in a fork; print the seconds that each took, as JSON."""
    from sglang_warmstart.libraries.triton_ahead import build, prepare

    def timed(act: Callable[[], object]) -> tuple[float, object]:
        before = time.perf_counter()
        said = act()
        return time.perf_counter() - before, said

    recipes = json.loads(Path(forms).read_text())
    prepared, _ = timed(lambda: [prepare(form) for form in recipes])
    built = []
    for form in recipes:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, json.dumps(timed(lambda form=form: build(form, None, os.environ))).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as said:
            built.append(json.loads(said.read()))
        assert os.waitpid(child, 0)[1] == 0
    seconds, made = zip(*built, strict=True)
    print(json.dumps({"prepared": prepared, "seconds": seconds, "made": made}))


def refuse_all(forms: str) -> None:
    """Try to build what a file has; print what is said of each, as JSON."""
    from sglang_warmstart.libraries.triton_ahead import build, prepare

    said = []
    for form in json.loads(Path(forms).read_text()):
        for act in (prepare, lambda form: build(form, None, os.environ)):
            try:
                act(form)
            except recipe.BuildError as error:
                said.append(str(error))
            else:
                said.append("")
    print(json.dumps(said))


def go_round() -> None:
    """Describe sources of all kinds, and make them again: from JSON, they have the hash that they had."""
    import triton.language as tl
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from sglang_warmstart.libraries import triton_ahead
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    pretend()
    import own_kernels as own

    backend = make_backend(target)
    kernel = own.Kernels.with_values
    names = kernel.arg_names
    kinds = st.sampled_from(["*bf16", "*fp32", "i32", "i64", "fp32", "u1", "constexpr", "tensordesc<fp16[64, 64]>"])
    types = st.recursive(kinds, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
    plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text()
    things = st.sampled_from([tl.float32, tl.bfloat16, own.square, own.twice, own.tuned.fn.fn])
    values = st.recursive(
        plain | things, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3), max_leaves=4
    )
    paths = st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=3).map(tuple)
    attrs = st.lists(st.tuples(st.just("tt.divisibility"), st.integers(1, 16)).map(list), max_size=2)
    options = {
        "num_warps": st.sampled_from([1, 2, 4, 8]),
        "num_stages": st.integers(1, 5),
        "maxnreg": st.none() | st.integers(32, 255),
        "enable_fp_fusion": st.booleans(),
        "allowed_dot_input_precisions": st.sampled_from([("ieee",), ("tf32", "ieee")]),
    }

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(
        st.tuples(*[types] * len(names)),
        # A constexpr whose value is one of another type has the same text, and may be one.
        st.dictionaries(paths, values | values.map(tl.constexpr), max_size=4),
        st.dictionaries(paths, attrs, max_size=4),
        st.fixed_dictionaries(options),
    )
    def check(kinds: Any, constants: Any, attrs: Any, options: Any) -> None:
        source = ASTSource(kernel, dict(zip(names, kinds, strict=True)), constants, attrs)
        parsed = backend.parse_options(options)
        form = triton_ahead.described(source, parsed, target)
        again, found, read = triton_ahead._source(json.loads(msgspec.json.encode(form)))
        assert again.hash() == source.hash()
        assert (again.fn, found) == (source.fn, target)
        assert backend.parse_options(read).hash() == parsed.hash()

    check()


def run_in(place: Path, code: str) -> str:
    """The last line that a process below a directory prints; ``own_kernels`` and this module can be imported there."""
    (place / "own_kernels.py").write_text(OWN_KERNELS, encoding="utf-8")
    settings = {"PYTHONPATH": python_path(_HERE, place), "TRITON_CACHE_DIR": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from kit import triton_calls; {code}"],
        env=child_environment(settings),
        cwd=place,
        stdout=subprocess.PIPE,
        text=True,
        timeout=400,
        check=True,
    )
    return (done.stdout.splitlines() or [""])[-1]


def recorded(which: str, place: Path) -> dict[str, Any]:
    """What :func:`record` says, in a process below a directory."""
    said: dict[str, Any] = json.loads(run_in(place, f"triton_calls.record({which!r})"))
    return said
