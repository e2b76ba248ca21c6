"""Loading: each representative is called once, and the process is as it was apart from its kernels."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kit.gpu_standins import CudaOnCpu, CudaRuntime, DeepGemm
from sglang_warmstart.deepgemm import gemms
from sglang_warmstart.deepgemm.gemms import RealRoom
from sglang_warmstart.deepgemm.load import Loaded, load
from sglang_warmstart.deepgemm.marker import TargetKernels
from sglang_warmstart.deepgemm.target import KernelUse, Target

PLENTY = 1 << 40
MS = (1, 33, 65, 300)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaRuntime]:
    with CudaOnCpu():
        yield CudaRuntime(monkeypatch)


@pytest.fixture
def deep_gemm(cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    deep_gemm = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm.module)
    return deep_gemm


def bf16(n: int, *ms: int, num_sms: int = 132) -> TargetKernels:
    """A target and a kernel for each of some Ms."""
    target = Target(kernel_type="GEMM_NT_BF16BF16F32", n=n, k=64, num_groups=1, num_sms=num_sms, m_max=16384)
    return TargetKernels(target, tuple(KernelUse(m, f"kernel.gemm.{m:032x}") for m in ms or MS))


def calls(deep_gemm: DeepGemm) -> list[tuple[int, int]]:
    """(n, m) of each call."""
    return [(call.shapes[1][0], call.m) for call in deep_gemm.calls]


def test_each_representative_of_each_target_is_called_once(deep_gemm: DeepGemm) -> None:
    loaded = load([bf16(24), bf16(48)], lambda: PLENTY)
    assert calls(deep_gemm) == [(24, m) for m in MS] + [(48, m) for m in MS]
    assert (loaded.calls, loaded.left_out, loaded.failed) == (2 * len(MS), [], [])
    assert loaded.seconds > 0


def test_kernels_with_the_same_representative_need_one_call(deep_gemm: DeepGemm) -> None:
    transposed = KernelUse(33, "kernel.transpose.0123456789abcdef0123456789abcdef")
    each = bf16(24)
    assert load([TargetKernels(each.target, (*each.kernels, transposed))], lambda: PLENTY).calls == len(MS)
    assert calls(deep_gemm) == [(24, m) for m in MS]


def test_nothing_is_nothing(deep_gemm: DeepGemm) -> None:
    loaded = load([], lambda: PLENTY)
    assert loaded == Loaded(seconds=loaded.seconds)
    assert deep_gemm.calls == []


def test_each_target_has_its_number_of_sms_and_afterwards_it_is_what_it_was(deep_gemm: DeepGemm) -> None:
    deep_gemm.num_sms = 120
    load([bf16(24, 1, num_sms=132), bf16(48, 1, num_sms=78)], lambda: PLENTY)
    assert [call.num_sms for call in deep_gemm.calls] == [132, 78]
    assert deep_gemm.num_sms == 120


def test_all_kernels_have_run_when_it_returns(deep_gemm: DeepGemm, cuda: CudaRuntime) -> None:
    load([bf16(24), bf16(48)], lambda: PLENTY)
    assert cuda.synchronizations == 2


def test_what_does_not_fit_is_left_out_and_said(deep_gemm: DeepGemm) -> None:
    small, large = bf16(24), bf16(4096)
    room = gemms.real_bytes(large.target, 65)  # too little for M = 300
    loaded = load([small, large], lambda: room)
    assert calls(deep_gemm) == [(24, m) for m in MS] + [(4096, m) for m in MS[:-1]]
    assert loaded.left_out == [(large.target, 300, gemms.real_bytes(large.target, 300))]


def test_where_nothing_fits_nothing_is_called(deep_gemm: DeepGemm) -> None:
    loaded = load([bf16(24)], lambda: 0)
    assert deep_gemm.calls == []
    assert loaded.left_out == [(bf16(24).target, 1, gemms.real_bytes(bf16(24).target, 1))]


def test_the_free_memory_is_asked_for_each_target_anew(deep_gemm: DeepGemm) -> None:
    free = iter([0, PLENTY])
    loaded = load([bf16(24), bf16(48)], lambda: next(free))
    assert calls(deep_gemm) == [(48, m) for m in MS]
    assert [target for target, *_ in loaded.left_out] == [bf16(24).target]


def test_a_target_that_fails_is_named_and_the_others_are_loaded(deep_gemm: DeepGemm) -> None:
    deep_gemm.num_sms = 120
    deep_gemm.failure = failure = RuntimeError("CUDA out of memory")
    loaded = load([bf16(24), bf16(48)], lambda: PLENTY)
    assert loaded.failed == [(bf16(24).target, failure)]
    assert calls(deep_gemm) == [(48, m) for m in MS]
    assert loaded.calls == len(MS)
    assert deep_gemm.num_sms == 120


def test_an_interrupt_is_none_of_its_business(deep_gemm: DeepGemm) -> None:
    deep_gemm.num_sms = 120
    deep_gemm.failure = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        load([bf16(24), bf16(48)], lambda: PLENTY)
    assert deep_gemm.num_sms == 120


def test_a_target_takes_no_memory_when_the_next_one_is_prepared_and_the_last_none_at_all(
    deep_gemm: DeepGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive_at_first_use: list[int] = []
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    emptied: list[int] = []

    class Watched(RealRoom):
        def __init__(self) -> None:
            super().__init__()
            alive_at_first_use.append(len(made))

        def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
            tensor = super().operand(shape, dtype, rows)
            made.add(tensor)
            return tensor

    monkeypatch.setattr(gemms, "RealRoom", Watched)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(made)))
    gc.disable()  # nothing is to wait for it
    try:
        load([bf16(24), bf16(48), bf16(96)], lambda: PLENTY)
    finally:
        gc.enable()
    assert alive_at_first_use == [0, 0, 0]
    assert emptied == [0]


def test_an_unknown_kernel_type_in_a_marker_is_a_failure_of_its_target(deep_gemm: DeepGemm) -> None:
    target = Target(kernel_type="A_GEMM_OF_TOMORROW", n=24, k=64, num_groups=1, num_sms=132, m_max=64)
    loaded = load([TargetKernels(target, bf16(24).kernels), bf16(48)], lambda: PLENTY)
    assert [each for each, _ in loaded.failed] == [target]
    assert calls(deep_gemm) == [(48, m) for m in MS]
