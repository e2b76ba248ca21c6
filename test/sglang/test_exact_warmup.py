"""F6 at the start of a server: the service, the ranks that connect to it, and one batch for all targets."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest
import torch
from kit.arguments import with_values
from kit.deep_gemm_model import DOWN, GATE_UP, OUT, DeepGemmModel, calls_of_a_forward, targets_of_a_forward
from kit.delivery import Delivery, delivery_here
from kit.fake_nvcc import FakeNvcc
from kit.gpu_standins import CudaOnCpu, CudaRuntime, DeepGemm, install_deep_gemm
from kit.node import Node, wait_until
from kit.served_rank import SERVICE, ServedRank, compiled_for, representatives_of, update_config
from kit.stages import run_stages
from kit.standin_library import Jit
from kit.toolchain import toolchain
from kit.warm_up import autotuned_is, dummy_forward, warm_up
from kit.wrapped_gemms import BF16, DENSE, MASKED, K, bf16, dense, masked, overlapped, target
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as sglang_compile_utils
from sglang.srt.layers.deep_gemm_wrapper import entrypoint
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang_warmstart.base import events
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node.client import ServiceClient
from sglang_warmstart.node.launch import ServiceProcess, start_service
from sglang_warmstart.node.protocol import Hello, Welcome
from sglang_warmstart.sglang.exact_warmup import warmup as exact_warmup
from sglang_warmstart.sglang.exact_warmup.rank import Rank
from sglang_warmstart.sglang.seams import seam

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

FEATURE = "exact-warmup"
STRICT = "SGLANG_WARMSTART_STRICT"
COMPILER = "SGLANG_WARMSTART_COMPILER"
WORKERS = "SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS"
PRECOMPILE = "SGLANG_JIT_DEEPGEMM_PRECOMPILE"
PP_PARALLEL = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"

DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND
SWEPT = [1, 2, 3]

# From 0.5.18 on, experts lay out their tokens in one of two ways, and an extend forward runs with each.
LAYOUTS = len(seam().layouts())
DRY = [(DECODE, 1), *[(EXTEND, 1)] * LAYOUTS]


@pytest.fixture(autouse=True)
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is set."""
    for switch in (STRICT, COMPILER, WORKERS, PRECOMPILE, PP_PARALLEL, "SGLANG_JIT_DEEPGEMM_FAST_WARMUP"):
        monkeypatch.delenv(switch, raising=False)


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What was said of this level or above."""
    records = caplog.get_records("call")
    return [each.getMessage() for each in records if each.name == "sglang.warmstart" and each.levelno >= level]


def ms(rank: ServedRank) -> list[int]:
    """The M of each call that reached DeepGEMM."""
    return [call.m for call in rank.deep_gemm.calls]


# A rank connects


@pytest.fixture
def hellos(monkeypatch: pytest.MonkeyPatch) -> list[Hello]:
    """What ranks have said to the service."""
    said: list[Hello] = []
    hello = ServiceClient.hello

    def overheard(self: ServiceClient, words: Hello) -> Welcome:
        said.append(words)
        return hello(self, words)

    monkeypatch.setattr(ServiceClient, "hello", overheard)
    return said


def test_a_rank_says_all_that_its_kernels_depend_on(
    rank: ServedRank, runner: ModelRunner, hellos: list[Hello], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DG_JIT_WITH_LINEINFO", "1")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    rank.connect(runner)
    (hello,) = hellos
    assert hello.cache == hello.environment["DG_JIT_CACHE_DIR"] == str(rank.cache)
    assert hello.environment["DG_JIT_NVCC_COMPILER"] == str(rank.nvcc.path)
    assert hello.environment["DG_JIT_WITH_LINEINFO"] == "1"
    assert hello.environment["CUDA_HOME"] == "/opt/cuda"
    assert "HOME" not in hello.environment
    assert hello.deep_gemm == str(Path(str(rank.deep_gemm.module.__file__)).parent)
    assert hello.gpu == Gpu("NVIDIA H200", 132, (9, 0), ordinal=0, visible="3,5")
    assert (hello.kind, hello.workers) == ("nvcc", None)


def test_a_launch_is_the_same_at_each_start_and_another_with_another_argument(
    rank: ServedRank, runner: ModelRunner, hellos: list[Hello], delivery: Delivery
) -> None:
    for size in (8192, 8192, 4096):
        rank.connect(runner, chunked_prefill_size=size)
        delivery.start_again()
    first, again, other = (hello.launch for hello in hellos)
    assert first == again
    assert (first["rank"], first["tp_size"]) == ("0", "1")
    assert {name for name in {*first, *other} if first.get(name) != other.get(name)} == {"chunked_prefill_size"}


@pytest.mark.release("0.5.12")
def test_a_launch_follows_what_is_in_the_models_config(
    rank: ServedRank, runner: ModelRunner, hellos: list[Hello], delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.connect(runner)
    delivery.start_again()
    config = runner.server_args.get_model_config().hf_config
    monkeypatch.setattr(config, "num_hidden_layers", 3)
    rank.connect(runner)
    first, second = (hello.launch for hello in hellos)
    assert {name for name in first if first[name] != second[name]} == {"config"}


def test_a_bound_on_parallel_compiles_is_handed_on_only_if_somebody_set_it(
    rank: ServedRank, runner: ModelRunner, hellos: list[Hello], delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.connect(runner)
    delivery.start_again()
    monkeypatch.setenv(WORKERS, "3")
    rank.connect(runner)
    assert [hello.workers for hello in hellos] == [None, 3]


@pytest.mark.parametrize(("switch", "word"), [(WORKERS, "many"), (WORKERS, "0"), (COMPILER, "clang")])
def test_a_word_that_a_switch_does_not_know_is_warned_of_and_the_default_is_used(
    switch: str,
    word: str,
    rank: ServedRank,
    runner: ModelRunner,
    hellos: list[Hello],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(switch, word)
    rank.connect(runner)
    (hello,) = hellos
    assert (hello.kind, hello.workers) == ("nvcc", None)
    (line,) = lines(caplog)
    assert switch in line and f'"{word}"' in line


def test_a_second_runner_of_the_process_is_the_same_rank(
    rank: ServedRank, runner: ModelRunner, hellos: list[Hello]
) -> None:
    for _ in range(2):  # a draft model has a runner too
        rank.connect(runner)
    assert len(hellos) == 1


def test_fast_warmup_gives_way_with_one_line(
    rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("SGLANG_JIT_DEEPGEMM_FAST_WARMUP", "1")
    rank.connect(runner, chunked_prefill_size=5000)
    bf16()
    assert rank.warmed == {target(BF16, m_max=16384)}, "not the 5000 that the fast list ends at"
    assert len([line for line in lines(caplog, logging.INFO) if "FAST_WARMUP" in line]) == 1


def test_without_it_there_is_no_such_line(
    rank: ServedRank, runner: ModelRunner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rank.connect(runner)
    assert lines(caplog, logging.INFO) == []


# A rank that cannot connect


def no_service(rank: ServedRank, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(SERVICE)
    return "no service was started"


def no_compiler(rank: ServedRank, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", "/no/such/compiler")
    return "/no/such/compiler is not there"


def somebody_else(rank: ServedRank, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(exact_warmup, "ServiceClient", lambda path: ServiceClient(path, wait_s=0.2))
    monkeypatch.setenv(SERVICE, str(rank.cache / "nobody.sock"))
    return "no service at"


REFUSALS = [no_service, no_compiler, somebody_else]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_where_nothing_can_be_warmed_exactly_sglang_warms_as_it_does_and_one_line_says_why(
    refusal: Callable[[ServedRank, pytest.MonkeyPatch], str],
    rank: ServedRank,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reason = refusal(rank, monkeypatch)
    rank.deep_gemm.jit = None  # without a compiler there is none for DeepGEMM either
    rank.connect(runner)
    for _ in range(2):
        assert dense().unique().tolist() == [K]
    assert ms(rank) == [*SWEPT, 5, 5]
    (line,) = lines(caplog)
    assert "no exact warm-up" in line and reason in line


@pytest.mark.parametrize("refusal", REFUSALS)
def test_strict_it_is_raised(
    refusal: Callable[[ServedRank, pytest.MonkeyPatch], str],
    rank: ServedRank,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = refusal(rank, monkeypatch)
    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(RuntimeError, match=reason):
        rank.connect(runner)


# NVRTC


def test_kernels_of_nvrtc_have_a_cache_of_their_own(
    rank: ServedRank,
    runner: ModelRunner,
    hellos: list[Hello],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if not toolchain().fits_this_python:
        pytest.skip(f"NVRTC's bindings in {toolchain().root} are for another Python than this one")
    monkeypatch.setenv(COMPILER, "nvrtc")
    directory = tmp_path_factory.mktemp("node")
    with Node(directory, modules=toolchain().root, **toolchain().nvrtc_environment) as node:
        monkeypatch.setenv(SERVICE, str(node.socket))
        rank.connect(runner)
    (hello,) = hellos
    own = str(rank.cache / "nvrtc")
    assert hello.kind == "nvrtc"
    assert hello.cache == hello.environment["DG_JIT_CACHE_DIR"] == own
    assert os.environ["DG_JIT_CACHE_DIR"] == own, "DeepGEMM itself looks there"


def test_where_there_is_no_nvrtc_deep_gemms_cache_stays_where_it_is(
    rank: ServedRank,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    package = tmp_path_factory.mktemp("modules") / "cuda"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no bindings for this Python')\n")
    monkeypatch.setenv(COMPILER, "nvrtc")
    with Node(tmp_path_factory.mktemp("node"), modules=package.parent) as node:
        monkeypatch.setenv(SERVICE, str(node.socket))
        rank.connect(runner)
    assert os.environ["DG_JIT_CACHE_DIR"] == str(rank.cache)
    (line,) = lines(caplog)
    assert "no bindings for this Python" in line
    dense()
    assert ms(rank) == [*SWEPT, 5]


# Switched off


def precompile_is_off(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv(PRECOMPILE, "0")
    monkeypatch.setattr(sglang_compile_utils, "_ENABLE_JIT_DEEPGEMM_PRECOMPILE", False)  # read when it was imported
    return []


def jit_is_off(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    return SWEPT


def all_is_off(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv("SGLANG_WARMSTART", "0")
    return SWEPT


def there_is_no_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(sglang_compile_utils, "ENABLE_JIT_DEEPGEMM", False)
    return SWEPT


@pytest.mark.parametrize("switch_off", [precompile_is_off, jit_is_off, all_is_off, there_is_no_deep_gemm])
def test_where_sglang_does_not_warm_deep_gemm_nothing_is_asked_and_nothing_is_changed(
    switch_off: Callable[[pytest.MonkeyPatch], list[int]],
    rank: ServedRank,
    runner: ModelRunner,
    hellos: list[Hello],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    swept = switch_off(monkeypatch)
    rank.connect(runner)
    monkeypatch.setattr(runner, "device", "cuda")
    warm_up(runner)
    dense()
    assert hellos == []
    assert ms(rank) == [*swept, 5]
    assert lines(caplog, logging.INFO) == []


# Discovery


def observe(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[ForwardBatch]:
    """The batches of the forwards of a runner from now on. They run as they would."""
    batches: list[ForwardBatch] = []
    prepare = runner.attn_backend.init_forward_metadata

    def init_forward_metadata(batch: ForwardBatch) -> None:
        batches.append(batch)
        prepare(batch)

    monkeypatch.setattr(runner.attn_backend, "init_forward_metadata", init_forward_metadata)
    return batches


@dataclasses.dataclass
class Started:
    """A rank in the state in which SGLang calls `kernel_warmup`."""

    rank: ServedRank
    runner: ModelRunner
    model: DeepGemmModel
    batches: list[ForwardBatch]

    @property
    def forwards(self) -> list[tuple[ForwardMode, int]]:
        """Mode and batch size of each forward."""
        return [(batch.forward_mode, batch.batch_size) for batch in self.batches]


@pytest.fixture
def start(rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Started]:
    """Starts the rank on a GPU, with a model that calls the wrapper."""

    def start() -> Started:
        rank.connect(runner)
        rank.deep_gemm.calls.clear()
        return Started(rank, runner, model, batches)

    model = DeepGemmModel().install(runner.model, monkeypatch)
    batches = observe(runner, monkeypatch)
    monkeypatch.setattr(runner, "device", "cuda")
    return start


def all_targets() -> list[Target]:
    """Those of both forwards, in the order in which they are met."""
    return list(dict.fromkeys([*targets_of_a_forward(extend=False), *targets_of_a_forward(extend=True)]))


def loads(*targets: Target) -> list[int]:
    return [m for each in targets for m in representatives_of(each)]


def test_two_dry_forwards_find_all_targets_and_one_batch_warms_them(
    start: Callable[[], Started], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    started = start()
    warm_up(started.runner)
    assert started.forwards == DRY
    assert started.rank.warmed == set(all_targets())
    assert started.rank.nvcc.compiled == compiled_for(*all_targets())
    assert ms(started.rank) == loads(*all_targets()), "each representative once, and no call of a dry forward"
    assert all(not output.any() for output in started.model.outputs), "zeros, and nothing is left unwritten"
    assert entrypoint.deep_gemm is started.rank.deep_gemm.module
    assert len([line for line in lines(caplog, logging.INFO) if "found by dry forwards" in line]) == 1


def test_what_a_rank_does_before_the_first_forward_is_written_down(
    start: Callable[[], Started], tmp_path: Path
) -> None:
    log = events.open_log("rank", {events.EVENTS: str(tmp_path / "events")})
    assert log is not None
    heard: list[events.Event] = []
    log.listeners.append(heard.append)
    try:
        warm_up(start().runner)
    finally:
        events.close_log()
    # The plugin has one for all of it.
    discovered, waited, loaded = [event for event in heard if event.name != "kernel warm-up"]
    assert (discovered.kind, discovered.kernels) == ("discover", len(all_targets()))
    assert (waited.kind, waited.name) == ("step", "wait for kernels")
    assert (loaded.kind, loaded.library, loaded.kernels) == ("load", "deep-gemm", len(loads(*all_targets())))
    assert discovered.at + discovered.seconds <= waited.at
    assert waited.at + waited.seconds <= loaded.at


def test_kernels_compile_while_the_forward_goes_on(start: Callable[[], Started]) -> None:
    started, compiled = start(), []

    def wait_for_a_compiler(*_: object) -> None:
        compiled.append(wait_until(lambda: started.rank.nvcc.compiled))

    with started.runner.model.model.layers[1].register_forward_pre_hook(wait_for_a_compiler):
        warm_up(started.runner)
    assert compiled == [True] * len(DRY)


def test_the_wait_for_all_targets_takes_nothing_from_that_of_forwards(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exact_warmup, "Rank", partial(Rank, _wait_left_s=0.0))
    started = start()
    started.rank.nvcc.on_each_kernel("sleep 0.2")
    warm_up(started.runner)
    assert started.rank.warmed == set(all_targets())
    assert lines(caplog) == []
    started.rank.deep_gemm.calls.clear()
    dense()
    assert "no time is left" in lines(caplog)[0]
    assert ms(started.rank) == [5]


def test_a_service_that_goes_ends_no_forward_of_this_rank_alone(
    start: Callable[[], Started],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Node(tmp_path_factory.mktemp("mortal")) as mortal:
        monkeypatch.setenv(SERVICE, str(mortal.socket))
        started = start()
        os.kill(mortal.service, signal.SIGKILL)
        warm_up(started.runner)
    assert started.forwards == DRY
    first, second = lines(caplog)
    assert "the marker cannot be read: the service" in first
    assert f" and {len(all_targets()) - 3} more are left to SGLang, which warms them" in second
    assert "the service" in second


def test_nothing_is_compiled_or_asked_afterwards(start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch) -> None:
    started = start()
    warm_up(started.runner)
    before, loaded = started.rank.nvcc.runs, len(started.rank.calls)
    monkeypatch.setattr(ServiceClient, "warm", None)  # whoever asks now, fails
    for batch_size in (1, 7, 16):
        for mode in (DECODE, EXTEND):
            dummy_forward(started.runner, batch_size, mode)
    assert started.rank.nvcc.runs == before
    assert len(started.rank.calls) == loaded + 6 * calls_of_a_forward()


def test_it_comes_before_anything_else_in_kernel_warmup(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, seen = start(), []
    autotuned_is(lambda: seen.append((started.forwards[:], ms(started.rank))), started.runner, monkeypatch)
    warm_up(started.runner)
    assert seen == [(DRY, loads(*all_targets()))]


@pytest.mark.release("0.5.12")
def test_the_forwards_of_a_pipeline_stage_still_run_and_compile_nothing(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start()
    monkeypatch.setenv(PP_PARALLEL, "1")
    monkeypatch.setattr(started.runner, "pp_size", 2)
    warm_up(started.runner)
    dry, both = [(DECODE, 1), (EXTEND, 1)], [(DECODE, 16), (EXTEND, 16)]
    assert started.forwards == [*dry, *dry, *both]
    assert started.rank.nvcc.compiled == compiled_for(*all_targets())


@pytest.fixture
def start_again(
    start: Callable[[], Started],
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], Started]]:
    """Starts the rank as a server does that is started again: with a service of its own."""
    with ExitStack() as nodes:

        def start_again() -> Started:
            node = nodes.enter_context(Node(tmp_path_factory.mktemp("next")))
            monkeypatch.setenv(SERVICE, str(node.socket))
            delivery.start_again()
            return start()

        yield start_again


def test_a_restart_loads_the_representatives_and_does_nothing_else(
    start: Callable[[], Started], start_again: Callable[[], Started], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    warm_up(start().runner)
    dense(n=768)  # met while it serves
    started = start_again()
    compiled, forwards = started.rank.nvcc.runs, len(started.batches)
    caplog.clear()
    warm_up(started.runner)
    assert len(started.batches) == forwards
    assert started.rank.nvcc.runs == compiled
    everything = [*all_targets(), target(DENSE, n=768)]
    assert sorted(ms(started.rank)) == sorted(loads(*everything))
    assert f"{len(everything)} targets restored from the marker, 0 kernels compiled" in caplog.text
    before = len(started.rank.calls)
    dense(n=768)
    assert len(started.rank.calls) == before + 1


def test_another_launch_looks_for_its_targets_and_finds_their_kernels(
    start: Callable[[], Started], start_again: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start()
    warm_up(started.runner)
    monkeypatch.setenv("SGLANG_SOMETHING_THAT_MAY_MATTER", "1")
    started = start_again()
    warm_up(started.runner)
    assert started.forwards == 2 * DRY
    assert [len(marker.targets) for marker in started.rank.markers] == 2 * [len(all_targets())]
    assert started.rank.nvcc.compiled == compiled_for(*all_targets()), "all that it needs has been there"


def test_a_damaged_kernel_is_made_again(
    start: Callable[[], Started], start_again: Callable[[], Started], caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    warm_up(first.runner)
    cubin = sorted((first.rank.cache / "cache").glob("kernel.*/kernel.cubin"))[0]
    cubin.write_bytes(cubin.read_bytes()[:-1])
    started = start_again()
    warm_up(started.runner)
    assert started.forwards == 2 * DRY
    assert sum(started.rank.nvcc.compiled.values()) == sum(compiled_for(*all_targets()).values()) + 1
    (line,) = lines(caplog)
    assert "the marker is not used" in line and cubin.parent.name in line


@pytest.mark.parametrize(
    ("disaggregation_mode", "is_generation", "modes"),
    [
        ("prefill", True, [EXTEND]),
        ("decode", True, [DECODE]),
        ("null", False, [EXTEND]),
        ("decode", False, []),
    ],
)
def test_a_node_finds_the_targets_of_the_modes_that_it_serves(
    disaggregation_mode: str,
    is_generation: bool,
    modes: list[ForwardMode],
    start: Callable[[], Started],
    decide: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = start()
    decide(disaggregation_mode=disaggregation_mode)
    monkeypatch.setattr(started.runner, "is_generation", is_generation)
    warm_up(started.runner)
    assert started.forwards == [each for each in DRY if each[0] in modes]
    assert started.rank.warmed == {each for mode in modes for each in targets_of_a_forward(extend=mode == EXTEND)}


Decide = Callable[..., None]


def is_speculative(runner: Any, monkeypatch: pytest.MonkeyPatch, decide: Decide) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    # With this one a dummy forward would run on a CPU, in the mode that verifies.
    monkeypatch.setattr(runner, "spec_algorithm", SpeculativeAlgorithm.NGRAM)
    decide(speculative_num_draft_tokens=2)


def is_draft(runner: Any, monkeypatch: pytest.MonkeyPatch, _decide: Decide) -> None:
    monkeypatch.setattr(runner, "is_draft_worker", True)


def has_no_gpu(runner: Any, monkeypatch: pytest.MonkeyPatch, _decide: Decide) -> None:
    monkeypatch.setattr(runner, "device", "cpu")


@pytest.mark.parametrize("kind", [is_speculative, is_draft, has_no_gpu])
def test_where_dry_forwards_cannot_run_targets_are_met_when_they_are_called(
    kind: Callable[[Any, pytest.MonkeyPatch, Decide], None],
    decide: Decide,
    start: Callable[[], Started],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = start()
    kind(started.runner, monkeypatch, decide)
    warm_up(started.runner)
    assert started.forwards == []
    assert started.rank.warmed == set()
    assert lines(caplog) == []
    dense()
    assert started.rank.warmed == {target(DENSE)}


def test_no_forward_is_left_to_be_one_that_extends(start: Callable[[], Started]) -> None:
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    started = start()
    warm_up(started.runner)
    assert started.forwards[-1] == (EXTEND, 1)
    assert get_is_extend_in_batch() is False


@pytest.mark.parametrize(
    ("cp_size", "tp_size", "gathered", "smallest"),
    [(1, 4, False, 1), (1, 4, True, 4), (2, 1, False, 2), (2, 3, True, 6)],
)
def test_the_batch_is_the_smallest_that_all_ranks_can_split(
    cp_size: int,
    tp_size: int,
    gathered: bool,
    smallest: int,
    start: Callable[[], Started],
    set_attn_tp_size: Callable[[int], None],
    set_cp_alignment: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = start()
    set_attn_tp_size(tp_size)
    set_cp_alignment(cp_size)
    monkeypatch.setattr("sglang.srt.utils.require_gathered_buffer", lambda *_: gathered)
    # Would gather from ranks that are not there.
    monkeypatch.setattr(started.runner.model, "forward", lambda *args, **kwargs: None)
    warm_up(started.runner)
    assert started.forwards == [(mode, smallest) for mode, _ in DRY]


def test_a_dry_forward_runs_without_gradients_out_of_inference_mode_and_on_the_stream_of_autotune(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, seen, streams = start(), [], []
    dummy = type(seam()).dummy_forward

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    def look(*args: Any) -> None:
        # SGLang's own dummy forward may be in inference mode further in.
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), list(streams)))
        dummy(*args)

    monkeypatch.setattr(type(seam()), "dummy_forward", look)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(started.runner, "forward_stream", stream := MagicMock())
    warm_up(started.runner)
    assert seen == [(False, False, [stream])] * len(DRY)
    assert stream.wait_stream.call_count >= len(DRY), "what the default stream still does comes first"


def failing_layer(runner: Any) -> Any:
    def fail(*_: object) -> None:
        raise RuntimeError("this layer knows no dummy batch")

    return runner.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)


def test_a_dry_forward_that_fails_is_said_and_the_rest_is_met_when_it_is_called(
    start: Callable[[], Started], caplog: pytest.LogCaptureFixture
) -> None:
    started = start()
    with failing_layer(started.runner):
        warm_up(started.runner)
    assert entrypoint.deep_gemm is started.rank.deep_gemm.module
    (line,) = lines(caplog)
    assert "a dry forward failed" in line and "this layer knows no dummy batch" in line
    # What was found before is warm; what was not is met.
    found = targets_of_a_forward(extend=False)
    assert started.rank.warmed == set(found)
    before = len(started.rank.calls)
    dummy_forward(started.runner, 1, DECODE)
    assert len(started.rank.calls) == before + calls_of_a_forward()
    dummy_forward(started.runner, 1, EXTEND)
    assert started.rank.warmed == set(all_targets())


def test_strict_a_dry_forward_that_fails_is_raised(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STRICT, "1")
    started = start()
    with failing_layer(started.runner), pytest.raises(RuntimeError, match="a dry forward failed") as raised:
        warm_up(started.runner)
    assert "this layer knows no dummy batch" in str(raised.value.__cause__)
    assert entrypoint.deep_gemm is started.rank.deep_gemm.module


def test_a_target_that_does_not_compile_is_left_to_sglang_when_it_is_called_and_the_others_are_warm(
    start: Callable[[], Started], caplog: pytest.LogCaptureFixture
) -> None:
    started = start()
    # k = 64 and 128 have the same kernels, apart from the transposition that "tma" does without.
    started.rank.nvcc.on_each_kernel('if grep -q standin_transpose "$source"; then exit 2; fi')
    warm_up(started.runner)
    failing = [each for each in all_targets() if each.lhs_scale == "k"]
    assert started.rank.warmed == set(all_targets()) - set(failing)
    (line,) = lines(caplog)  # they have one kernel in common
    assert len(failing) == 3 and " are left to SGLang, which warms them " in line
    for each in failing:
        assert f"<{each.kernel_type}> N={each.n} K={each.k}" in line
    started.rank.deep_gemm.jit = None  # DeepGEMM could not compile it either
    started.rank.deep_gemm.calls.clear()
    for _ in range(2):
        dense(n=DOWN[0], k=DOWN[1])
        masked(n=GATE_UP[0], k=GATE_UP[1])
        dense(n=OUT[0], k=OUT[1], lhs_scale="tma")
    first = [*SWEPT, 5, *SWEPT, 64, 5]
    assert ms(started.rank) == [*first, 5, 64, 5]


def test_strict_a_target_that_does_not_compile_ends_the_start(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STRICT, "1")
    started = start()
    started.rank.nvcc.on_each_kernel('if grep -q standin_transpose "$source"; then exit 2; fi')
    with pytest.raises(RuntimeError, match="cannot be warmed"):
        warm_up(started.runner)


def test_a_start_without_targets_is_remembered(
    rank: ServedRank, runner: ModelRunner, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = observe(runner, monkeypatch)
    monkeypatch.setattr(runner, "device", "cuda")
    for forwards in (len(DRY), len(DRY)):
        rank.connect(runner)
        warm_up(runner)
        assert len(batches) == forwards
        assert [marker.targets for marker in rank.markers] == [()]
        delivery.start_again()
    # What is met all the same is added.
    rank.connect(runner)
    dense()
    assert rank.warmed == {target(DENSE)}


def test_a_forward_that_failed_before_its_first_gemm_does_not_show_that_there_is_none(
    rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "device", "cuda")
    rank.connect(runner)
    with failing_layer(runner):
        warm_up(runner)
    assert rank.markers == []


@pytest.mark.parametrize("kind", [is_speculative, is_draft])
def test_a_restart_that_cannot_run_dry_loads_what_the_marker_knows_before_the_first_forward(
    kind: Callable[[Any, pytest.MonkeyPatch, Decide], None],
    decide: Decide,
    runner: ModelRunner,
    start: Callable[[], Started],
    start_again: Callable[[], Started],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind(runner, monkeypatch, decide)
    first = start()
    warm_up(first.runner)
    dense()
    again = start_again()
    for _ in range(2):  # the runner of the target model, and that of the draft model
        warm_up(again.runner)
    assert again.forwards == []
    assert ms(again.rank) == representatives_of(target(DENSE))
    # Nobody searches for more: the service need not get ready to record.
    (marker,) = again.rank.markers
    assert marker.searched


@pytest.mark.release("0.5.12")  # later ones have the other feature themselves
@pytest.mark.by_plugin  # the patches come in their order
def test_it_can_run_dry_where_it_is_the_only_feature(
    start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_warmstart.plugin import loaded_plugin

    plugin = loaded_plugin()
    assert plugin is not None
    (parallel,) = (each for each in plugin.installations if each.feature.name == "pp-parallel-warmup")
    hooks = parallel.hooks
    hooks.undo()
    try:
        started = start()
        warm_up(started.runner)
        assert started.rank.warmed == set(all_targets())
    finally:
        for step in parallel.feature.steps:
            step.install(hooks, *(sys.modules[name] for name in step.modules))


# Ranks agree


@dataclasses.dataclass
class Start:
    """What one of two real ranks reports of a start."""

    forwards: list[str]
    marked: int
    calls: int
    warnings: list[str]


def start_five_times(runner: ModelRunner, cache: Path) -> list[Start]:
    """In the process of a rank: the starts of the test below, one after another."""
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group()
    rank, delivery = group.rank, delivery_here()
    starts: list[Start] = []
    with pytest.MonkeyPatch.context() as monkeypatch, CudaOnCpu():
        CudaRuntime(monkeypatch)
        deep_gemm = install_deep_gemm(monkeypatch, DeepGemm(cache.parent / "deep_gemm", Jit(os.environ)))
        DeepGemmModel().install(runner.model, monkeypatch)
        batches = observe(runner, monkeypatch)
        monkeypatch.setattr(runner, "device", "cuda")
        monkeypatch.setattr(type(seam()), "tp_group", lambda _seam, _runner: group)
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("sglang.warmstart").addHandler(handler)

        def start() -> None:
            delivery.start_again()
            for noted in (batches, said, deep_gemm.calls):
                noted.clear()
            update_config(sglang_compile_utils, runner)
            group.barrier()
            warm_up(runner)
            mine = [path for path in markers(cache) if json.loads(path.read_text())["launch"]["rank"] == str(rank)]
            marked = sum(len(json.loads(path.read_text())["targets"]) for path in mine)
            modes = [batch.forward_mode.name for batch in batches]
            starts.append(Start(modes, marked, len(deep_gemm.calls), list(said)))
            group.barrier()

        start()
        start()
        if rank == 1:
            for path in markers(cache):
                if json.loads(path.read_text())["launch"]["rank"] == "1":
                    path.unlink()
        group.barrier()
        start()
        with pytest.MonkeyPatch.context() as alone:
            if rank == 1:
                alone.delenv(SERVICE)
            start()
        for path in markers(cache) if rank == 0 else []:
            path.unlink()
        group.barrier()
        (own,) = (layer for layer in runner.model.model.layers if hasattr(layer, "mlp"))
        with own.mlp.down_proj.register_forward_pre_hook(_fail if rank == 1 else lambda *_: None):
            start()
    return starts


def _fail(*_: object) -> None:
    raise RuntimeError("this rank alone")


def markers(cache: Path) -> list[Path]:
    return sorted(cache.glob("warmstart/markers/*/*.json"))


def test_two_real_ranks_decide_alike(
    node: Node, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, cache = FakeNvcc(tmp_path / "nvcc"), tmp_path / "kernels"
    (tmp_path / "deep_gemm" / "include" / "deep_gemm").mkdir(parents=True)
    monkeypatch.setenv(SERVICE, str(node.socket))
    monkeypatch.setenv("SGLANG_DG_CACHE_DIR", str(cache))
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(nvcc.path))
    ranks = run_stages(start_five_times, 2, tiny_model, cache, server_args={"max_running_requests": 16})
    both, all_loaded = [mode.name for mode, _ in DRY], len(loads(*all_targets()))
    for first, again, one_without_marker, one_without_service, one_that_fails in ranks:
        assert first == Start(both, len(all_targets()), all_loaded, [])
        assert again == Start([], len(all_targets()), all_loaded, [])
        assert one_without_marker == Start(both, len(all_targets()), all_loaded, [])
        assert one_without_service.forwards == []
        assert one_that_fails.forwards == ["DECODE"], "nobody goes on alone"
        assert len(one_without_service.warnings) == len(one_that_fails.warnings) == 1
    assert [rank[3].calls for rank in ranks] == [all_loaded, 0], (
        "the one that has a service loads what its marker knows"
    )
    assert "not all ranks take part" in ranks[0][3].warnings[0]
    assert "no service was started" in ranks[1][3].warnings[0]
    assert "on another rank" in ranks[0][4].warnings[0]
    assert "this rank alone" in ranks[1][4].warnings[0]
    assert nvcc.compiled == compiled_for(*all_targets()), "each kernel once, whoever needs it"


# The service is started with the schedulers


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ServiceProcess]]:
    """The services that are started here. They are ended with the test."""
    started: list[ServiceProcess] = []

    def start(**options: Any) -> ServiceProcess:
        started.append(start_service(**options))
        return started[-1]

    monkeypatch.setattr(exact_warmup, "start_service", start)
    yield started
    for service in started:
        service.stop()


def scheduler(*arguments: Any) -> None:
    """In the place of a scheduler process: it reports what it finds in its environment."""
    arguments[-1].send({"status": "ready", "service": os.environ.get(SERVICE)})


def launch_schedulers(runner: ModelRunner, device: str) -> str | None:
    """SGLang's own start of its scheduler processes; where they find the service."""
    from sglang.srt.entrypoints.engine import Engine

    server_args = with_values(runner.server_args, device=device)
    result, processes = Engine._launch_scheduler_processes(server_args, None, scheduler)
    result.wait_for_ready()
    for process in processes:
        process.join()
    (info,) = result.scheduler_infos
    service: str | None = info["service"]
    return service


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked, so that they need no import."""
    from sglang.srt.entrypoints import engine

    monkeypatch.setattr(engine, "mp", multiprocessing.get_context("fork"))
    monkeypatch.delenv(SERVICE, raising=False)


@pytest.mark.usefixtures("engine", "deep_gemm")
def test_the_schedulers_find_the_service_that_is_started_with_them(
    runner: ModelRunner, services: list[ServiceProcess], tmp_path: Path
) -> None:
    path = launch_schedulers(runner, "cuda")
    (service,) = services
    assert path == str(service.socket)
    nvcc = FakeNvcc(tmp_path / "nvcc")
    environment = {"DG_JIT_NVCC_COMPILER": str(nvcc.path)}
    (tmp_path / "include" / "deep_gemm").mkdir(parents=True)
    hello = Hello(str(tmp_path / "kernels"), environment, str(tmp_path), Gpu("NVIDIA H200", 132, (9, 0), 0), {})
    client = ServiceClient(service.socket)
    assert client.hello(hello) == Welcome()
    client.close()


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> str:
    return "cpu"


def without_precompile(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PRECOMPILE, "0")
    return "cuda"


def switched_off(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SGLANG_WARMSTART", "0")
    return "cuda"


def without_jit(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    return "cuda"


def without_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delitem(sys.modules, "deep_gemm")
    return "cuda"


def nvml(*capabilities: tuple[int, int]) -> SimpleNamespace:
    """What NVML says of a machine with these GPUs."""
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(capabilities),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda gpu: capabilities[gpu],
    )


def with_gpus_before_hopper(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "pynvml", nvml((8, 0), (8, 9)))
    return "cuda"


@pytest.mark.usefixtures("engine", "deep_gemm")
@pytest.mark.parametrize("gpus", [nvml((8, 9), (9, 0)), nvml((10, 0)), nvml(), SimpleNamespace()])
def test_where_a_gpu_may_be_young_enough_there_is_a_service(
    gpus: SimpleNamespace, runner: ModelRunner, services: list[ServiceProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    exact_warmup.start_node_service(with_values(runner.server_args, device="cuda"))
    assert len(services) == 1


@pytest.mark.usefixtures("engine", "deep_gemm")
@pytest.mark.parametrize(
    "gate", [on_a_cpu, without_precompile, switched_off, without_jit, without_deep_gemm, with_gpus_before_hopper]
)
def test_no_service_is_started_where_there_is_nothing_for_it_to_do(
    gate: Callable[[pytest.MonkeyPatch], str],
    runner: ModelRunner,
    services: list[ServiceProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert launch_schedulers(runner, gate(monkeypatch)) is None
    assert services == []


@pytest.mark.usefixtures("engine", "deep_gemm")
def test_a_service_that_cannot_be_started_keeps_no_server_from_starting(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(SERVICE, "that of an earlier engine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    assert launch_schedulers(runner, "cuda") is None
    (line,) = lines(caplog)
    assert "no service for exact warm-up" in line and str(tmp_path / "full") in line


@pytest.mark.usefixtures("engine", "deep_gemm")
def test_whatever_else_keeps_the_service_from_starting_keeps_no_server_from_it(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", None)  # as in a program that has Python inside
    assert launch_schedulers(runner, "cuda") is None
    (line,) = lines(caplog)
    assert "no service for exact warm-up" in line


# A plan is recorded


@pytest.fixture(scope="module")
def planning_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Path]]:
    """A node of `sglang-warmstart record`, and where its plans go."""
    directory = tmp_path_factory.mktemp("planning")
    with Node(directory, plans=directory / "plans") as node:
        yield node, directory / "plans"


@pytest.fixture
def planning(
    planning_node: tuple[Node, Path], start: Callable[[], Started], monkeypatch: pytest.MonkeyPatch
) -> tuple[Started, Callable[[], Plan]]:
    """A rank whose targets are recorded for a plan, and that plan."""
    node, directory = planning_node
    for path in directory.glob("*"):
        path.unlink()
    monkeypatch.setenv(SERVICE, str(node.socket))
    started = start()

    def plan() -> Plan:
        (path,) = directory.glob("*.json")
        return plans.decode(path.read_bytes())

    return started, plan


def planned(plan: Plan) -> set[Target]:
    return {each.target for launch in plan.launches for each in launch.targets}


def test_the_targets_of_dry_forwards_come_into_the_plan_and_no_gemm_ever_runs(
    planning: tuple[Started, Callable[[], Plan]], caplog: pytest.LogCaptureFixture
) -> None:
    started, plan = planning
    warm_up(started.runner)
    assert started.forwards == DRY
    assert planned(plan()) == set(all_targets())
    # What follows at a start-up: forwards that are not dry, and more of them.
    for mode in (DECODE, EXTEND):
        dummy_forward(started.runner, 7, mode)
    assert started.rank.calls == []
    assert started.rank.nvcc.runs == {"stub": 1}
    assert started.rank.markers == []
    assert lines(caplog) == []


def test_a_target_that_is_met_later_comes_into_the_plan_too_and_its_result_is_zero(
    planning: tuple[Started, Callable[[], Plan]],
) -> None:
    started, plan = planning
    assert dense().unique().tolist() == [0]
    assert dense(m=7).unique().tolist() == [0]
    assert masked().unique().tolist() == [0]
    assert planned(plan()) == {target(DENSE), target(MASKED)}
    assert started.rank.calls == []


def test_a_target_that_cannot_be_described_is_named_in_the_plan_and_not_swept(
    planning: tuple[Started, Callable[[], Plan]], caplog: pytest.LogCaptureFixture
) -> None:
    started, plan = planning
    dense()
    for _ in range(2):
        assert masked(overlap_args=overlapped()).unique().tolist() == [0]
    (line,) = lines(caplog)
    assert wait_until(lambda: plan().left_out)  # a rank does not wait for an answer to this
    (left_out,) = plan().left_out
    assert line == f"warmstart: {left_out.target} is not in the plan: {left_out.reason}"
    assert MASKED in left_out.target
    assert left_out.reason.startswith("the argument ")
    assert planned(plan()) == {target(DENSE)}
    assert started.rank.calls == []


def test_where_a_plan_is_recorded_a_cache_that_knows_all_is_not_asked(
    rank: ServedRank,
    runner: ModelRunner,
    planning_node: tuple[Node, Path],
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank.connect(runner)
    dense()
    assert rank.warmed == {target(DENSE)}
    delivery.start_again()
    node, directory = planning_node
    monkeypatch.setenv(SERVICE, str(node.socket))
    rank.connect(runner)
    before = rank.calls
    dense()
    assert rank.calls == before
    assert any(target(DENSE) in planned(plans.decode(path.read_bytes())) for path in directory.glob("*.json"))


@pytest.mark.usefixtures("engine", "deep_gemm")
def test_the_service_is_told_where_plans_go_and_who_restores(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[dict[str, Path | None]] = []
    real = start_service()

    def start(**options: Path | None) -> ServiceProcess:
        told.append(options)
        return real

    monkeypatch.setattr(exact_warmup, "start_service", start)
    try:
        launch_schedulers(runner, "cuda")
        monkeypatch.setenv(exact_warmup.PLANS, str(tmp_path / "plans"))
        monkeypatch.setenv(exact_warmup.RESTORING, str(tmp_path / "lock"))
        launch_schedulers(runner, "cuda")
    finally:
        real.stop()
    assert told[0] == {"restoring": None, "plans": None}
    assert told[1]["plans"] == tmp_path / "plans"


@pytest.mark.by_plugin
def test_its_switch_is_one_of_sglangs() -> None:
    from sglang.srt.environ import envs

    assert envs.SGLANG_WARMSTART_COMPILER.get() == "nvcc"
