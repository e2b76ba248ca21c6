"""F6 in a rank that serves: what happens when SGLang's wrapper calls a GEMM for the first time, and from then on."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import sglang_warmstart
import torch
from kit import wrapped_gemms
from kit.delivery import Delivery, delivered
from kit.gpu_standins import CudaRuntime, mhc_module
from kit.node import Node
from kit.release import is_patched
from kit.served_rank import ServedRank, compiled_for, representatives_of
from kit.standin_library import TAKEN_GPU
from kit.toolchain import toolchain
from kit.wrapped_gemms import (
    BF16,
    BF16_CONTIGUOUS,
    BF16_MASKED,
    CALLS,
    CONTIGUOUS,
    DENSE,
    MASKED,
    PRENORM,
    K,
    bf16,
    bf16_contiguous,
    bf16_masked,
    block_32,
    dense,
    masked,
    mxfp8,
    overlapped,
    prenorm,
    target,
)
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as sglang_compile_utils
from sglang.srt.layers.deep_gemm_wrapper import entrypoint
from sglang_warmstart.deepgemm import gemms
from sglang_warmstart.deepgemm.dialects import DEEPJIT
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.record.way import WITHOUT_GPU
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.sglang import hc_prenorm
from sglang_warmstart.sglang.exact_warmup import rank as ranks
from sglang_warmstart.sglang.exact_warmup import warmup as exact_warmup
from sglang_warmstart.sglang.exact_warmup.rank import Rank, WarmupError
from sglang_warmstart.sglang.m_list import fast_m_list

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

FEATURE = "exact-warmup"
STRICT = "SGLANG_WARMSTART_STRICT"

# In a tuple: as a name of this module the plugin would replace it.
SGLANG_MAYBE_COMPILE = (sglang_compile_utils._maybe_compile_deep_gemm_one_type_all,)

# What SGLang sweeps in these tests, instead of thousands.
SWEPT = [1, 2, 3]


@pytest.fixture(autouse=True)
def delivery() -> Iterator[Delivery]:
    """Started anew for each test: a process that is a rank stays one."""
    with delivered() as delivery:
        yield delivery


@pytest.fixture(autouse=True)
def no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang has not imported its rule for the number of splits, whatever another test has imported."""
    monkeypatch.setattr(hc_prenorm, "_RULE_IN", ())


