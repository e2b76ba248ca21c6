"""F3: the prenorm GEMM of mHC goes through DeepGEMM's warm-up, and costs one M per split bucket."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kit.deepseek_v4 import tiny_deepseek_v4
from kit.gpu_standins import DeepGemm, FusedPrenorm, install_mhc_kernels, mhc_module
from kit.prenorm import K, N, Prenorm
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as imported_compile_utils

FEATURE = "hc-prenorm"

# A tiny model is built of this release alone.
on_0_5_12 = pytest.mark.release("0.5.12")

# In a tuple: the plugin replaces the class wherever a module holds it by a name.
SGLANG_KERNEL_TYPES: tuple[type[IntEnum]] = (imported_compile_utils.DeepGemmKernelType,)


@pytest.fixture(autouse=True)
def first_rank(compile_utils: ModuleType) -> None:
    """The rank that warms, with a short list of Ms."""
    compile_utils._BUILTIN_M_LIST = [1, 2, 3]
    compile_utils._DO_COMPILE_ALL = True


def targets(compile_utils: ModuleType) -> dict[tuple[IntEnum, int, int, int], bool]:
    """What SGLang's machinery has warmed, by its keys."""
    warmed: dict[tuple[IntEnum, int, int, int], bool] = compile_utils._INITIALIZATION_DICT
    return warmed


@pytest.mark.by_plugin
def test_the_kernel_type_is_added_and_the_old_ones_stay_equal(compile_utils: ModuleType) -> None:
    (before,), now = SGLANG_KERNEL_TYPES, compile_utils.DeepGemmKernelType
    # 0.5.13 has one of its own.
    added = [] if "TF32_HC_PRENORM_GEMM" in before.__members__ else ["TF32_HC_PRENORM_GEMM"]
    assert [*now.__members__] == [*before.__members__, *added]
    for member in before:
        assert now[member.name] == member
        assert hash(now[member.name]) == hash(member)
    assert (now.TF32_HC_PRENORM_GEMM in [*before]) is not bool(added)


@pytest.mark.by_plugin
def test_targets_that_were_warmed_before_stay_warm(deep_gemm: DeepGemm, compile_utils: ModuleType) -> None:
    (before,) = SGLANG_KERNEL_TYPES
    compile_utils._INITIALIZATION_DICT[(before.GEMM_NT_BF16BF16F32, N, K, 1)] = True
    now = compile_utils.DeepGemmKernelType.GEMM_NT_BF16BF16F32
    for n in (N, N + 8):
        with compile_utils.deep_gemm_execution_hook(1, n, K, 1, now):
            pass
    assert {call.shapes[1][0] for call in deep_gemm.calls} == {N + 8}


@pytest.mark.parametrize("num_splits", [None, 1, 4, 16])
@pytest.mark.parametrize("m", [1, 64, 4096])
def test_the_wrapper_computes_what_torch_computes(m: int, num_splits: int | None, deep_gemm: DeepGemm) -> None:
    call = Prenorm(m, num_splits)
    call.run()
    call.check()


@pytest.mark.parametrize("num_splits", [None, 4])
def test_no_rows_make_no_call(num_splits: int | None, deep_gemm: DeepGemm, compile_utils: ModuleType) -> None:
    Prenorm(0, num_splits).run()
    assert deep_gemm.calls == []
    assert targets(compile_utils) == {}


@pytest.mark.parametrize(("num_splits", "fourth_key"), [(None, 0), (1, 1), (16, 16)])
def test_a_split_bucket_is_a_target_of_its_own(
    num_splits: int | None, fourth_key: int, deep_gemm: DeepGemm, compile_utils: ModuleType
) -> None:
    Prenorm(5, num_splits).run()
    key = (compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, N, K, fourth_key)
    assert targets(compile_utils) == {key: True}


@pytest.mark.by_plugin
def test_while_kernels_of_tilelang_are_looked_for_a_new_bucket_waits(
    deep_gemm: DeepGemm, compile_utils: ModuleType
) -> None:
    from sglang_warmstart.sglang import mhc_at_once

    with mhc_at_once._without_prenorm():
        Prenorm(5, 4).run()
    assert (deep_gemm.calls, targets(compile_utils)) == ([], {})
    Prenorm(5, 4).run()
    assert [call.m for call in deep_gemm.calls] == [1, 5]


def test_each_bucket_is_warmed_with_one_m_and_once(deep_gemm: DeepGemm) -> None:
    for num_splits in (4, None, 4, None, 16):
        for m in (64, 7):
            Prenorm(m, num_splits).run()
    assert [(call.num_splits, call.m) for call in deep_gemm.calls] == [
        *[(4, 1), (4, 64), (4, 7)],
        *[(None, 1), (None, 64), (None, 7)],
        *[(4, 64), (4, 7), (None, 64), (None, 7)],
        *[(16, 1), (16, 64), (16, 7)],
    ]


