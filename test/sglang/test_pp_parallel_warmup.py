"""F1: each pipeline stage runs dummy forwards of its own layers, all stages at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kit.gpu_standins import CudaRuntime
from kit.stages import run_stages
from sglang.srt.layers.dp_attention import get_is_extend_in_batch
from sglang.srt.model_executor import model_runner as model_runner_module
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

FEATURE = "pp-parallel-warmup"

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

pytestmark = pytest.mark.release("0.5.12")

SWITCH = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"
DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND

# In a tuple: as a name of this module the plugin would replace it.
SGLANG_DUMMY_RUN = (getattr(model_runner_module.ModelRunner, "_dummy_run", None),)


@dataclasses.dataclass
class Forward:
    """One dummy forward: what attention was prepared for, and what the model was called with and gave."""

    batch: ForwardBatch
    outer_inference_mode: bool
    is_extend_in_batch: bool | None = None
    proxy_tensors: dict[str, torch.Tensor] | None = None
    output: Any = None

    @property
    def shape(self) -> tuple[ForwardMode, int]:
        """The mode and the batch size."""
        return self.batch.forward_mode, self.batch.batch_size


def observe(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[Forward]:
    """The forwards of `runner` from now on. They run as they would."""
    forwards: list[Forward] = []
    prepare, forward = runner.attn_backend.init_forward_metadata, runner.model.forward

    def init_forward_metadata(batch: ForwardBatch) -> None:
        forwards.append(Forward(batch, torch.is_inference_mode_enabled()))
        prepare(batch)

    @functools.wraps(forward)
    def model_forward(*args: Any, **kwargs: Any) -> Any:
        forwards[-1].is_extend_in_batch = get_is_extend_in_batch()
        if "pp_proxy_tensors" in kwargs:
            forwards[-1].proxy_tensors = kwargs["pp_proxy_tensors"].tensors
        forwards[-1].output = forward(*args, **kwargs)
        return forwards[-1].output

    monkeypatch.setattr(runner.attn_backend, "init_forward_metadata", init_forward_metadata)
    monkeypatch.setattr(runner.model, "forward", model_forward)
    return forwards


@pytest.fixture
def forwards(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[Forward]:
    """What `runner` ran."""
    return observe(runner, monkeypatch)


def test_an_overridden_extend_is_an_extend_forward_of_a_generation_model(
    runner: ModelRunner, forwards: list[Forward]
) -> None:
    runner._dummy_run(4, forward_mode_override=EXTEND)
    (forward,) = forwards
    batch = forward.batch
    assert forward.shape == (EXTEND, 4)
    assert batch.global_forward_mode == EXTEND
    assert batch.extend_num_tokens == 4
    assert batch.extend_seq_lens.tolist() == batch.extend_seq_lens_cpu == [1, 1, 1, 1]
    assert batch.extend_prefix_lens.tolist() == batch.extend_prefix_lens_cpu == [0, 0, 0, 0]
    assert batch.extend_start_loc.tolist() == [0, 1, 2, 3]
    assert forward.output.next_token_logits.shape == (4, 512)
    assert forward.output.next_token_logits.isfinite().all()


def test_a_decode_has_no_extend_buffers(runner: ModelRunner, forwards: list[Forward]) -> None:
    runner._dummy_run(4)
    runner._dummy_run(4, forward_mode_override=DECODE)
    for forward in forwards:
        assert forward.shape == (DECODE, 4)
        assert forward.batch.extend_num_tokens is None
        assert forward.batch.extend_seq_lens is None
        assert forward.batch.extend_seq_lens_cpu is None
        assert forward.batch.extend_prefix_lens is None
        assert forward.batch.extend_start_loc is None
        assert forward.output.next_token_logits.isfinite().all()


def test_the_override_wins_over_an_embedding_model_too(
    runner: ModelRunner, forwards: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "is_generation", False)
    runner._dummy_run(4)
    runner._dummy_run(4, forward_mode_override=EXTEND)
    assert [forward.shape for forward in forwards] == [(EXTEND, 4)] * 2
    assert [forward.batch.extend_num_tokens for forward in forwards] == [4, 4]
    assert forwards[0].output.embeddings.isfinite().all()


class Prepared(Exception):
    """Ends a dummy run where its batch is complete and the forward would begin."""


def prepared_batch(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, override: ForwardMode | None) -> ForwardBatch:
    """The batch of a dummy run of 4."""

    def init_forward_metadata(batch: ForwardBatch) -> None:
        raise Prepared(batch)

    monkeypatch.setattr(runner.attn_backend, "init_forward_metadata", init_forward_metadata)
    with pytest.raises(Prepared) as prepared:
        runner._dummy_run(4, forward_mode_override=override)
    (batch,) = prepared.value.args
    return batch


def test_extend_buffers_follow_the_mode_and_not_the_model(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "is_generation", False)
    batch = prepared_batch(runner, monkeypatch, DECODE)
    assert batch.forward_mode == DECODE
    assert batch.extend_num_tokens is None
    assert batch.extend_seq_lens is None


@pytest.mark.parametrize("override", [None, DECODE, EXTEND])
def test_a_speculative_algorithm_wins_over_the_override(
    override: ForwardMode | None, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    monkeypatch.setattr(runner, "spec_algorithm", SpeculativeAlgorithm.NGRAM)
    monkeypatch.setattr(runner.server_args, "speculative_num_draft_tokens", 2)
    batch = prepared_batch(runner, monkeypatch, override)
    assert batch.forward_mode == ForwardMode.TARGET_VERIFY
    assert batch.extend_num_tokens is None


@pytest.mark.parametrize("is_generation", [True, False])
def test_without_an_override_the_batch_is_what_it_was(
    is_generation: bool, runner: ModelRunner, forwards: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "is_generation", is_generation)
    (sglang_dummy_run,) = SGLANG_DUMMY_RUN
    assert sglang_dummy_run is not None
    sglang_dummy_run(runner, 4)
    runner._dummy_run(4)
    before, now = (vars(forward.batch) for forward in forwards)
    assert before.keys() == now.keys()
    for name in before:
        if isinstance(before[name], torch.Tensor):
            assert torch.equal(before[name], now[name]), name
        else:
            assert before[name] == now[name], name
    assert forwards[0].is_extend_in_batch is forwards[1].is_extend_in_batch is False


def test_a_context_is_still_the_second_argument(runner: ModelRunner, forwards: list[Forward]) -> None:
    entered = []

    class Context(nullcontext[None]):
        def __enter__(self) -> None:
            entered.append(len(forwards))

    runner._dummy_run(4, Context())
    assert entered == [1]


@pytest.mark.parametrize(
    ("override", "is_generation", "expected"),
    [(None, True, False), (DECODE, True, False), (EXTEND, True, True), (None, False, False), (EXTEND, False, True)],
)
def test_a_batch_says_that_it_extends_when_an_extend_was_asked_for(
    override: ForwardMode | None,
    is_generation: bool,
    expected: bool,
    runner: ModelRunner,
    forwards: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "is_generation", is_generation)
    runner._dummy_run(4, forward_mode_override=override)
    assert forwards[0].is_extend_in_batch is expected


@pytest.fixture
def two_stages(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner hands proxy tensors to its model, which has all layers and needs none."""
    monkeypatch.setattr(runner.server_args, "pp_size", 2)


