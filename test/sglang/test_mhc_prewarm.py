"""F4: at start-up each split bucket of mHC is run once, on the first layer of the pipeline stage."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kit.deepseek_v4 import tiny_deepseek_v4
from kit.gpu_standins import CudaRuntime, DeepGemm, FusedPrenorm, install_mhc_kernels

FEATURE = "mhc-prewarm"

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

pytestmark = pytest.mark.release("0.5.12")


HIDDEN_SIZES = [16384, 28672]


def num_splits(num_tokens: int, hc_hidden_size: int, n_sms: int) -> int:
    """SGLang 0.5.12's rule: SMs over tiles of 64 tokens, at the most a quarter of the tiles of 64 along k."""
    return max(1, min(n_sms // -(-num_tokens // 64), -(-hc_hidden_size // 64) // 4))


@pytest.mark.parametrize("n_sms", [78, 132, 148])
@pytest.mark.parametrize("hc_hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("max_num_tokens", [1, 63, 64, 65, 4096, 16384])
def test_the_representatives_are_the_largest_of_each_bucket(
    max_num_tokens: int, hc_hidden_size: int, n_sms: int, cuda: CudaRuntime
) -> None:
    from sglang.srt.layers.mhc import get_mhc_pre_token_count_representatives

    cuda.multi_processor_count = n_sms
    buckets = {}
    for num_tokens in range(1, max_num_tokens + 1):
        buckets.setdefault(num_splits(num_tokens, hc_hidden_size, n_sms), []).append(num_tokens)
    expected = tuple(max(buckets[splits]) for splits in sorted(buckets))
    assert get_mhc_pre_token_count_representatives(max_num_tokens, hc_hidden_size) == expected


@pytest.mark.parametrize("hc_hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("max_num_tokens", [-1, 0])
def test_no_tokens_have_no_representatives(max_num_tokens: int, hc_hidden_size: int, cuda: CudaRuntime) -> None:
    from sglang.srt.layers.mhc import get_mhc_pre_token_count_representatives

    assert get_mhc_pre_token_count_representatives(max_num_tokens, hc_hidden_size) == ()


def test_the_rule_is_asked_for_and_not_copied(cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import mhc

    monkeypatch.setattr(mhc, "_compute_num_split_for_mhc_pre", lambda num_tokens, _: 3 if num_tokens % 2 else 1)
    assert mhc.get_mhc_pre_token_count_representatives(9, 16384) == (8, 9)


@pytest.fixture
def launches(
    deep_gemm: DeepGemm, deepseek_v4: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[FusedPrenorm]:
    """What mHC's fused kernel was launched with; both switches on, and the log open."""
    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "1")
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "1")
    monkeypatch.delenv("SGLANG_WARMSTART_STRICT", raising=False)
    caplog.set_level(logging.INFO)
    return install_mhc_kernels(monkeypatch)


def representatives(max_num_tokens: int) -> tuple[int, ...]:
    """Of the tiny model: 4 streams of 256, so at the most 4 splits."""
    from sglang.srt.layers.mhc import get_mhc_pre_token_count_representatives

    return tuple(get_mhc_pre_token_count_representatives(max_num_tokens, 4 * 256))


def test_a_layer_runs_both_paths_at_each_token_count(
    launches: list[FusedPrenorm], deepseek_v4: ModuleType, cuda: CudaRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    layer = deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0)
    torch.nn.init.constant_(layer.input_layernorm.weight, 3.0)
    torch.nn.init.constant_(layer.post_attention_layernorm.weight, 5.0)
    layer.prewarm_mhc_token_counts((70, 3), "cuda")

    assert [tuple(launch.residual.shape) for launch in launches] == [(70, 4, 256)] * 2 + [(3, 4, 256)] * 2
    assert {launch.residual.dtype for launch in launches} == {torch.bfloat16}
    assert all(launch.inference_mode for launch in launches)
    # Which path it was is in the norm that the kernel fuses.
    assert [launch.norm_weight[0].item() for launch in launches] == [3.0, 5.0, 3.0, 5.0]
    assert cuda.synchronizations >= 4

    lines = [record.getMessage() for record in caplog.records if "mHC prewarm" in record.getMessage()]
    assert [re.sub(r"in \d+\.\d+ s", "in T s", line.removeprefix("warmstart: ")) for line in lines] == [
        f"mHC prewarm: path={path} num_tokens={num_tokens} in T s"
        for num_tokens in (70, 3)
        for path in ("attention", "ffn")
    ]


@pytest.mark.by_plugin
def test_the_kernels_are_built_at_once_before(
    launches: list[FusedPrenorm], deepseek_v4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_warmstart.sglang import mhc_at_once

    built: list[int] = []

    def build_at_once(run: Callable[[], object]) -> None:
        run()
        built.append(len(launches))

    monkeypatch.setattr(mhc_at_once, "build_at_once", build_at_once)
    deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0).prewarm_mhc_token_counts((70, 3), "cpu")
    assert (built, len(launches)) == ([4], 8)


def test_each_path_gets_its_own_weights(launches: list[FusedPrenorm], deepseek_v4: ModuleType) -> None:
    layer = deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0)
    received = []
    layer.hc_pre = lambda x, fn, scale, base, norm: received.append((fn, scale, base, norm))
    layer.prewarm_mhc_token_counts((1,), "cpu")
    attention = (layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base, layer.input_layernorm)
    ffn = (layer.hc_ffn_fn, layer.hc_ffn_scale, layer.hc_ffn_base, layer.post_attention_layernorm)
    for arguments, expected in zip(received, (attention, ffn), strict=True):
        assert all(a is b for a, b in zip(arguments, expected, strict=True))


def test_each_run_is_freed_and_synchronised_before_the_next(
    deepseek_v4: ModuleType, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0)
    residuals: list[weakref.ref[torch.Tensor]] = []
    happened: list[str] = []

    def hc_pre(x: torch.Tensor, *_: object, norm: object) -> None:
        residuals.append(weakref.ref(x))
        happened.append(f"{x.shape[0]} tokens")

    def synchronize() -> None:
        alive = sum(residual() is not None for residual in residuals)
        happened.append(f"synchronised, {alive} alive")

    layer.hc_pre = hc_pre
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    layer.prewarm_mhc_token_counts((70, 3), "cuda")
    done = "synchronised, 0 alive"
    assert happened == ["70 tokens", done, "70 tokens", done, "3 tokens", done, "3 tokens", done]


def test_a_layer_warms_every_bucket_once(launches: list[FusedPrenorm], deepseek_v4: ModuleType) -> None:
    layer = deepseek_v4.DeepseekV4DecoderLayer(tiny_deepseek_v4(), 0)
    counts = layer.prewarm_mhc_token_count_buckets(4096, "cuda")
    assert counts == representatives(4096)
    assert [launch.num_splits for launch in launches] == [splits for splits in (2, 3, 4) for _ in range(2)]


@pytest.fixture
def six_layers(deepseek_v4: ModuleType) -> Any:
    """A DeepSeek-V4 of six layers, as this stage of the pipeline has it: layers 3 to 5."""
    from sglang.srt.layers.utils import PPMissingLayer

    model = deepseek_v4.DeepseekV4ForCausalLM(tiny_deepseek_v4(num_layers=6))
    model.model.start_layer, model.model.end_layer = 3, 6
    for i in range(3):
        model.model.layers[i] = PPMissingLayer()
    return model


def layers_that_ran(model: Any, run: Callable[[], object]) -> list[int]:
    """The layers of `model` whose weights the GEMM got while `run` ran."""
    ran = []
    for i, layer in enumerate(model.layers):
        if hasattr(layer, "hc_pre"):
            original = layer.hc_pre

            def hc_pre(*args: Any, i: int = i, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                ran.append(i)
                return original(*args, **kwargs)

            layer.hc_pre = hc_pre
    run()
    return ran


def test_a_model_delegates_to_the_first_layer_of_its_stage(launches: list[FusedPrenorm], six_layers: Any) -> None:
    model = six_layers.model
    ran = layers_that_ran(model, lambda: model.prewarm_mhc_token_count_buckets(64, "cuda"))
    assert ran == [3, 3]
    assert [launch.residual.shape[0] for launch in launches] == [64, 64]
    assert model.prewarm_mhc_token_count_buckets(4096, "cuda") == representatives(4096)


def test_the_wrapper_of_the_model_delegates_to_it(launches: list[FusedPrenorm], six_layers: Any) -> None:
    ran = layers_that_ran(six_layers.model, lambda: six_layers.prewarm_mhc_token_count_buckets(64, "cuda"))
    assert ran == [3, 3]
    assert six_layers.prewarm_mhc_token_count_buckets(4096, "cuda") == representatives(4096)


def test_a_stage_without_layers_has_nothing_to_warm(launches: list[FusedPrenorm], six_layers: Any) -> None:
    six_layers.model.start_layer = six_layers.model.end_layer = 3
    assert six_layers.prewarm_mhc_token_count_buckets(4096, "cuda") == ()
    assert launches == []


def test_nextn_delegates_to_its_only_layer(launches: list[FusedPrenorm], deepseek_v4: ModuleType) -> None:
    from sglang.srt.models.deepseek_v4_nextn import DeepseekV4ForCausalLMNextN

    nextn = DeepseekV4ForCausalLMNextN(tiny_deepseek_v4())
    nextn.model.layers = [nextn.model.decoder]
    ran = layers_that_ran(nextn.model, lambda: nextn.prewarm_mhc_token_count_buckets(64, "cuda"))
    assert ran == [0, 0]
    assert nextn.prewarm_mhc_token_count_buckets(4096, "cuda") == representatives(4096)


@pytest.fixture
def v4_runner(runner: ModelRunner, six_layers: Any, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """The runner as it is on a GPU that serves DeepSeek-V4, with nothing to autotune."""
    monkeypatch.setattr(runner, "device", "cuda")
    monkeypatch.setattr(runner, "model", six_layers)
    monkeypatch.setattr(runner, "is_hybrid_swa", True)
    monkeypatch.setattr(runner.server_args, "chunked_prefill_size", 4096)
    monkeypatch.setattr(runner.server_args, "max_prefill_tokens", 16384)
    return runner


def warmed(launches: list[FusedPrenorm]) -> tuple[int, ...]:
    """Token counts of the launches: each ran on both paths."""
    counts = [launch.residual.shape[0] for launch in launches]
    assert counts[::2] == counts[1::2]
    return tuple(counts[::2])


@pytest.mark.parametrize(
    ("chunk", "max_num_tokens"),
    [(4096, 4096), (100, 100), (1, 1), (-1, 640), (0, 640), (None, 640)],
)
def test_the_range_is_a_chunk_or_the_largest_prefill(
    chunk: int | None,
    max_num_tokens: int,
    launches: list[FusedPrenorm],
    v4_runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(v4_runner.server_args, "chunked_prefill_size", chunk)
    monkeypatch.setattr(v4_runner.server_args, "max_prefill_tokens", 640)
    v4_runner.kernel_warmup()
    assert warmed(launches) == representatives(max_num_tokens)
    buckets = len(representatives(max_num_tokens))
    summary = rf"mHC prewarm: {buckets} buckets of up to {max_num_tokens} tokens in \d+\.\d+ s"
    assert re.search(summary, caplog.text)


def test_a_chunk_is_not_divided_by_dp_size_again(
    launches: list[FusedPrenorm], v4_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4_runner.server_args, "dp_size", 4)
    monkeypatch.setattr(v4_runner.server_args, "enable_dp_attention", True)
    v4_runner.kernel_warmup()
    assert warmed(launches) == representatives(4096)


@pytest.mark.parametrize(
    "gate", ["SGLANG_OPT_DEEPGEMM_HC_PRENORM", "SGLANG_OPT_USE_TILELANG_MHC_PRE", "SGLANG_WARMSTART"]
)
def test_a_switch_that_is_off_leaves_nothing_to_warm(
    gate: str,
    launches: list[FusedPrenorm],
    v4_runner: ModelRunner,
    deep_gemm: DeepGemm,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(gate, "0")
    v4_runner.kernel_warmup()
    assert launches == []
    assert deep_gemm.calls == []
    assert "mHC prewarm" not in caplog.text  # neither done nor failed


@pytest.mark.parametrize(("attribute", "value"), [("is_hybrid_swa", False), ("device", "cpu")])
def test_other_models_and_devices_have_nothing_to_warm(
    attribute: str,
    value: object,
    launches: list[FusedPrenorm],
    v4_runner: ModelRunner,
    deep_gemm: DeepGemm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(v4_runner, attribute, value)
    v4_runner.kernel_warmup()
    assert launches == []
    assert deep_gemm.calls == []


def test_a_failure_is_said_and_the_start_up_goes_on(
    launches: list[FusedPrenorm], v4_runner: ModelRunner, deep_gemm: DeepGemm, caplog: pytest.LogCaptureFixture
) -> None:
    deep_gemm.failure = RuntimeError("CUDA out of memory")
    v4_runner.kernel_warmup()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([record for record in warnings if "CUDA out of memory" in record.getMessage()]) == 1


def test_strict_mode_raises_a_failure(
    launches: list[FusedPrenorm], v4_runner: ModelRunner, deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WARMSTART_STRICT", "1")
    deep_gemm.failure = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        v4_runner.kernel_warmup()


@pytest.fixture
def any_model(runner: ModelRunner, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What happened in `kernel_warmup` of a model that has one of its own, on a GPU with something to autotune."""
    happened: list[object] = []
    monkeypatch.setattr(runner, "device", "cuda")
    monkeypatch.setattr(runner, "_should_run_flashinfer_autotune", lambda: True)
    monkeypatch.setattr(runner, "_flashinfer_autotune", lambda: happened.append("autotune"))
    monkeypatch.setattr(runner.model, "kernel_warmup", happened.append, raising=False)
    return happened


def test_the_warm_up_of_any_model_is_called_after_autotune(runner: ModelRunner, any_model: list[object]) -> None:
    runner.kernel_warmup()
    assert any_model == ["autotune", runner]


def test_the_warm_up_of_a_model_is_called_on_cuda_only(
    runner: ModelRunner, any_model: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "device", "cpu")
    runner.kernel_warmup()
    assert any_model == []


def test_a_model_without_a_warm_up_needs_none(
    runner: ModelRunner, any_model: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(runner.model, "kernel_warmup")
    runner.kernel_warmup()
    assert any_model == ["autotune"]
