"""F2: the sampled M list, and a warm-up that does no harm when it fails."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from kit.gpu_standins import DeepGemm
from kit.release import installed_release, sglang_directory

FEATURE = "fast-warmup"

FAST_WARMUP = "SGLANG_JIT_DEEPGEMM_FAST_WARMUP"
STRICT = "SGLANG_WARMSTART_STRICT"
COMPILE_UTILS = sglang_directory() / "srt/layers/deep_gemm_wrapper/compile_utils.py"

# By a patch, SGLang itself skips a target that DeepGEMM refuses, and the plugin's strict mode does not hear of it.
skipped_by_sglang = pytest.mark.skipif(
    "Skip DeepGEMM warmup of" in COMPILE_UTILS.read_text(encoding="utf-8"), reason="SGLang skips a refused target"
)

REFUSAL = TypeError("bf16_gemm_nt(): incompatible function arguments.\nInvoked with: a page of tensors")


def update_config(compile_utils: ModuleType, chunked_prefill_size: int, gpu_id: int = 0, base_gpu_id: int = 0) -> None:
    """SGLang's own call when a model runner starts."""
    if not installed_release().since("0.5.19"):
        from sglang.srt.server_args import ServerArgs

        arguments = ServerArgs("dummy", chunked_prefill_size=chunked_prefill_size, base_gpu_id=base_gpu_id)
        if installed_release().since("0.5.18"):
            from sglang.srt.runtime_context import get_context

            # Each case publishes its own, and no other test of this module asks.
            get_context().set_server_args(arguments)
        compile_utils.update_deep_gemm_config(gpu_id, arguments)
        return
    from sglang.srt.runtime_context import get_context

    settings = {"chunked_prefill_size": chunked_prefill_size, "base_gpu_id": base_gpu_id}
    with get_context().override_server_args(**settings):
        compile_utils.update_deep_gemm_config(gpu_id)


def m_list(compile_utils: ModuleType) -> list[int]:
    """The Ms that a warm-up of this rank runs."""
    made: list[int] = compile_utils._BUILTIN_M_LIST
    return made


def is_sampled(m: int, max_prefill_bs: int) -> bool:
    """The definition, M by M: all up to 1024, then multiples of 2 up to 2048, of 4 up to 4096, and so on."""
    step, end = 2, 2048
    while m >= end:
        step, end = 2 * step, 2 * end
    return m <= 1024 or m == max_prefill_bs or (m < max_prefill_bs and m % step == 0)


CHUNKS = [-1, 0, 1, 512, 1000, 1024, 1025, 5000, 8192, 10000, 16384, 40000]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_fast_list_is_sampled_and_keeps_to_its_cap(
    chunk: int, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAST_WARMUP, "1")
    update_config(compile_utils, chunk)
    max_prefill_bs = 16384 if chunk < 1 else min(chunk, 32768)
    # Far beyond the cap, so that a list which runs past it differs.
    assert m_list(compile_utils) == [m for m in range(1, 140_000) if is_sampled(m, max_prefill_bs)]


@pytest.mark.parametrize(("chunk", "count"), [(1, 1024), (8192, 2560), (16384, 3072), (-1, 3072)])
def test_the_fast_list_has_the_stated_length(
    chunk: int, count: int, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAST_WARMUP, "1")
    update_config(compile_utils, chunk)
    assert len(m_list(compile_utils)) == count


@pytest.mark.parametrize(
    ("chunk", "m_max"),
    [*zip(CHUNKS, [65536, 65536, *[16384] * 7, 20000, 32768, 80000], strict=True), (65536, 131072), (70000, 131072)],
)
def test_the_full_list_has_every_m(
    chunk: int, m_max: int, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FAST_WARMUP, raising=False)
    # The switch is read here, not when the module was imported.
    monkeypatch.setattr(compile_utils, "_FAST_WARMUP", True, raising=False)
    update_config(compile_utils, chunk)
    assert m_list(compile_utils) == list(range(1, m_max + 1))


def test_the_switch_is_read_each_time_the_list_is_made(
    compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAST_WARMUP, "1")
    update_config(compile_utils, 5000)
    assert m_list(compile_utils)[-1] == 5000
    monkeypatch.setenv(FAST_WARMUP, "0")
    update_config(compile_utils, 5000)
    assert m_list(compile_utils)[-1] == 16384


@pytest.mark.parametrize(("gpu_id", "base_gpu_id", "compiles"), [(0, 0, True), (3, 0, False), (4, 4, True)])
@pytest.mark.parametrize("fast", ["0", "1"])
def test_every_rank_gets_the_list_and_the_first_one_compiles(
    gpu_id: int,
    base_gpu_id: int,
    compiles: bool,
    fast: str,
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FAST_WARMUP, fast)
    update_config(compile_utils, 5000, gpu_id, base_gpu_id)
    assert compile_utils._DO_COMPILE_ALL is compiles
    assert compile_utils._IS_FIRST_RANK_ON_NODE is compiles
    assert m_list(compile_utils)[-1] == (5000 if fast == "1" else 16384)


@pytest.fixture
def three_ms(compile_utils: ModuleType) -> None:
    """A short list: what these tests ask does not depend on its length."""
    compile_utils._BUILTIN_M_LIST = [1, 2, 3]
    compile_utils._DO_COMPILE_ALL = True


