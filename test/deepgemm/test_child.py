"""A target is recorded by a forked child, whatever becomes of that child."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from kit.standin_library import FLAGS, LINE_INFO, TAKEN_GPU, VERSION, definition, kernels_of
from sglang_warmstart.deepgemm.gemms import asked_values
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.record.child import RecordingOrder, RecordingProblem, record
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import KernelUse, Target

STANDIN = "kit.standin_library"
GPU = Gpu("NVIDIA H200", 132, (9, 0), 0)


def target(kernel_type: str = "GEMM_NT_F8F8BF16", n: int = 2112, m_max: int = 300) -> Target:
    return Target(kernel_type=kernel_type, n=n, k=7168, num_groups=1, num_sms=132, m_max=m_max, lhs_scale="k")


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([STANDIN])
    return found


class Recorder:
    """Records, and leaves nothing behind."""

    def __init__(self, context: ForkServerContext, directory: Path) -> None:
        self._context = context
        self._directory = directory / "children"
        self._directory.mkdir()
        self._stub = directory / "stub"
        self._stub.write_bytes(b"stub")

    def start(
        self,
        target: Target,
        *,
        gpu: Gpu = GPU,
        library: str = STANDIN,
        version: str = VERSION,
        limit_s: float = 30.0,
        stopped: Callable[[], bool] = lambda: False,
        **environment: str,
    ) -> Iterator[RecordedKernel]:
        order = RecordingOrder(target, gpu, environment, version, str(self._stub), str(self._directory), library)
        return record(self._context, order, limit_s, stopped)

    def problem(self, target: Target, **kwargs: object) -> RecordingProblem:
        with pytest.raises(RecordingProblem) as caught:
            list(self.start(target, **kwargs))  # type: ignore[arg-type]
        return caught.value

    @property
    def left(self) -> list[object]:
        """Living children and their directories."""
        return [*multiprocessing.active_children(), *self._directory.iterdir()]


@pytest.fixture
def recorder(context: ForkServerContext, tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(context, tmp_path)
    yield recorder
    assert recorder.left == []


def uses(kernels: list[RecordedKernel]) -> tuple[KernelUse, ...]:
    return tuple(sorted(KernelUse(each.m, each.directory) for each in kernels))


def test_a_target_is_recorded_as_its_definition_says(recorder: Recorder) -> None:
    found = list(recorder.start(target()))
    assert uses(found) == definition(target())
    assert [use.m for use in definition(target())] == [1, 1, 17, 33, 65, 129]
    expected = {kernel.directory: kernel.source for m in target().m_values for kernel in kernels_of(target(), m)}
    assert {each.directory: each.source for each in found} == expected


def test_targets_that_share_a_kernel_both_list_it(recorder: Recorder) -> None:
    both = [target(n=2112), target(n=7168)]
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda each: uses(list(recorder.start(each))), both))
    assert found == [definition(each) for each in both]
    assert {use.directory for use in found[0]} == {use.directory for use in found[1]}


def test_a_gemm_whose_kernel_does_not_depend_on_m_is_asked_for_the_ends_of_its_range(recorder: Recorder) -> None:
    prenorm = target("TF32_HC_PRENORM_GEMM")
    assert tuple(asked_values(prenorm)) == (1, prenorm.m_max)
    assert uses(list(recorder.start(prenorm))) == definition(prenorm)


def test_kernels_come_while_the_sweep_goes_on(recorder: Recorder) -> None:
    kernels = recorder.start(target("a GEMM that hangs at 34"))
    assert {next(kernels).m, next(kernels).m, next(kernels).m, next(kernels).m} == {1, 17, 33}
    kernels.close()  # type: ignore[attr-defined]


def test_one_who_has_heard_enough_ends_the_child(recorder: Recorder) -> None:
    kernels = recorder.start(target("a GEMM that hangs at 2"))
    next(kernels)
    assert len(recorder.left) == 2
    kernels.close()  # type: ignore[attr-defined]
    assert recorder.left == []


def test_a_child_has_the_variables_of_its_order(recorder: Recorder) -> None:
    assert {each.flags for each in recorder.start(target(), DG_JIT_WITH_LINEINFO="1")} == {FLAGS + LINE_INFO}
    assert {each.flags for each in recorder.start(target())} == {FLAGS}


@pytest.mark.parametrize(
    ("kernel_type", "reason"),
    [
        ("a GEMM that raises at 20", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("a GEMM that exits at 20", "the recording process ended without a word (exit code 7)"),
        ("a GEMM that is killed at 20", "the recording process ended without a word (exit code -9)"),
        (
            "a GEMM that cannot be called",
            "ValueError: the installed DeepGEMM has no a GEMM that cannot be called",
        ),
    ],
)
def test_a_child_that_fails_says_why_in_one_line(recorder: Recorder, kernel_type: str, reason: str) -> None:
    problem = recorder.problem(target(kernel_type))
    assert str(problem) == reason
    assert not problem.failed.no_context


def test_a_gpu_without_a_context_to_give_is_the_cause(recorder: Recorder) -> None:
    problem = recorder.problem(target(), gpu=Gpu(TAKEN_GPU, 132, (9, 0), 0))
    assert str(problem) == (
        "no CUDA context for recording: CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    )
    assert problem.failed.no_context


def test_a_library_that_is_not_there_is_named(recorder: Recorder) -> None:
    assert str(recorder.problem(target(), library="no_such_library")) == (
        "ModuleNotFoundError: No module named 'no_such_library'"
    )


def test_a_compiler_that_deep_gemm_does_not_know_fails_with_its_reason(recorder: Recorder) -> None:
    assert str(recorder.problem(target(), version="clang 17\n")) == (
        "ValueError: no release in what the compiler prints for --version: 'clang 17'"
    )


def test_a_child_that_hangs_is_ended_when_its_time_is_up(recorder: Recorder) -> None:
    start = time.monotonic()
    problem = recorder.problem(target("a GEMM that hangs at 20"), limit_s=1.5)
    assert str(problem) == "recording was ended after 1.5 s"
    assert time.monotonic() - start < 5


def test_a_child_is_ended_when_the_service_stops(recorder: Recorder) -> None:
    end = time.monotonic() + 0.5
    start = time.monotonic()
    recorder.problem(target("a GEMM that hangs at 20"), stopped=lambda: time.monotonic() > end)
    assert time.monotonic() - start < 3


def test_the_next_child_does_not_suffer_from_the_one_before(recorder: Recorder) -> None:
    recorder.problem(target("a GEMM that is killed at 1"))
    assert uses(list(recorder.start(target()))) == definition(target())