def test_other_kernel_types_keep_the_whole_list(deep_gemm: DeepGemm, compile_utils: ModuleType) -> None:
    kernel_type = compile_utils.DeepGemmKernelType.GEMM_NT_BF16BF16F32
    with compile_utils.deep_gemm_execution_hook(5, N, K, 1, kernel_type):
        pass
    assert [call.m for call in deep_gemm.calls] == [1, 2, 3]


def test_a_rank_that_does_not_compile_does_not_warm(deep_gemm: DeepGemm, compile_utils: ModuleType) -> None:
    compile_utils._DO_COMPILE_ALL = False
    call = Prenorm(64, 4)
    call.run()
    call.check()
    assert [call.m for call in deep_gemm.calls] == [64]


@pytest.mark.parametrize("num_splits", [None, 4])
def test_where_deep_gemms_jit_is_switched_off_the_gemm_is_called_and_nothing_else(
    num_splits: int | None, deep_gemm: DeepGemm, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    for module in (compile_utils, entrypoint):  # as they are when they are imported so
        monkeypatch.setattr(module, "ENABLE_JIT_DEEPGEMM", False)
        monkeypatch.delattr(module, "deep_gemm")
    for m in (64, 7):
        call = Prenorm(m, num_splits)
        call.run()
        call.check()
    assert [call.m for call in deep_gemm.calls] == [64, 7]
    assert targets(compile_utils) == {}


@pytest.mark.parametrize("num_splits", [None, 4])
def test_switched_off_as_a_whole_the_gemm_is_called_and_nothing_else(
    num_splits: int | None, deep_gemm: DeepGemm, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WARMSTART", "0")
    Prenorm(64, num_splits).run()
    assert [call.m for call in deep_gemm.calls] == [64]
    assert targets(compile_utils) == {}


@pytest.mark.parametrize("num_splits", [None, 1, 16])
def test_the_warm_up_calls_with_shapes_and_dtypes_of_the_real_thing(
    num_splits: int | None, deep_gemm: DeepGemm
) -> None:
    Prenorm(1, num_splits).run()
    warm_up, real = deep_gemm.calls
    assert (warm_up.shapes, warm_up.dtypes, warm_up.num_splits) == (real.shapes, real.dtypes, real.num_splits)
    assert (warm_up.compile_mode, real.compile_mode) == (1, 0)


@pytest.mark.parametrize("num_splits", [None, 1, 16])
@pytest.mark.parametrize("max_m", [1, 4096])
def test_the_memory_estimate_is_what_a_call_takes(
    max_m: int, num_splits: int | None, deep_gemm: DeepGemm, compile_utils: ModuleType
) -> None:
    compile_utils._BUILTIN_M_LIST = [max_m]
    Prenorm(1, num_splits).run()
    estimate = compile_utils._BaseWarmupExecutor.get_memory_requirement(
        compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, max_m=max_m, n=N, k=K, num_groups=num_splits or 0
    )
    assert deep_gemm.calls[0].m == max_m
    assert estimate * (1 << 30) == pytest.approx(deep_gemm.calls[0].bytes)


def test_the_memory_estimates_of_sglang_are_unchanged(compile_utils: ModuleType) -> None:
    estimate = compile_utils._BaseWarmupExecutor.get_memory_requirement(
        compile_utils.DeepGemmKernelType.GEMM_NT_BF16BF16F32, 64, n=128, k=256, num_groups=1
    )
    assert estimate * (1 << 30) == 64 * 256 * 2 + 128 * 256 * 2 + 64 * 128 * 4


@pytest.fixture
def layer(deep_gemm: DeepGemm, deepseek_v4: ModuleType) -> Any:
    """A real decoder layer with weights; DeepGEMM is routed by its construction."""
    built = deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0)
    for parameter in (built.hc_attn_fn, built.hc_attn_base, built.hc_attn_scale):
        torch.nn.init.normal_(parameter)
    return built


@pytest.fixture
def launches(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[FusedPrenorm]:
    return install_mhc_kernels(monkeypatch)


def hc_pre(layer: Any, num_tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention path of the layer; its input and its output."""
    x = torch.randn(num_tokens, layer.hc_mult, layer.hidden_size).bfloat16()
    y, *_ = layer.hc_pre(x, layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base, layer.input_layernorm)
    return x, y


@on_0_5_12
def test_the_layer_without_tilelang_reaches_the_wrapper(
    layer: Any, launches: list[FusedPrenorm], compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "0")
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    torch.manual_seed(1)
    _, through_deep_gemm = hc_pre(layer)
    key = (compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 24, 4 * 256, 0)
    assert targets(compile_utils) == {key: True}

    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "0")  # the model's own path in torch
    torch.manual_seed(1)
    _, through_torch = hc_pre(layer)
    torch.testing.assert_close(through_deep_gemm, through_torch, rtol=2e-2, atol=2e-2)


@on_0_5_12
def test_the_layer_with_tilelang_reaches_the_wrapper(
    layer: Any,
    launches: list[FusedPrenorm],
    deep_gemm: DeepGemm,
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "1")
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    x, _ = hc_pre(layer)
    (launch,) = launches
    key = (compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 24, 4 * 256, launch.num_splits)
    assert targets(compile_utils) == {key: True}
    torch.testing.assert_close(launch.gemm_out.sum(0), x.flatten(1).float() @ layer.hc_attn_fn.T, rtol=1e-3, atol=1e-2)


HC_MULT, HIDDEN = 4, 256


def of_mhc(num_tokens: int) -> dict[str, Any]:
    """The arguments that mHC's functions have in common, in a model of narrow layers."""
    mixes = HC_MULT * (2 + HC_MULT)
    return {
        "residual": torch.randn(num_tokens, HC_MULT, HIDDEN).bfloat16(),
        "fn": torch.randn(mixes, HC_MULT * HIDDEN),
        "hc_scale": torch.ones(3),
        "hc_base": torch.zeros(mixes),
        "rms_eps": 1e-6,
        "hc_pre_eps": 1e-6,
        "hc_sinkhorn_eps": 1e-6,
        "hc_post_mult_value": 2.0,
        "sinkhorn_repeat": 20,
        "norm_weight": torch.ones(HIDDEN),
        "norm_eps": 1e-6,
    }


def test_mhc_pre_reaches_the_wrapper(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    launches, given = install_mhc_kernels(monkeypatch), of_mhc(100)
    with contextlib.suppress(AttributeError):  # 0.5.12's call sites are routed by a layer
        deepseek_v4.DeepseekV4DecoderLayer(object(), 0)
    # 0.5.14 runs all buckets in the first call.
    monkeypatch.setattr(mhc_module(), "_mhc_pre_warmed", True, raising=False)
    mhc_module().mhc_pre(**given)
    (launch,) = launches
    key = (compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 24, HC_MULT * HIDDEN, launch.num_splits)
    assert targets(compile_utils) == {key: True}
    expected = given["residual"].flatten(1).float() @ given["fn"].T
    torch.testing.assert_close(launch.gemm_out.sum(0), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.by_plugin
@pytest.mark.release(since="0.5.14")
def test_sglangs_own_prewarm_has_its_kernels_built_before_it_runs(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_warmstart.sglang import mhc_at_once

    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    module, launches, built = mhc_module(), install_mhc_kernels(monkeypatch), list[int]()
    with contextlib.suppress(AttributeError):
        deepseek_v4.DeepseekV4DecoderLayer(object(), 0)
    chunk = SimpleNamespace(chunked_prefill_size=256)
    for where, name in (("runtime_context", "get_schedule"), ("server_args", "get_global_server_args")):
        holder = importlib.import_module(f"sglang.srt.{where}")
        monkeypatch.setattr(holder, name, lambda: chunk, raising=False)
    monkeypatch.setattr(module, "get_mhc_pre_token_count_representatives", lambda *_: (64, 128, 256))

    def build_at_once(run: Callable[[], object]) -> None:
        run()
        built.append(len(launches))

    monkeypatch.setattr(mhc_at_once, "build_at_once", build_at_once)
    prewarm = next(vars(module)[name] for name in ("prewarm_mhc_pre", "_prewarm_mhc_pre") if name in vars(module))
    prewarm(**of_mhc(1), n_splits=1, n_splits_pre=32)
    assert built == [3]
    assert [launch.residual.shape[0] for launch in launches] == [64, 128, 256] * 2


@pytest.mark.release("0.5.23")
def test_what_later_releases_call_of_deep_gemm_itself_is_routed_by_a_layer(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    launches, given = install_mhc_kernels(monkeypatch), of_mhc(100)
    module = mhc_module()
    monkeypatch.setattr(module, "mhc_post_tilelang", lambda *args: args[4].copy_(args[1]))
    mixed = {"post_layer_mix": torch.ones(100, HC_MULT), "comb_res_mix": torch.ones(100, HC_MULT, HC_MULT)}
    x = torch.ones(100, HIDDEN).bfloat16()
    module.mhc_fused_post_pre(x=x, **mixed, **given)
    assert targets(compile_utils) == {}, "no model with mHC is there yet"
    with contextlib.suppress(AttributeError):
        deepseek_v4.DeepseekV4DecoderLayer(object(), 0)
    module.mhc_fused_post_pre(x=x, **mixed, **given)
    key = (compile_utils.DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 24, HC_MULT * HIDDEN, launches[1].num_splits)
    assert targets(compile_utils) == {key: True}


@on_0_5_12
def test_the_nextn_layer_is_the_same_class() -> None:
    from sglang.srt.models import deepseek_v4, deepseek_v4_nextn

    assert deepseek_v4_nextn.DeepseekV4DecoderLayer is deepseek_v4.DeepseekV4DecoderLayer