def bf16_gemm(m: int = 5, n: int = 64, k: int = 32) -> torch.Tensor:
    """A GEMM of a model, through SGLang's wrapper; its result."""
    from sglang.srt.layers import deep_gemm_wrapper

    a, b = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k, dtype=torch.bfloat16)
    out = torch.zeros(m, n)
    deep_gemm_wrapper.gemm_nt_bf16bf16f32(a, b, out)
    return out


@pytest.mark.usefixtures("three_ms")
def test_the_compile_mode_is_restored_after_a_warm_up(deep_gemm: DeepGemm) -> None:
    deep_gemm.compile_mode = 7
    bf16_gemm()
    # The warm-up itself ran in the warm-up's mode, the model's own call did not.
    assert [(call.m, call.compile_mode) for call in deep_gemm.calls] == [(1, 1), (2, 1), (3, 1), (5, 7)]
    assert deep_gemm.compile_mode == 7


@pytest.mark.usefixtures("three_ms")
@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA out of memory"), KeyboardInterrupt(), pytest.param(REFUSAL, marks=skipped_by_sglang)]
)
def test_the_compile_mode_is_restored_after_a_failing_warm_up(
    failure: Exception, deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STRICT, "1")
    deep_gemm.compile_mode, deep_gemm.failure = 7, failure
    with pytest.raises(type(failure)):
        bf16_gemm()
    assert deep_gemm.compile_mode == 7


@pytest.mark.usefixtures("three_ms")
def test_a_deep_gemm_without_a_compile_mode_works(deep_gemm: DeepGemm) -> None:
    del deep_gemm.module.get_compile_mode, deep_gemm.module.set_compile_mode
    assert bf16_gemm().unique().tolist() == [32.0]
    assert [call.m for call in deep_gemm.calls] == [1, 2, 3, 5]


@pytest.mark.usefixtures("three_ms")
def test_a_refused_warm_up_skips_its_target_and_the_server_goes_on(
    deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(STRICT, raising=False)
    deep_gemm.failure = REFUSAL
    # The warm-up fails at its first M; the call that it came before is answered.
    assert bf16_gemm().unique().tolist() == [32.0]
    assert bf16_gemm().unique().tolist() == [32.0]
    assert [call.m for call in deep_gemm.calls] == [5, 5]

    warnings = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(warnings) == 1
    for named in ("GEMM_NT_BF16BF16F32", "N=64", "K=32", "num_groups=1", "incompatible function arguments"):
        assert named in warnings[0]
    assert "\n" not in warnings[0]


@pytest.mark.usefixtures("three_ms")
def test_a_refusal_of_one_target_leaves_the_others(deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRICT, raising=False)
    deep_gemm.failure = REFUSAL
    bf16_gemm(n=64)
    bf16_gemm(n=128)
    assert [(call.m, call.shapes[1][0]) for call in deep_gemm.calls] == [(5, 64), *[(m, 128) for m in (1, 2, 3, 5)]]


@skipped_by_sglang
@pytest.mark.usefixtures("three_ms")
def test_strict_mode_raises_a_refusal(deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
    deep_gemm.failure = REFUSAL
    with pytest.raises(TypeError, match="incompatible function arguments"):
        bf16_gemm()


@pytest.mark.usefixtures("three_ms")
@pytest.mark.parametrize("failure", [RuntimeError("CUDA out of memory"), ValueError("no such block size")])
def test_other_failures_are_not_swallowed(
    failure: Exception, deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STRICT, raising=False)
    deep_gemm.failure = failure
    with pytest.raises(type(failure), match=str(failure)):
        bf16_gemm()


@pytest.mark.usefixtures("three_ms")
def test_on_musa_nothing_is_warmed(
    deep_gemm: DeepGemm, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_utils, "_is_musa", True)
    kernel_type = compile_utils.DeepGemmKernelType.GEMM_NT_BF16BF16F32
    assert isinstance(compile_utils.deep_gemm_execution_hook(5, 64, 32, 1, kernel_type), nullcontext)
    bf16_gemm()
    assert [call.m for call in deep_gemm.calls] == [5]


def not_ue8m0() -> tuple[torch.Tensor, torch.Tensor]:
    """An fp8 input whose scales are no powers of two: what the sanity check is there to find."""
    return torch.zeros(2, 128, dtype=torch.float8_e4m3fn), torch.full((2, 1), 0.3)


def test_the_sanity_check_checks_where_deep_gemm_is_in_use(
    deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    monkeypatch.setattr(entrypoint, "_SANITY_CHECK", True)
    monkeypatch.setattr(entrypoint, "DEEPGEMM_SCALE_UE8M0", True)
    with pytest.raises(AssertionError):
        entrypoint._sanity_check_input(not_ue8m0())


def test_the_sanity_check_is_nothing_where_deep_gemm_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    monkeypatch.setattr(entrypoint, "_SANITY_CHECK", True)
    monkeypatch.setattr(entrypoint, "DEEPGEMM_SCALE_UE8M0", True)
    monkeypatch.setattr(entrypoint, "ENABLE_JIT_DEEPGEMM", False)
    entrypoint._sanity_check_input(not_ue8m0())


@pytest.mark.parametrize("num_sms", [None, 16])
def test_the_sm_count_is_nothing_where_deep_gemm_is_disabled(
    num_sms: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    monkeypatch.setattr(entrypoint, "ENABLE_JIT_DEEPGEMM", False)
    monkeypatch.delattr(entrypoint, "deep_gemm", raising=False)
    with entrypoint.configure_deep_gemm_num_sms(num_sms):
        pass