@pytest.mark.usefixtures("two_stages")
@pytest.mark.parametrize(
    ("pp_rank", "attn_cp_size", "mode", "rows"),
    [
        (0, 1, EXTEND, 8),
        (0, 2, EXTEND, 8),
        (1, 1, EXTEND, 8),
        (1, 2, EXTEND, 4),
        (1, 4, EXTEND, 2),
        (1, 2, DECODE, 8),
        (0, 2, DECODE, 8),
    ],
)
def test_later_stages_get_their_share_of_an_extend(
    pp_rank: int,
    attn_cp_size: int,
    mode: ForwardMode,
    rows: int,
    runner: ModelRunner,
    forwards: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "pp_rank", pp_rank)
    monkeypatch.setattr(runner, "attn_cp_size", attn_cp_size)
    runner._dummy_run(8, forward_mode_override=mode)
    tensors = forwards[0].proxy_tensors
    assert tensors is not None
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "hidden_states": (rows, 64),
        "residual": (rows, 64),
    }


@pytest.mark.usefixtures("two_stages")
def test_a_model_with_mhc_hands_on_wider_states(
    runner: ModelRunner, forwards: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.model_config, "hc_hidden_size", 4 * 64, raising=False)
    runner._dummy_run(8)
    tensors = forwards[0].proxy_tensors
    assert tensors is not None
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"hidden_states": (8, 256)}


