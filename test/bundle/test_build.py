"""All kernels of a plan are compiled or said to have failed, each of them once, whatever the others come to."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.compile_runs import small_deep_gemm, small_plan
from kit.fake_nvcc import FakeNvcc, cubin_of
from kit.plans import real_plan
from kit.recorded import real_cubin, recording
from kit.scripted_compiler import write_compiler
from kit.toolchain import toolchain
from sglang_warmstart.bundle import build as compiling
from sglang_warmstart.bundle.build import Cubin, PortableJob, check_here, compile_all, compile_portable
from sglang_warmstart.bundle.toolchain import Pinned
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.compiler import CompileJob, CompilerError, compile_kernel
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.node.pool import size_of


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self, then: Callable[[str], None] = lambda name: None) -> None:
        self.good: dict[str, bytes] = {}
        self.bad: dict[str, str] = {}
        self.times: Counter[str] = Counter()
        self.threads: set[int] = set()
        self._then = then

    def compiled(self, name: str, kernel: Cubin) -> None:
        self.good[name] = kernel.data
        self._count(name)

    def failed(self, name: str, reason: str) -> None:
        self.bad[name] = reason
        self._count(name)

    def _count(self, name: str) -> None:
        self.times[name] += 1
        self.threads.add(threading.get_ident())
        self._then(name)


@cache
def _plan(count: int) -> Plan:
    with tempfile.TemporaryDirectory() as directory:
        return small_plan(small_deep_gemm(Path(directory)), count)


def _number(job: PortableJob) -> int:
    found = re.match(r"// (\d+)\n", job.source)
    assert found is not None
    return int(found.group(1))


def _cubin(job: PortableJob) -> Cubin:
    return Cubin(job.source.encode(), 0.5, "here")


def _name(plan: Plan, number: int) -> str:
    return next(name for name in plan.kernels if name.startswith(f"kernel.k{number}."))


# In which order, and what comes of each


def test_the_largest_is_the_first_to_be_begun() -> None:
    plan, begun = _plan(6), []

    def compile_one(job: PortableJob) -> Cubin:
        begun.append(job.source)
        return _cubin(job)

    with ThreadPoolExecutor(1) as executor:
        compile_all(plan, plan.kernels, executor, Told(), compile_one=compile_one)
    assert begun == sorted((each.source for each in plan.kernels.values()), key=size_of, reverse=True)
    assert size_of(begun[0]) > size_of(begun[-1])


def test_a_job_has_all_that_another_machine_needs() -> None:
    plan, jobs = _plan(1), []

    def compile_one(job: PortableJob) -> Cubin:
        jobs.append(job)
        return _cubin(job)

    with ThreadPoolExecutor(1) as executor:
        compile_all(
            plan, plan.kernels, executor, Told(), nvcc="/opt/nvcc", deep_gemm="/opt/dg", compile_one=compile_one
        )
    (job,), (kernel,) = jobs, plan.kernels.values()
    assert (job.source, job.flags) == (kernel.source, "-O3 -I{include}")
    assert (job.pinned, job.nvcc, job.deep_gemm) == (Pinned.of(plan), "/opt/nvcc", "/opt/dg")


def test_only_the_kernels_that_are_named_are_compiled() -> None:
    plan, told = _plan(6), Told()
    wanted = list(plan.kernels)[1:3]
    with ThreadPoolExecutor(2) as executor:
        compile_all(plan, wanted, executor, told, compile_one=_cubin)
    assert sorted(told.good) == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(
    outcomes=st.lists(st.sampled_from(["cubin", "words", "no words", "late"]), max_size=9), workers=st.integers(1, 4)
)
def test_each_is_told_once_from_one_thread_as_what_it_is(outcomes: list[str], workers: int) -> None:
    plan, told = _plan(9), Told()
    by_name = dict(zip(plan.kernels, outcomes, strict=False))
    of_source = {plan.kernels[name].source: outcome for name, outcome in by_name.items()}

    def compile_one(job: PortableJob) -> Cubin:
        outcome = of_source[job.source]
        if outcome == "late":
            time.sleep(0.002)
        elif outcome != "cubin":
            raise CompilerError("no luck" if outcome == "words" else "")
        return _cubin(job)

    with ThreadPoolExecutor(workers) as executor:
        compile_all(plan, by_name, executor, told, compile_one=compile_one)
    assert told.times == Counter(list(by_name))
    assert told.threads <= {threading.get_ident()}
    assert told.good == {
        name: plan.kernels[name].source.encode() for name, outcome in by_name.items() if outcome in ("cubin", "late")
    }
    words = {"words": "no luck", "no words": "CompilerError"}
    assert told.bad == {name: words[outcome] for name, outcome in by_name.items() if outcome in words}


# Ends before its time


@settings(max_examples=30, deadline=None)
@given(after=st.integers(1, 6), workers=st.integers(1, 3), error=st.sampled_from([KeyboardInterrupt, OSError]))
def test_what_waits_is_dropped_when_the_watcher_has_enough(
    after: int, workers: int, error: type[BaseException]
) -> None:
    plan, begun = _plan(9), Counter[int]()
    enough = threading.Event()

    def compile_one(job: PortableJob) -> Cubin:
        begun[_number(job)] += 1
        # Those that come after it would go on for ever if they were begun.
        assert sum(begun.values()) <= after or enough.wait(20)
        return _cubin(job)

    def then(name: str) -> None:
        if len(told.times) == after:
            raise error

    told = Told(then)
    with ThreadPoolExecutor(workers) as executor:
        with pytest.raises(error):
            compile_all(plan, plan.kernels, executor, told, compile_one=compile_one)
        enough.set()
    assert sum(begun.values()) <= after + workers
    assert max(told.times.values()) == 1


def test_what_has_ended_while_the_watcher_was_busy_is_told_after_ctrl_c() -> None:
    plan, others = _plan(6), threading.Barrier(2)
    last = _name(plan, 1)  # the smallest

    def compile_one(job: PortableJob) -> Cubin:
        if _number(job) == 1:
            others.wait(20)
        return _cubin(job)

    def busy(name: str) -> None:
        if len(told.times) == 1:
            # All but the last are done by now: one thread compiles them in turn.
            others.wait(20)
            raise KeyboardInterrupt

    told = Told(busy)
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        compile_all(plan, plan.kernels, executor, told, compile_one=compile_one)
    assert told.times.keys() >= plan.kernels.keys() - {last}
    assert max(told.times.values()) == 1


# One kernel, by what is on this machine


def _job(plan: Plan, name: str, **paths: str | None) -> PortableJob:
    kernel = plan.kernels[name]
    return PortableJob(kernel.source, plan.flags[kernel.flags], Pinned.of(plan), **paths)  # type: ignore[arg-type]


def test_the_real_compiler_makes_the_kernel_of_a_plan_from_elsewhere() -> None:
    plan = real_plan((("TF32_HC_PRENORM_GEMM", 24, 28672),), deep_gemm=Path("/somewhere/else/deep_gemm"))
    name = min(plan.kernels, key=lambda each: size_of(plan.kernels[each].source))
    found = toolchain()
    made = compile_portable(_job(plan, name, nvcc=str(found.nvcc), deep_gemm=str(found.deep_gemm)))
    assert cubin.defect_of(made.data) is None and not stub.is_stub(made.data)
    assert name.split(".")[1].encode() in made.data
    assert made.worker == f"{os.uname().nodename}:{os.getpid()}"
    assert 0.1 < made.seconds < 120


def test_the_compiler_is_given_this_machines_headers(tmp_path: Path) -> None:
    nvcc, deep_gemm = FakeNvcc(tmp_path / "cuda"), small_deep_gemm(tmp_path / "here")
    plan = small_plan(small_deep_gemm(tmp_path / "there"), 1)
    (name,) = plan.kernels
    made = compile_portable(_job(plan, name, nvcc=str(nvcc.path), deep_gemm=str(deep_gemm)))
    assert made.data == cubin_of(plan.kernels[name].source, f"-O3 -I{deep_gemm}/include")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no luck today >&2; (exit 2)", "exit status 2: no luck today"),
        ("true", "it left no cubin"),
        (': > "$cubin"', "what the compiler left is no cubin: empty"),
        (
            'head -c 1500 {real} > "$cubin"',
            r"what the compiler left is no cubin: truncated: 1500 of at least \d+ bytes",
        ),
        ('cp "$source" "$cubin"', "what the compiler left is no cubin: not a 64-bit ELF file"),
        ('cp {stub} "$cubin"', "what the compiler left is no cubin: a recorder's stub"),
    ],
    ids=["fails", "leaves nothing", "leaves an empty file", "leaves half a file", "leaves no cubin", "leaves a stub"],
)
def test_what_is_no_whole_kernel_is_refused(tmp_path: Path, body: str, reason: str) -> None:
    real, stub_ = tmp_path / "real", tmp_path / "stub"
    real.write_bytes(real_cubin())
    stub_.write_bytes(_real_stub())
    directory = tmp_path / "cuda"
    directory.mkdir()
    write_compiler(directory, body.format(real=shlex.quote(str(real)), stub=shlex.quote(str(stub_))))
    deep_gemm = small_deep_gemm(tmp_path)
    plan = small_plan(deep_gemm, 1)
    (name,) = plan.kernels
    with pytest.raises(CompilerError, match=reason):
        compile_portable(_job(plan, name, nvcc=str(directory / "nvcc"), deep_gemm=str(deep_gemm)))


@cache
def _real_stub() -> bytes:
    flags = " ".join(stub.flags_for((9, 0)))
    return compile_kernel(CompileJob(stub.SOURCE, flags, toolchain().compiler(), 60))


def test_a_compiler_that_hangs_is_ended(tmp_path: Path) -> None:
    nvcc, deep_gemm = FakeNvcc(tmp_path / "cuda"), small_deep_gemm(tmp_path)
    nvcc.on_each_kernel("sleep 1000 & wait")
    plan = small_plan(deep_gemm, 1)
    job = PortableJob("// 1", "-O3", Pinned.of(plan), str(nvcc.path), str(deep_gemm), limit_s=0.3)
    with pytest.raises(CompilerError, match=r"was ended after 0\.3 s"):
        compile_portable(job)


# Whether this machine may


def _other_version(nvcc: Path, release: str) -> None:
    text = re.sub(r"V\d+\.\d+\.\d+", f"V{release}", recording().compiler)
    (nvcc.parent / "version").write_text(text)


def test_a_machine_with_another_compiler_compiles_nothing_even_if_nobody_has_asked_it_before(tmp_path: Path) -> None:
    # A worker that joins a cluster later on.
    nvcc, deep_gemm = FakeNvcc(tmp_path / "cuda"), small_deep_gemm(tmp_path)
    _other_version(nvcc.path, "13.0.99")
    plan = small_plan(deep_gemm, 1)
    (name,) = plan.kernels
    with pytest.raises(CompilerError) as caught:
        compile_portable(_job(plan, name, nvcc=str(nvcc.path), deep_gemm=str(deep_gemm)))
    assert f"{os.uname().nodename}:{os.getpid()}: the plan is for nvcc 13.0.88, " in str(caught.value)
    assert "is nvcc 13.0.99" in str(caught.value)
    assert not nvcc.runs


def test_the_answer_of_a_machine_is_never_an_old_one(tmp_path: Path) -> None:
    nvcc, deep_gemm = FakeNvcc(tmp_path / "cuda"), small_deep_gemm(tmp_path)
    pinned = Pinned.of(small_plan(deep_gemm, 1))
    assert check_here(pinned, str(nvcc.path), str(deep_gemm)) == ""
    _other_version(nvcc.path, "13.0.99")
    assert "is nvcc 13.0.99" in check_here(pinned, str(nvcc.path), str(deep_gemm))
    _other_version(nvcc.path, "13.0.88")
    assert check_here(pinned, str(nvcc.path), str(deep_gemm)) == ""
    (deep_gemm / "include" / "deep_gemm" / "some.cuh").write_text("// 2\n")
    assert "(headers " in check_here(pinned, str(nvcc.path), str(deep_gemm))
    assert "/nowhere has no include/deep_gemm" in check_here(pinned, str(nvcc.path), "/nowhere")


def test_the_version_is_asked_for_once_and_not_for_each_kernel(tmp_path: Path) -> None:
    nvcc, deep_gemm = FakeNvcc(tmp_path / "cuda"), small_deep_gemm(tmp_path)
    script, asked = nvcc.path.read_text(), tmp_path / "asked"
    nvcc.path.write_text(script.replace("then exec cat", f"then echo once >> {shlex.quote(str(asked))}; exec cat", 1))
    plan, told = small_plan(deep_gemm, 5), Told()
    assert compiling.check_here(Pinned.of(plan), str(nvcc.path), str(deep_gemm)) == ""
    with ThreadPoolExecutor(2) as executor:
        compile_all(plan, plan.kernels, executor, told, nvcc=str(nvcc.path), deep_gemm=str(deep_gemm))
    assert len(told.good) == 5
    assert asked.read_text().splitlines() == ["once"]