@pytest.fixture
def started(rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ServedRank:
    """A rank whose model runner has started: the first one of its node."""
    monkeypatch.delenv(STRICT, raising=False)
    rank.connect(runner)
    return rank


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of so far."""

    def so_far() -> list[str]:
        records = caplog.get_records("call")
        return [each.getMessage() for each in records if each.name == "sglang.warmstart" and each.levelname != "INFO"]

    return so_far


def deep_gemm_is_in_its_place(rank: ServedRank) -> bool:
    return entrypoint.deep_gemm is rank.deep_gemm.module


def ms(rank: ServedRank) -> list[int]:
    """The M of each call that reached DeepGEMM."""
    return [m for _, m in rank.calls]


# The first call


LAYOUTS = {
    DENSE: [{"lhs_scale": lhs, "rhs_scale": rhs} for lhs in ("k", "tma") for rhs in ("k", "mn")],
    CONTIGUOUS: [{"lhs_scale": "k", "rhs_scale": "mn"}, {"lhs_scale": "tma", "rhs_scale": "k"}],
    MASKED: [{"lhs_scale": "k", "rhs_scale": "mn"}, {"lhs_scale": "tma", "rhs_scale": "k"}],
    BF16: [{"lhs_major": lhs, "rhs_major": rhs} for lhs in ("k", "mn") for rhs in ("k", "mn")],
    BF16_CONTIGUOUS: [{}],
    BF16_MASKED: [{}],
}


@pytest.mark.parametrize(
    ("kernel_type", "layout"),
    [(kernel_type, layout) for kernel_type, layouts in LAYOUTS.items() for layout in layouts],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_the_first_call_becomes_a_target_with_its_layouts_and_loads_all_its_kernels(
    kernel_type: str, layout: dict[str, str], started: ServedRank
) -> None:
    expected = target(kernel_type, **layout)
    assert CALLS[kernel_type](**layout).unique().tolist() == [K]
    assert started.warmed == {expected}
    assert started.nvcc.compiled == compiled_for(expected)
    *loaded, real = ms(started)
    assert loaded == representatives_of(expected)
    assert real not in loaded
    assert deep_gemm_is_in_its_place(started)


@pytest.mark.release("0.5.23")
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (block_32, target("GEMM_NT_F8F8BF16_BLOCK32", recipe=(1, 32, 32))),
        (mxfp8, target(DENSE, function="fp8_fp4_gemm_nt", recipe_a=(1, 32), recipe_b=(1, 32))),
    ],
    ids=["block 32", "MXFP8"],
)
def test_the_first_call_with_smaller_blocks_becomes_a_target_too(
    call: Callable[[], torch.Tensor], expected: Target, started: ServedRank
) -> None:
    for _ in range(2):
        assert call().unique().tolist() == [K]
    assert started.warmed == {expected}
    assert ms(started) == [*representatives_of(expected), 5, 5]


@pytest.mark.parametrize("kernel_type", CALLS)
def test_no_m_of_a_target_compiles_anything_afterwards(kernel_type: str, started: ServedRank) -> None:
    CALLS[kernel_type]()
    before = started.nvcc.runs
    for m in (128, 256, 640) if kernel_type in (CONTIGUOUS, BF16_CONTIGUOUS) else (1, 16, 17, 40, 100, 129, 700):
        assert CALLS[kernel_type](m=m).unique().tolist() == [K]
    assert started.nvcc.runs == before


@pytest.mark.parametrize("kernel_type", CALLS)
def test_the_second_call_goes_straight_to_deep_gemm(kernel_type: str, started: ServedRank) -> None:
    CALLS[kernel_type]()
    before = len(started.calls)
    CALLS[kernel_type]()
    assert len(started.calls) == before + 1


def functions_of_ours(run: Callable[[], Any]) -> list[str]:
    """Which of our functions a run calls."""
    called, package = [], str(Path(sglang_warmstart.__file__).parent)

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


def test_a_known_call_costs_a_look_into_a_set(started: ServedRank) -> None:
    for _ in range(2):
        bf16()
    assert functions_of_ours(bf16) == ["maybe_compile"]


def test_each_shape_is_a_target_of_its_own(started: ServedRank) -> None:
    for n, k in ((384, 512), (768, 512), (384, 1024)):
        dense(n=n, k=k)
    assert started.warmed == {target(DENSE, n=n, k=k) for n, k in ((384, 512), (768, 512), (384, 1024))}


def test_the_range_of_m_is_what_sglang_would_sweep(rank: ServedRank, runner: ModelRunner) -> None:
    rank.connect(runner, chunked_prefill_size=10000)
    bf16()
    assert rank.warmed == {target(BF16, m_max=20000)}


@pytest.mark.parametrize("gpu_id", [0, 3])
def test_every_rank_is_warmed_and_none_sweeps(gpu_id: int, rank: ServedRank, runner: ModelRunner) -> None:
    rank.connect(runner, gpu_id=gpu_id)
    assert sglang_compile_utils._DO_COMPILE_ALL is (gpu_id == 0)
    dense()
    assert rank.nvcc.compiled == compiled_for(target(DENSE))
    assert ms(rank) == [*representatives_of(target(DENSE)), 5]


def test_two_ranks_compile_what_they_share_once(rank: ServedRank, runner: ModelRunner, delivery: Delivery) -> None:
    for gpu_id in (0, 1):
        delivery.start_again()
        rank.connect(runner, gpu_id=gpu_id)
        dense()
    assert rank.nvcc.compiled == compiled_for(target(DENSE))
    assert ms(rank) == 2 * [*representatives_of(target(DENSE)), 5]


# The number of SMs


def test_the_number_of_sms_is_part_of_the_key(started: ServedRank) -> None:
    dense()
    with entrypoint.configure_deep_gemm_num_sms(100):
        dense()
        assert started.deep_gemm.num_sms == 100
    assert started.deep_gemm.num_sms == 132
    assert started.warmed == {target(DENSE), target(DENSE, num_sms=100)}
    assert started.nvcc.compiled == compiled_for(*started.warmed)
    before = started.nvcc.runs
    dense(m=700)
    with entrypoint.configure_deep_gemm_num_sms(100):
        dense(m=700)
    assert started.nvcc.runs == before


def with_fewer_sms_inside_the_hook(num_sms: int) -> None:
    """As the masked wrapper does where two batches overlap: the hook sees another number than the call."""
    kernel_type = sglang_compile_utils.DeepGemmKernelType[BF16]
    lhs, rhs = (torch.ones(rows, K, dtype=torch.bfloat16) for rows in (5, wrapped_gemms.N))
    with (
        sglang_compile_utils.deep_gemm_execution_hook(5, wrapped_gemms.N, K, 1, kernel_type),
        entrypoint.configure_deep_gemm_num_sms(num_sms),
    ):
        entrypoint.deep_gemm.bf16_gemm_nt(lhs, rhs, torch.empty(5, wrapped_gemms.N))


def test_a_number_of_sms_that_is_set_after_the_hook_is_that_of_the_target(started: ServedRank) -> None:
    with_fewer_sms_inside_the_hook(100)
    assert started.warmed == {target(BF16, num_sms=100)}
    assert started.deep_gemm.num_sms == 132
    before = len(started.calls)
    with_fewer_sms_inside_the_hook(100)
    assert len(started.calls) == before + 1, "the hook's own key is known too, or each call would be met anew"
    assert deep_gemm_is_in_its_place(started)


# CUDA graphs


def test_nothing_is_warmed_while_a_graph_is_captured(started: ServedRank) -> None:
    started.cuda.is_capturing = True
    dense()
    assert ms(started) == [5]
    assert started.warmed == set()
    assert deep_gemm_is_in_its_place(started)

    started.cuda.is_capturing = False
    dense()
    assert started.warmed == {target(DENSE)}


# What cannot be warmed


FAILING_KERNEL = """if grep -q 256x "$source"; then echo "ptxas fatal: out of registers" >&2; exit 2; fi"""


def test_a_target_that_does_not_compile_is_left_to_sglang_with_one_line(
    started: ServedRank, warnings: Callable[[], list[str]]
) -> None:
    started.nvcc.on_each_kernel(FAILING_KERNEL)
    for _ in range(3):
        assert dense().unique().tolist() == [K]
    assert ms(started) == [*SWEPT, 5, 5, 5]
    (line,) = warnings()
    for words in (DENSE, f"N={wrapped_gemms.N}", f"K={K}", "num_groups=1", "num_sms=132", "ptxas fatal: out of reg"):
        assert words in line
    assert "is left to SGLang" in line
    assert deep_gemm_is_in_its_place(started)


def test_a_rank_that_does_not_sweep_does_not_sweep_then_either(
    rank: ServedRank, runner: ModelRunner, warnings: Callable[[], list[str]]
) -> None:
    rank.connect(runner, gpu_id=1)
    rank.nvcc.on_each_kernel(FAILING_KERNEL)
    for _ in range(2):
        dense()
    assert ms(rank) == [5, 5]
    assert len(warnings()) == 1


def test_the_next_target_is_tried_again(started: ServedRank) -> None:
    started.nvcc.on_each_kernel(FAILING_KERNEL)
    dense()
    started.nvcc.on_each_kernel(":")
    bf16()
    assert started.warmed == {target(BF16)}


def test_a_call_that_a_target_does_not_describe_is_left_to_sglang_with_what_it_is(
    started: ServedRank, warnings: Callable[[], list[str]]
) -> None:
    for _ in range(3):
        assert masked(overlap_args=overlapped()).unique().tolist() == [K]
    assert ms(started) == [*SWEPT, 64, 64, 64]
    assert started.warmed == set()
    (line,) = warnings()
    assert MASKED in line
    assert "the argument enable_overlap" in line or "the argument signal" in line


@pytest.fixture
def bf16_masked_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if SGLang had wrapped a GEMM that nobody here has heard of."""
    known = {name: gemm for name, gemm in ranks.GEMMS.items() if name != BF16_MASKED}
    monkeypatch.setattr(ranks, "GEMMS", known)


@pytest.mark.usefixtures("bf16_masked_unknown")
def test_a_gemm_that_is_not_known_is_left_to_sglang(started: ServedRank, warnings: Callable[[], list[str]]) -> None:
    for _ in range(2):
        assert bf16_masked().unique().tolist() == [K]
    assert ms(started) == [*SWEPT, 64, 64]
    (line,) = warnings()
    assert BF16_MASKED in line
    assert "not known to have such a GEMM" in line


def by_another_function() -> None:
    """As if one kernel type of the hook were called by a function that nobody here has heard of."""
    kernel_type = sglang_compile_utils.DeepGemmKernelType[DENSE]
    with sglang_compile_utils.deep_gemm_execution_hook(5, wrapped_gemms.N, K, 1, kernel_type):
        entrypoint.deep_gemm.fp8_fp4_gemm_nn()


@pytest.fixture
def other_calls(started: ServedRank) -> list[int]:
    calls: list[int] = []
    module: Any = started.deep_gemm.module
    module.fp8_fp4_gemm_nn = lambda: calls.append(1)
    return calls


def test_a_call_that_does_not_come_by_is_left_to_sglang_when_it_comes_again(
    started: ServedRank, other_calls: list[int], warnings: Callable[[], list[str]]
) -> None:
    for _ in range(3):
        by_another_function()
    assert len(other_calls) == 3
    assert ms(started) == SWEPT
    (line,) = warnings()
    assert DENSE in line
    assert "called by another function" in line
    assert deep_gemm_is_in_its_place(started)


def test_no_other_call_is_taken_for_the_one_that_did_not_come_by(started: ServedRank, other_calls: list[int]) -> None:
    bf16()
    before = len(started.calls)
    by_another_function()
    assert bf16().unique().tolist() == [K]  # known: it passes the hook, and comes to the door
    assert len(started.calls) == before + 1
    masked()
    assert started.warmed == {target(BF16), target(MASKED)}


# No context, no time, no service


def test_without_a_context_the_first_rank_warms_the_fast_list_by_sglang_itself(
    rank: ServedRank, runner: ModelRunner, warnings: Callable[[], list[str]]
) -> None:
    rank.cuda.name = TAKEN_GPU
    rank.connect(runner, chunked_prefill_size=1)
    for _ in range(2):
        assert dense(n=128, k=128).unique().tolist() == [128]
    assert ms(rank) == [*fast_m_list(1), 5, 5]
    assert {call.compile_mode for call in rank.deep_gemm.calls[:-2]} == {1}, "SGLang's own warm-up has made them"
    (line,) = warnings()
    assert "no CUDA context" in line
    assert "fast list" in line


def test_without_a_context_another_rank_warms_nothing(rank: ServedRank, runner: ModelRunner) -> None:
    rank.cuda.name = TAKEN_GPU
    rank.connect(runner, gpu_id=1)
    for _ in range(2):
        dense()
    assert ms(rank) == [5, 5]


class Held:
    """The largest kernel is not done before it is let go."""

    def __init__(self, rank: ServedRank, directory: Path) -> None:
        self._released = directory / "released"
        wait = f"while [ ! -e '{self._released}' ]; do sleep 0.02; done"
        rank.nvcc.on_each_kernel(f'if grep -q 256x "$source"; then {wait}; fi')

    def let_go(self) -> None:
        self._released.touch()


@pytest.fixture
def held(rank: ServedRank, tmp_path: Path) -> Iterator[Held]:
    held = Held(rank, tmp_path)
    yield held
    held.let_go()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long forwards wait, all of them together."""
    seconds = 1.0
    monkeypatch.setattr(exact_warmup, "Rank", partial(Rank, _wait_left_s=seconds))
    return seconds


@pytest.mark.usefixtures("held")
def test_what_is_not_ready_in_time_compiles_on_first_use(
    impatient: float, started: ServedRank, warnings: Callable[[], list[str]]
) -> None:
    begin = time.monotonic()
    for _ in range(2):
        assert dense().unique().tolist() == [K]
    assert impatient <= time.monotonic() - begin < impatient + 10
    assert ms(started) == [5, 5]
    line, first_use = warnings()
    assert f"<{DENSE}> N=384 K={K}" in line
    assert "not ready" in line
    assert "compiles on first use" in first_use


def test_all_waits_of_one_forward_have_one_limit_and_the_next_has_its_own(
    rank: ServedRank,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(exact_warmup, "Rank", partial(Rank, _wait_left_s=0.0))
    rank.connect(runner)
    for _ in range(2):
        assert dense().unique().tolist() == [K]
    assert ms(rank) == [5, 5], "no sweep: the other ranks would wait for it"
    assert rank.warmed == set()
    (line,) = warnings()
    assert DENSE in line and "no time is left in this forward" in line
    with suppress(Exception):  # there is no batch: it begins, and ends there
        runner.forward(None)
    dense()
    assert rank.warmed == {target(DENSE)}


def test_strict_a_target_that_finds_no_time_is_raised(
    rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STRICT, "1")
    monkeypatch.setattr(exact_warmup, "Rank", partial(Rank, _wait_left_s=0.0))
    rank.connect(runner)
    with pytest.raises(WarmupError, match="no time is left in this forward"):
        dense()


@pytest.mark.by_plugin  # the patches leave SGLang's sweep as it is
def test_sglangs_own_sweep_ends_with_the_time_of_the_forward(
    impatient: float,
    started: ServedRank,
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    started.nvcc.on_each_kernel(FAILING_KERNEL)
    monkeypatch.setattr(compile_utils, "_BUILTIN_M_LIST", list(range(1, 1000)))
    gemm = started.deep_gemm.module.fp8_gemm_nt

    @functools.wraps(gemm)
    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(impatient / 10)
        gemm(*args, **kwargs)

    monkeypatch.setattr(started.deep_gemm.module, "fp8_gemm_nt", slow)
    begin = time.monotonic()
    assert dense().unique().tolist() == [K]
    assert time.monotonic() - begin < 5 * impatient
    swept = ms(started)
    assert swept[:-1] == list(range(1, len(swept))) and 2 < len(swept) < 20
    assert "ends after" in warnings()[-1]


@dataclass(frozen=True)
class WithDeepJit:
    """A rank that has started on a GPU. What it calls is a stand-in; its service asks the real library for kernels."""

    rank: ServedRank
    node: Node

    def expect(self, called: Target, *kernels: str) -> None:
        """See that a call has become a target, and that all its kernels, of these kinds, are in the cache."""
        (marker,) = self.rank.markers
        (found,) = marker.targets
        assert found.target == called
        names = {use.directory for use in found.kernels}
        assert {name.partition(".")[0] for name in names} == set(kernels)
        assert all(DEEPJIT.is_whole(self.rank.cache / "cache" / name) for name in names)
        assert "stub" not in self.rank.nvcc.runs
        assert set(ms(self.rank)[:-1]) == {use.m for use in found.kernels}, "SGLang has swept"


@pytest.fixture
def with_deepjit(
    request: pytest.FixtureRequest,
    cuda: CudaRuntime,
    runner: ModelRunner,
    compile_utils: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[WithDeepJit]:
    """On an H200, or on the GPU that a test names. In strict mode: nothing is left to SGLang."""
    monkeypatch.setenv(STRICT, "1")
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    gpu = gpu_of(getattr(request, "param", "h200"))
    cuda.name, cuda.multi_processor_count, cuda.capability = gpu.name, gpu.num_sms, gpu.capability
    # Where that was not compared with a GPU, the service would record on one.
    library = "" if gpu.capability == (9, 0) else WITHOUT_GPU
    with Node(tmp_path, library=library) as node:
        rank = ServedRank(tmp_path, node, cuda, monkeypatch)
        rank.deep_gemm.num_sms = gpu.num_sms
        package = toolchain().deep_gemm_of("0.2.3.post2")
        monkeypatch.setattr(rank.deep_gemm.module, "__file__", str(package / "__init__.py"))
        rank.connect(runner)
        yield WithDeepJit(rank, node)


@pytest.mark.parametrize(
    ("call", "called", "kernels"),
    [
        (dense, target(DENSE), ["sm90_fp8_gemm_1d2d", "transpose_fp32"]),
        (bf16_contiguous, target(BF16_CONTIGUOUS), ["sm90_m_grouped_bf16_gemm_contiguous"]),
        (bf16_masked, target(BF16_MASKED), ["sm90_bf16_m_grouped_gemm_masked"]),
        (partial(prenorm, n=24, num_splits=4), target(PRENORM, n=24, num_groups=4), ["sm90_tf32_hc_prenorm_gemm"]),
    ],
    ids=["dense", "contiguous bf16", "masked bf16", "prenorm"],
)
def test_a_deep_gemm_with_deepjit_is_recorded_without_the_gpu_and_warmed(
    call: Callable[[], torch.Tensor], called: Target, kernels: list[str], with_deepjit: WithDeepJit
) -> None:
    assert call().unique().tolist() == [K]
    assert "targets are recorded without the GPU" in with_deepjit.node.log
    with_deepjit.expect(called, *kernels)


@pytest.mark.release("0.5.23")
@pytest.mark.parametrize("with_deepjit", ["b200"], indirect=True)
@pytest.mark.parametrize(
    ("call", "called"),
    [
        (block_32, target("GEMM_NT_F8F8BF16_BLOCK32", num_sms=148, recipe=(1, 32, 32))),
        (mxfp8, target(DENSE, num_sms=148, function="fp8_fp4_gemm_nt", recipe_a=(1, 32), recipe_b=(1, 32))),
    ],
    ids=["block 32", "MXFP8"],
)
def test_smaller_blocks_are_recorded_by_the_real_library_of_the_newest_release(
    call: Callable[[], torch.Tensor], called: Target, with_deepjit: WithDeepJit
) -> None:
    assert call().unique().tolist() == [K]
    with_deepjit.expect(called, "sm100_fp8_fp4_gemm_1d1d", "transpose_and_pack_fp32_into_ue8m0")


def test_what_took_no_time_leaves_time_for_others(started: ServedRank, warnings: Callable[[], list[str]]) -> None:
    dense()
    bf16()
    assert started.warmed == {target(DENSE), target(BF16)}
    assert warnings() == []


@pytest.fixture
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of a test alone: its service may be ended."""
    with Node(tmp_path_factory.mktemp("mortal")) as node:
        yield node


@pytest.fixture
def bereft(
    mortal: Node,
    cuda: CudaRuntime,
    compile_utils: ModuleType,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> ServedRank:
    """A rank whose service is about to go."""
    rank = ServedRank(tmp_path, mortal, cuda, monkeypatch)
    rank.connect(runner)
    return rank


def test_a_service_that_has_gone_leaves_each_new_target_to_sglang(
    bereft: ServedRank, mortal: Node, warnings: Callable[[], list[str]]
) -> None:
    dense()
    warmed = bereft.calls
    os.kill(mortal.service, signal.SIGKILL)
    for _ in range(2):
        assert dense().unique().tolist() == [K]  # warm is warm
        assert bf16().unique().tolist() == [K]
        assert masked().unique().tolist() == [K]
    sweep = [("bf16_gemm_nt", m) for m in SWEPT], [("fp8_m_grouped_gemm_nt_masked", m) for m in SWEPT]
    once = [("fp8_gemm_nt", 5), ("bf16_gemm_nt", 5), ("fp8_m_grouped_gemm_nt_masked", 64)]
    assert bereft.calls == [*warmed, once[0], *sweep[0], once[1], *sweep[1], once[2], *once]
    first, second = warnings()
    assert BF16 in first and MASKED in second
    assert all("the service" in line and "is left to SGLang" in line for line in (first, second))


def test_a_service_that_goes_while_a_rank_waits_is_noticed_at_once(
    bereft: ServedRank, mortal: Node, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    Held(bereft, tmp_path)
    killer = threading.Timer(1.0, os.kill, (mortal.service, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    assert dense().unique().tolist() == [K]
    assert 0.5 < time.monotonic() - begin < 10
    assert ms(bereft) == [*SWEPT, 5]
    (line,) = warnings()
    assert DENSE in line and "the service" in line
    assert deep_gemm_is_in_its_place(bereft)


# Loading


def test_kernels_that_cannot_be_loaded_are_said_and_left_to_first_use(
    started: ServedRank, warnings: Callable[[], list[str]]
) -> None:
    started.deep_gemm.failure = RuntimeError("CUDA out of memory\nand a page of advice")
    for _ in range(2):
        assert dense().unique().tolist() == [K]
    assert ms(started) == [5, 5]
    (line,) = warnings()
    assert str(target(DENSE)) in line
    assert "CUDA out of memory" in line and "\n" not in line


def test_an_m_that_does_not_fit_is_said_and_left_to_first_use(
    started: ServedRank, warnings: Callable[[], list[str]]
) -> None:
    asked = target(DENSE)
    *fitting, last = representatives_of(asked)
    started.cuda.free_memory = int(gemms.real_bytes(asked, fitting[-1]) / 0.8) + 10
    dense()
    assert ms(started) == [*fitting, 5]
    (line,) = warnings()
    assert str(asked) in line
    assert f"M={last} and above" in line


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt()], ids=["well", "interrupted"])
def test_loading_allocates_outside_symmetric_memory(
    failure: Any, started: ServedRank, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    def disable() -> str:
        events.append(("disabled", len(started.calls)))
        return "the context"

    monkeypatch.setattr(compile_utils, "disable_symmetric_memory_context", disable)
    monkeypatch.setattr(
        compile_utils,
        "restore_symmetric_memory_context",
        lambda context: events.append((context, len(started.calls))),
    )
    started.deep_gemm.failure = failure
    if failure is None:
        dense()
        loaded = len(representatives_of(target(DENSE)))
    else:
        with pytest.raises(KeyboardInterrupt):
            dense()
        loaded = 0
    assert events == [("disabled", 0), ("the context", loaded)]
    assert deep_gemm_is_in_its_place(started)


# Strict


@pytest.fixture
def strict(rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ServedRank:
    monkeypatch.setenv(STRICT, "1")
    rank.connect(runner)
    return rank


def expect_refusal(rank: ServedRank, call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(WarmupError) as refused:
        call()
    for each in words:
        assert each in str(refused.value)
    assert deep_gemm_is_in_its_place(rank)
    assert SWEPT[0] not in ms(rank), "SGLang has swept"


def test_strict_nothing_is_raised_for_what_can_be_warmed(strict: ServedRank) -> None:
    for call in (dense, bf16, masked, wrapped_gemms.contiguous):
        call()
    assert len(strict.warmed) == 4


def test_strict_a_target_that_does_not_compile_is_raised(strict: ServedRank) -> None:
    strict.nvcc.on_each_kernel(FAILING_KERNEL)
    expect_refusal(strict, dense, DENSE, f"N={wrapped_gemms.N} K={K}", "ptxas fatal: out of registers")


def test_strict_a_call_that_a_target_does_not_describe_is_raised(strict: ServedRank) -> None:
    expect_refusal(strict, lambda: masked(overlap_args=overlapped()), MASKED, "the argument ")


@pytest.mark.usefixtures("bf16_masked_unknown")
def test_strict_a_gemm_that_is_not_known_is_raised(strict: ServedRank) -> None:
    expect_refusal(strict, bf16_masked, BF16_MASKED, "not known")


def test_strict_a_call_that_does_not_come_by_is_raised(strict: ServedRank) -> None:
    module: Any = strict.deep_gemm.module
    module.fp8_fp4_gemm_nn = lambda: None
    by_another_function()
    expect_refusal(strict, by_another_function, DENSE, "another function")


def test_strict_no_context_is_raised(rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
    rank.cuda.name = TAKEN_GPU
    rank.connect(runner)
    expect_refusal(rank, dense, DENSE, "no CUDA context")


@pytest.mark.usefixtures("impatient", "held")
def test_strict_what_is_not_ready_is_raised_and_so_is_what_there_is_no_time_for(strict: ServedRank) -> None:
    expect_refusal(strict, dense, DENSE, "not ready")
    expect_refusal(strict, bf16, BF16, "no time is left")


def test_strict_kernels_that_cannot_be_loaded_are_raised(strict: ServedRank) -> None:
    strict.deep_gemm.failure = RuntimeError("CUDA out of memory")
    expect_refusal(strict, dense, str(target(DENSE)), "CUDA out of memory")


def test_strict_a_service_that_has_gone_is_raised(
    mortal: Node,
    cuda: CudaRuntime,
    compile_utils: ModuleType,
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(STRICT, "1")
    rank = ServedRank(tmp_path, mortal, cuda, monkeypatch)
    rank.connect(runner)
    os.kill(mortal.service, signal.SIGKILL)
    expect_refusal(rank, dense, DENSE, "the service")


# mHC's prenorm


@pytest.mark.parametrize(("num_splits", "num_groups"), [(None, 0), (1, 1), (16, 16)])
def test_the_first_prenorm_of_a_bucket_becomes_a_target(
    num_splits: int | None, num_groups: int, started: ServedRank
) -> None:
    expected = target(PRENORM, num_groups=num_groups)
    assert prenorm(num_splits=num_splits).unique().tolist() == [K]
    assert started.warmed == {expected}
    assert ms(started) == [*representatives_of(expected), 5]
    assert {call.num_splits for call in started.deep_gemm.calls} == {num_splits}


@pytest.mark.by_plugin
@pytest.mark.parametrize("num_splits", [None, 1, 16])
def test_a_prenorm_that_is_routed_becomes_the_same_target(num_splits: int | None, started: ServedRank) -> None:
    from sglang_warmstart.base.hooks import Hooks
    from sglang_warmstart.sglang.hc_prenorm import route_hc_prenorm

    hooks = Hooks("hc-prenorm")
    # Once a layer has been built, the module's own name is that of the wrapper.
    route_hc_prenorm(hooks, entrypoint, started.deep_gemm.module)
    try:
        assert prenorm(num_splits=num_splits).unique().tolist() == [K]
    finally:
        hooks.undo()
    expected = target(PRENORM, num_groups=num_splits or 0)
    assert started.warmed == {expected}
    assert ms(started) == [*representatives_of(expected), 5]


def test_later_prenorms_of_a_bucket_go_straight_to_deep_gemm(started: ServedRank) -> None:
    for _ in range(2):
        prenorm(num_splits=4)
    before = len(started.calls)
    wrapper = [] if is_patched() else ["tf32_hc_prenorm_gemm"]  # a patched SGLang has its own
    assert functions_of_ours(lambda: prenorm(num_splits=4)) == wrapper
    assert prenorm(num_splits=4).unique().tolist() == [K]
    assert len(started.calls) == before + 2
    prenorm(num_splits=8)
    assert started.warmed == {target(PRENORM, num_groups=4), target(PRENORM, num_groups=8)}


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], set[int]]:
    """SGLang's own rule, imported as a server with such a model has it: the buckets of k, as it gives them."""
    module = mhc_module()
    monkeypatch.setattr(hc_prenorm, "_RULE_IN", (module.__name__,))
    return lambda k: {module._compute_num_split_for_mhc_pre(m, k) for m in range(1, wrapped_gemms.M_MAX + 1)}


@pytest.mark.by_plugin
def test_the_first_prenorm_of_a_model_warms_all_its_buckets_at_once(
    started: ServedRank, buckets: Callable[[int], set[int]]
) -> None:
    k = 4096
    there = buckets(k)
    assert len(there) > 10
    assert prenorm(k=k, num_splits=4).unique().tolist() == [k]
    assert {each.num_groups for each in started.warmed} == there
    assert started.nvcc.compiled == compiled_for(*started.warmed)
    before, calls = started.nvcc.runs, len(started.calls)
    for num_splits in there:
        prenorm(k=k, num_splits=num_splits)
    assert started.nvcc.runs == before
    assert len(started.calls) == calls + len(there), "each is loaded, and called alone"


@pytest.mark.by_plugin
@pytest.mark.parametrize("num_splits", [None, 3])
def test_a_prenorm_that_sglangs_rule_does_not_lead_to_has_no_other_buckets(
    num_splits: int | None, started: ServedRank, buckets: Callable[[int], set[int]]
) -> None:
    assert 3 not in buckets(K)
    prenorm(num_splits=num_splits)
    assert started.warmed == {target(PRENORM, num_groups=num_splits or 0)}


# Where it is not to be


def take_back() -> None:
    from sglang_warmstart.plugin import loaded_plugin

    plugin = loaded_plugin()
    assert plugin is not None
    (installation,) = (each for each in plugin.installations if each.feature.name == FEATURE)
    installation.hooks.undo()


@pytest.mark.by_plugin
def test_taken_back_it_leaves_sglangs_own_decision(started: ServedRank) -> None:
    dense()
    before = len(started.calls)
    take_back()
    dense(n=768)
    assert ms(started)[before:] == [*SWEPT, 5]
    assert (sglang_compile_utils._maybe_compile_deep_gemm_one_type_all,) == SGLANG_MAYBE_COMPILE


@pytest.mark.by_plugin
def test_taken_back_below_another_plugins_hook_it_does_nothing(started: ServedRank) -> None:
    ours = sglang_compile_utils._maybe_compile_deep_gemm_one_type_all
    sglang_compile_utils._maybe_compile_deep_gemm_one_type_all = lambda *shape: ours(*shape)
    try:
        take_back()
        dense()
    finally:
        (sglang_compile_utils._maybe_compile_deep_gemm_one_type_all,) = SGLANG_MAYBE_COMPILE
    assert ms(started) == [*SWEPT, 5]