@pytest.fixture
def pp_gpu(
    runner: ModelRunner, cuda: CudaRuntime, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> CudaRuntime:
    """All that the warm-up asks for: two stages on a GPU with DeepGEMM, and the switch. A pool of 16 requests."""
    monkeypatch.setattr(runner, "device", "cuda")
    monkeypatch.setattr(runner, "pp_size", 2)
    monkeypatch.setattr(compile_utils, "ENABLE_JIT_DEEPGEMM", True)
    monkeypatch.setenv(SWITCH, "1")
    return cuda


BOTH_MODES = [(DECODE, 1), (EXTEND, 1), (DECODE, 16), (EXTEND, 16)]


@pytest.mark.usefixtures("pp_gpu")
def test_kernel_warmup_runs_both_modes_at_each_batch_size(runner: ModelRunner, forwards: list[Forward]) -> None:
    runner.kernel_warmup()
    assert [forward.shape for forward in forwards] == BOTH_MODES
    assert all(forward.output.next_token_logits.isfinite().all() for forward in forwards)
    # Also around the preparation of a batch, which `_dummy_run` itself leaves outside.
    assert all(forward.outer_inference_mode for forward in forwards)


def speculative(runner: Any, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    monkeypatch.setattr(runner, "spec_algorithm", SpeculativeAlgorithm.EAGLE)


GATES = {
    "no GPU": lambda runner, compile_utils, monkeypatch: monkeypatch.setattr(runner, "device", "cpu"),
    "the switch is off": lambda runner, compile_utils, monkeypatch: monkeypatch.setenv(SWITCH, "0"),
    "all is off": lambda runner, compile_utils, monkeypatch: monkeypatch.setenv("SGLANG_WARMSTART", "0"),
    "the switch is not set": lambda runner, compile_utils, monkeypatch: monkeypatch.delenv(SWITCH),
    "no DeepGEMM": lambda runner, compile_utils, monkeypatch: monkeypatch.setattr(
        compile_utils, "ENABLE_JIT_DEEPGEMM", False
    ),
    "one stage": lambda runner, compile_utils, monkeypatch: monkeypatch.setattr(runner, "pp_size", 1),
    "speculative": speculative,
}


@pytest.mark.usefixtures("pp_gpu")
def test_no_forward_is_left_to_be_one_that_extends(runner: ModelRunner, forwards: list[Forward]) -> None:
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    runner.kernel_warmup()
    assert forwards[-1].batch.forward_mode == ForwardMode.EXTEND
    assert get_is_extend_in_batch() is False


@pytest.mark.usefixtures("pp_gpu")
@pytest.mark.parametrize("gate", GATES)
def test_nothing_is_run_unless_everything_holds(
    gate: str,
    runner: ModelRunner,
    forwards: list[Forward],
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    GATES[gate](runner, compile_utils, monkeypatch)
    runner.kernel_warmup()
    assert forwards == []
    assert "PP-parallel" not in caplog.text


@pytest.mark.usefixtures("pp_gpu")
def test_it_is_the_last_thing_in_kernel_warmup(
    runner: ModelRunner, forwards: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []
    monkeypatch.setattr(runner, "_should_run_flashinfer_autotune", lambda: True)
    monkeypatch.setattr(runner, "_flashinfer_autotune", lambda: happened.append(("autotune", len(forwards))))
    monkeypatch.setattr(
        runner.model, "kernel_warmup", lambda _: happened.append(("the model's own", len(forwards))), raising=False
    )
    runner.kernel_warmup()
    assert happened == [("autotune", 0), ("the model's own", 0)]
    assert [forward.shape for forward in forwards] == BOTH_MODES


@pytest.mark.usefixtures("pp_gpu")
def test_an_exception_is_not_swallowed(runner: ModelRunner, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    caplog.set_level(logging.INFO)
    with runner.model.model.layers[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="illegal"):
        runner.kernel_warmup()
    assert "warm-up done" not in caplog.text


@pytest.mark.parametrize(
    ("disaggregation_mode", "is_generation", "modes"),
    [
        ("null", True, [DECODE, EXTEND]),
        ("prefill", True, [EXTEND]),
        ("decode", True, [DECODE]),
        ("null", False, [EXTEND]),
        ("prefill", False, [EXTEND]),
        ("decode", False, []),
    ],
)
def test_a_node_runs_the_modes_that_it_serves(
    disaggregation_mode: str,
    is_generation: bool,
    modes: list[ForwardMode],
    pp_gpu: CudaRuntime,
    runner: ModelRunner,
    forwards: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(runner.server_args, "disaggregation_mode", disaggregation_mode)
    monkeypatch.setattr(runner, "is_generation", is_generation)
    runner.kernel_warmup()
    assert [forward.shape for forward in forwards] == [(mode, size) for size in (1, 16) for mode in modes]
    assert f"disaggregation_mode={disaggregation_mode}" in caplog.text


@pytest.mark.usefixtures("pp_gpu")
@pytest.mark.parametrize(
    ("use_mla", "num_head", "decodes"),
    [(True, 1 << 10, [1]), (True, 1 << 9, [1, 16]), (False, 1 << 10, [1, 16])],
    ids=["of 8", "of 16", "none"],
)
def test_a_decode_stays_below_the_limit_of_the_attention_kernels(
    use_mla: bool,
    num_head: int,
    decodes: list[int],
    runner: ModelRunner,
    forwards: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    # Triton's MLA decode keeps num_head * max_kv_splits * v_head_dim elements for each request, 2**31 at the most.
    for name, value in {"use_mla": use_mla, "num_head": num_head, "max_kv_splits": 512, "v_head_dim": 512}.items():
        monkeypatch.setattr(runner.attn_backend, name, value, raising=False)
    runner.kernel_warmup()
    assert [size for mode, size in (forward.shape for forward in forwards) if mode == DECODE] == decodes
    assert [size for mode, size in (forward.shape for forward in forwards) if mode == EXTEND] == [1, 16]
    assert ("no DECODE warm-up of 16: " in caplog.text) is (decodes == [1])


def test_the_limit_of_combined_backends_is_that_of_the_one_that_decodes(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang_warmstart.sglang.pp_parallel_warmup import decode_limit_of

    decode, prefill = TorchNativeAttnBackend(runner), TorchNativeAttnBackend(runner)
    for name, value in {"use_mla": True, "num_head": 128, "max_kv_splits": 256, "v_head_dim": 512}.items():
        monkeypatch.setattr(decode, name, value, raising=False)
    hybrid = HybridAttnBackend(runner, prefill_backend=prefill, decode_backend=decode)
    assert decode_limit_of(hybrid) == 128
    assert decode_limit_of(TboAttnBackend(primary=hybrid, children=[])) == 128
    assert decode_limit_of(prefill) == float("inf")


@pytest.mark.parametrize(
    ("backend", "mode", "variables", "decodes"),
    [
        ("deepep", "auto", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "8"}, [1]),
        ("deepep", "low_latency", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "8"}, [1]),
        ("deepep", "normal", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "8"}, [1, 16]),
        ("deepep", "auto", {}, [1, 16]),
        ("mooncake", "auto", {"SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "8"}, [1]),
        ("none", "auto", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "8"}, [1, 16]),
    ],
)
@pytest.mark.by_plugin
@pytest.mark.usefixtures("pp_gpu")
def test_no_decode_forward_has_more_tokens_than_low_latency_dispatch_takes(
    runner: ModelRunner,
    forwards: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    mode: str,
    variables: dict[str, str],
    decodes: list[int],
) -> None:
    from sglang.srt.layers.moe import utils

    monkeypatch.setattr(utils, "MOE_A2A_BACKEND", utils.MoeA2ABackend(backend))
    monkeypatch.setattr(utils, "DEEPEP_MODE", utils.DeepEPMode(mode))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runner.kernel_warmup()
    assert [size for forward_mode, size in (forward.shape for forward in forwards) if forward_mode == DECODE] == decodes
    assert [size for forward_mode, size in (forward.shape for forward in forwards) if forward_mode == EXTEND] == [1, 16]


def test_the_log_says_what_starts_and_how_long_it_took(
    pp_gpu: CudaRuntime, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(runner, "tp_rank", 5)
    monkeypatch.setattr(runner, "pp_rank", 1)
    during = []
    with runner.model.model.layers[1].register_forward_hook(lambda *_: during.append(pp_gpu.synchronizations)):
        runner.kernel_warmup()
    start, end = (record.getMessage() for record in caplog.records if "PP-parallel" in record.getMessage())
    assert start.endswith("starts: pp_rank=1 tp_rank=5 batch_sizes=[1, 16] disaggregation_mode=null")
    assert re.search(r"done in \d+\.\d+ s: pp_rank=1$", end)
    # The seconds are those of the GPU: it has finished the last forward.
    assert pp_gpu.synchronizations > during[-1]


def expected_batch_sizes(n_sms: int, cp_size: int, tp_size: int, capacity: int) -> list[int]:
    """The five sizes, each at the next one that both kinds of ranks divide, and none that the pool cannot hold."""

    def divides(size: int) -> bool:
        return size % cp_size == 0 and size % tp_size == 0

    holds = max(size for size in range(1, capacity + 1) if divides(size))
    wanted = (1, 128, max(n_sms // 8, 2) * 64, max(n_sms // 4, 4) * 64, n_sms * 64)
    return sorted({min(holds, next(filter(divides, itertools.count(size)))) for size in wanted})


@pytest.mark.parametrize("n_sms", [10, 78, 132, 148])
@pytest.mark.parametrize(
    ("cp_size", "tp_size", "gathered"),
    [
        (1, 1, False),
        (1, 8, False),
        (1, 8, True),
        (2, 1, False),
        (3, 1, False),
        (2, 8, True),
        (3, 4, True),
        (0, 1, False),
    ],
)
@pytest.mark.parametrize("capacity", [20_000, 2048, 100])
def test_batch_sizes_follow_the_gpu_the_ranks_and_the_pool(
    n_sms: int,
    cp_size: int,
    tp_size: int,
    gathered: bool,
    capacity: int,
    cuda: CudaRuntime,
    runner: ModelRunner,
    compile_utils: ModuleType,
    set_attn_tp_size: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda.multi_processor_count = n_sms
    monkeypatch.setattr(runner, "attn_cp_size", cp_size)
    monkeypatch.setattr(runner.req_to_token_pool, "size", capacity)
    set_attn_tp_size(tp_size)
    # With dense layers of one rank, SGLang gathers attention's input.
    monkeypatch.setattr(runner.server_args, "moe_dense_tp_size", 1 if gathered else None)
    sizes = []
    monkeypatch.setattr(runner, "_dummy_run", lambda batch_size, forward_mode_override: sizes.append(batch_size))
    compile_utils.pp_parallel_deep_gemm_warmup(runner)
    assert sizes[::2] == sizes[1::2]
    assert sizes[::2] == expected_batch_sizes(n_sms, max(cp_size, 1), tp_size if gathered else 1, capacity)


def test_the_sizes_of_an_h200() -> None:
    assert expected_batch_sizes(132, 1, 1, 20_000) == [1, 128, 1024, 2112, 8448]


def test_no_batch_is_rounded_down_to_nothing(
    cuda: CudaRuntime,
    runner: ModelRunner,
    compile_utils: ModuleType,
    set_attn_tp_size: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = []
    set_attn_tp_size(4)
    monkeypatch.setattr(runner.server_args, "moe_dense_tp_size", 1)
    monkeypatch.setattr(runner.attn_backend, "init_forward_metadata", lambda batch: batches.append(batch.batch_size))
    monkeypatch.setattr(
        runner.model, "forward", lambda *args, **kwargs: None
    )  # would gather from ranks that are not there
    compile_utils.pp_parallel_deep_gemm_warmup(runner)
    assert batches == [4, 4, 16, 16]


@dataclasses.dataclass
class Stage:
    """What one of two real stages reports."""

    layers: list[str]
    input_is_embedded: list[bool]
    input_is_proxy: list[bool]
    forwards: list[tuple[str, int]]
    lines: list[str]


def warm_one_stage(runner: ModelRunner) -> Stage:
    """In the process of a stage: run the warm-up, and watch the layers."""
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils
    from sglang.srt.model_executor.model_runner import DecodeInputBuffers

    monkeypatch = pytest.MonkeyPatch()
    CudaRuntime(monkeypatch)
    forwards = observe(runner, monkeypatch)
    stage = Stage([], [], [], [], [])
    create = DecodeInputBuffers.create

    def with_recognisable_proxies(**kwargs: Any) -> Any:
        buffers = create(**kwargs)
        for tensor in buffers.pp_proxy_tensors.values():
            tensor.fill_(0.25)
        return buffers

    def watch(name: str, layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        _, hidden_states, batch, _ = args
        if not stage.layers:
            # Passed only while the other stage is inside its own first layer.
            torch.distributed.barrier()
        stage.layers.append(name)
        embedded = not isinstance(embedding, PPMissingLayer) and torch.equal(hidden_states, embedding(batch.input_ids))
        stage.input_is_embedded.append(embedded)
        stage.input_is_proxy.append(all(tensor is not None and bool((tensor == 0.25).all()) for tensor in args[1::2]))

    from sglang.srt.layers.utils import PPMissingLayer

    embedding = runner.model.model.embed_tokens
    monkeypatch.setattr(DecodeInputBuffers, "create", with_recognisable_proxies)
    for name, module in runner.model.named_modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.register_forward_pre_hook(functools.partial(watch, name))
    handler = logging.Handler()
    handler.emit = lambda record: stage.lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sglang").addHandler(handler)

    compile_utils.pp_parallel_deep_gemm_warmup(runner)
    stage.forwards = [(forward.batch.forward_mode.name, forward.batch.batch_size) for forward in forwards]
    return stage


def test_two_real_stages_warm_their_own_layers_at_the_same_time(tiny_model: Path) -> None:
    stages = run_stages(warm_one_stage, 2, tiny_model, server_args={"max_running_requests": 16})
    shapes = [(mode, size) for size in (1, 16) for mode in ("DECODE", "EXTEND")]
    for rank, stage in enumerate(stages):
        assert stage.forwards == shapes
        assert stage.layers == [f"model.layers.{rank}"] * len(shapes)
        assert stage.input_is_embedded == [rank == 0] * len(shapes)
        assert stage.input_is_proxy == [rank == 1] * len(shapes)
        start, end = (line for line in stage.lines if "PP-parallel" in line)
        assert start.endswith(f"starts: pp_rank={rank} tp_rank=0 batch_sizes=[1, 16] disaggregation_mode=null")
        assert re.search(rf"done in \d+\.\d+ s: pp_rank={rank}$", end)
