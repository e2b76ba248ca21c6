"""Each kernel is compiled once, however many want it, and whatever the compiler and the disk do."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import signal
import tempfile
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.compiling import CompilingProcess, Order, Outcome, Tally, compile_all, compile_in_processes
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from kit.node import wait_until
from kit.recorded import real_cubin, recording
from kit.scripted_compiler import ScriptedCompiler, is_alive, wait_until_gone, write_compiler, write_copying_compiler
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import CompileJob, Compiler, compile_kernel
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.node.pool import CompilePool, KernelError, Places, RenewedExecutor, size_of

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())


def _kernels(count: int) -> tuple[RecordedKernel, ...]:
    include = toolchain().include
    return tuple(recording().relocated(directory, include) for directory in list(recording().kernels)[:count])


def _compile(tmp_path: Path, compiler: ScriptedCompiler, count: int = 1, limit_s: float = 20.0) -> Outcome:
    return compile_all(Order(tmp_path / "root", compiler.compiler, _kernels(count), limit_s=limit_s))


def _only_error(outcome: Outcome) -> str:
    assert outcome.compiled == 0
    (error,) = outcome.errors
    return error


def _nothing_is_visible(root: Path) -> bool:
    """Neither a kernel nor a part of one, nor what was on the way to be one."""
    return not list(root.glob("cache/*")) and not list(root.glob("tmp/*"))


# What it is for


def test_two_recorded_kernels_compile_side_by_side_with_the_real_compiler(tmp_path: Path) -> None:
    include = toolchain().include
    transpose, gemm = recording().named("transpose_fp32", include)[0], recording().named("sm90_bf16_gemm", include)[0]
    order = Order(tmp_path, toolchain().compiler(), (transpose, gemm))
    assert compile_all(order) == Outcome(compiled=2)
    cache = KernelCache(tmp_path)
    for kernel, entry in ((transpose, b"transpose_fp32"), (gemm, b"sm90_bf16_gemm_impl")):
        assert (cache.path(kernel.directory) / "kernel.cu").read_bytes() == kernel.source.encode()
        compiled = (cache.path(kernel.directory) / "kernel.cubin").read_bytes()
        assert cubin.defect_of(compiled) is None
        assert entry in compiled
    assert compile_all(order) == Outcome(compiled=0)


def test_kernels_of_another_install_path_of_deep_gemm_are_compiled_anew(tmp_path: Path) -> None:
    compiler = write_copying_compiler(tmp_path)
    elsewhere = tmp_path / "elsewhere" / "include"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(toolchain().include)
    here, there = (
        tuple(recording().relocated(directory, include) for directory in list(recording().kernels)[:3])
        for include in (toolchain().include, elsewhere)
    )
    for kernels in (here, there):
        assert compile_all(Order(tmp_path / "root", compiler.compiler, kernels)).compiled == 3
        assert compile_all(Order(tmp_path / "root", compiler.compiler, kernels)).compiled == 0
    assert len(compiler.starts) == 6


def test_a_kernel_that_many_ask_for_is_compiled_once(tmp_path: Path) -> None:
    compiler, tally = write_copying_compiler(tmp_path, seconds=0.2), Tally()
    outcome = compile_all(Order(tmp_path / "root", compiler.compiler, _kernels(2) * 10), tally)
    assert outcome == Outcome(compiled=2)
    assert len(compiler.starts) == 2
    assert tally.wanted == tally.done == 2


def test_eight_processes_that_race_for_four_kernels_compile_four_times_in_all(tmp_path: Path) -> None:
    compiler = write_copying_compiler(tmp_path, seconds=0.3)
    order = Order(tmp_path / "root", compiler.compiler, _kernels(4))
    outcomes = compile_in_processes([order] * 8)
    assert len(compiler.starts) == 4
    assert sum(outcome.compiled for outcome in outcomes) == 4
    assert not any(outcome.errors for outcome in outcomes)
    assert all(KernelCache(order.cache).has(kernel.directory) for kernel in order.kernels)


def test_two_processes_share_the_work_of_one_cache(tmp_path: Path) -> None:
    """The first one has asked for all of it before the second one comes; what waits for a core is not its own yet."""
    compiler = write_copying_compiler(tmp_path, seconds=0.3)
    order = Order(tmp_path / "root", compiler.compiler, _kernels(10), workers=1)
    with CompilingProcess() as first, CompilingProcess() as second:
        for process in (first, second):
            process.wait_until_ready()
        first.give(order)
        compiler.wait_for_start()
        second.give(order)
        compiled = [process.outcome().compiled for process in (first, second)]
    assert sum(compiled) == len(compiler.starts) == 10
    assert min(compiled) >= 3
    assert compiler.most_at_once == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_compilers_run_at_once_than_the_executor_has_places_for(tmp_path: Path, workers: int) -> None:
    compiler = write_copying_compiler(tmp_path, seconds=0.1)
    compile_all(Order(tmp_path / "root", compiler.compiler, _kernels(6), workers))
    assert compiler.most_at_once == workers


def test_the_largest_kernel_that_waits_is_the_next(tmp_path: Path) -> None:
    # It would else be the last to end, with all other compilers idle.
    order, real = (shlex.quote(str(tmp_path / name)) for name in ("order", "real.cubin"))
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    compiler = write_compiler(tmp_path, f'sha256sum < "$source" >> {order}; cp {real} "$cubin"')
    kernels = {hashlib.sha256(kernel.source.encode()).hexdigest(): kernel for kernel in _kernels(8)}
    compile_all(Order(tmp_path / "root", compiler.compiler, tuple(kernels.values()), workers=1))
    # The first is the one of which it is first known that the cache does not have it.
    first, *others = (kernels[line.split()[0]] for line in (tmp_path / "order").read_text().splitlines())
    assert {first, *others} == {*kernels.values()}
    assert others == sorted(others, key=lambda kernel: -size_of(kernel.source))


def test_what_a_rank_waits_for_goes_before_what_takes_longer(tmp_path: Path) -> None:
    order, real, gate = (shlex.quote(str(tmp_path / name)) for name in ("order", "real.cubin", "gate"))
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    body = f'sha256sum < "$source" >> {order}; until [ -e {gate} ]; do sleep 0.05; done; cp {real} "$cubin"'
    compiler, cache = write_compiler(tmp_path, body), KernelCache(tmp_path / "root")
    first, *others = sorted(_kernels(6), key=lambda kernel: -size_of(kernel.source))
    *longer, short, shared = others

    async def ensure_all() -> None:
        with ThreadPoolExecutor(1) as executor:
            pool = CompilePool(executor, cache, compiler.compiler, Tally(), 20, Places(1))
            tasks = [asyncio.create_task(pool.ensure(first, "planned"))]
            await asyncio.to_thread(wait_until, (tmp_path / "order").exists)
            tasks += [asyncio.create_task(pool.ensure(kernel, "planned")) for kernel in (*longer, shared)]
            pool.hurry("awaited")
            # Also one that is another target's too, and that one was asked for first.
            tasks += [asyncio.create_task(pool.ensure(kernel, "awaited")) for kernel in (short, shared)]
            await asyncio.sleep(0.2)  # for all of them to be found missing
            (tmp_path / "gate").touch()
            await asyncio.gather(*tasks)

    asyncio.run(ensure_all())
    names = {hashlib.sha256(kernel.source.encode()).hexdigest(): kernel for kernel in (first, *others)}
    compiled = [names[line.split()[0]] for line in (tmp_path / "order").read_text().splitlines()]
    assert compiled == [first, short, shared, *longer]


def test_a_waiter_that_gives_up_takes_nothing_from_the_others(tmp_path: Path) -> None:
    compiler = write_copying_compiler(tmp_path, seconds=0.3)
    cache = KernelCache(tmp_path / "root")
    (kernel,) = _kernels(1)

    async def two_waiters() -> None:
        with ThreadPoolExecutor() as executor:
            pool = CompilePool(executor, cache, compiler.compiler, Tally(), 20, Places(2))
            patient = asyncio.create_task(pool.ensure(kernel))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.ensure(kernel), 0.05)
            await patient

    asyncio.run(two_waiters())
    assert len(compiler.starts) == 1
    assert cache.has(kernel.directory)


def test_the_watcher_hears_of_every_kernel_once(tmp_path: Path) -> None:
    good, bad = write_copying_compiler(tmp_path), write_compiler(_directory(tmp_path / "bad"), "(exit 1)")
    kernels = _kernels(4)
    tally = Tally()
    compile_all(Order(tmp_path / "root", good.compiler, kernels[:2]), tally)
    assert (tally.wanted, tally.given, tally.ran, tally.done) == (2, 2, 2, 2)
    # The two that are there are no work, and those that fail are done as well.
    compile_all(Order(tmp_path / "root", bad.compiler, kernels), tally)
    assert (tally.wanted, tally.given, tally.ran, tally.done) == (4, 4, 4, 4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    asked=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    there=st.sets(st.integers(0, 3)),
    broken=st.sets(st.integers(0, 3)),
    workers=st.integers(1, 4),
)
def test_whatever_is_asked_for_is_there_afterwards_and_nothing_is_compiled_in_vain(
    tmp_path_factory: pytest.TempPathFactory, asked: list[int], there: set[int], broken: set[int], workers: int
) -> None:
    directory = tmp_path_factory.mktemp("pool")
    compiler, cache, kernels = write_copying_compiler(directory), KernelCache(directory / "root"), _kernels(4)
    for i in there:
        cache.publish(kernels[i].directory, kernels[i].source, real_cubin())
    for i in broken - there:
        _directory(cache.path(kernels[i].directory)).joinpath("kernel.cu").write_text("half")
    outcome = compile_all(Order(cache.root, compiler.compiler, tuple(kernels[i] for i in asked), workers))
    assert outcome == Outcome(compiled=len(set(asked) - there))
    assert len(compiler.starts) == len(set(asked) - there)
    assert all(cache.has(kernels[i].directory) for i in asked)


def _directory(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


# A compiler that does not do its work

_STUB_FLAGS = " ".join(stub.flags_for((9, 0)))


def _stub_in(directory: Path) -> str:
    path = directory / "stub.cubin"
    path.write_bytes(compile_kernel(CompileJob(stub.SOURCE, _STUB_FLAGS, toolchain().compiler(), 60)))
    return shlex.quote(str(path))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no luck today >&2; (exit 2)", "exit status 2: no luck today"),
        ("kill -KILL $$", "SIGKILL: it said nothing"),
        ("true", "it left no cubin"),
        (': > "$cubin"', "the cubin is not published: empty"),
        ('head -c 5000 {real} > "$cubin"', "the cubin is not published: truncated: 5000 of at least [0-9]+ bytes"),
        ('cp {stub} "$cubin"', "the cubin is not published: a recorder's stub"),
    ],
    ids=["fails", "is killed", "leaves nothing", "leaves an empty file", "leaves half a file", "leaves a stub"],
)
def test_a_compiler_that_does_not_do_its_work_is_named_with_its_words_and_leaves_no_trace(
    tmp_path: Path, body: str, reason: str
) -> None:
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    body = body.format(real=shlex.quote(str(tmp_path / "real.cubin")), stub=_stub_in(tmp_path))
    error = _only_error(_compile(tmp_path, write_compiler(tmp_path, body)))
    (kernel,) = _kernels(1)
    assert error.startswith(f"{kernel.directory}: ")
    assert re.search(reason, error)
    assert _nothing_is_visible(tmp_path / "root")


def test_a_compiler_that_hangs_is_ended_and_the_kernel_named(tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, "sleep 300 & wait")
    error = _only_error(_compile(tmp_path, compiler, limit_s=0.5))
    assert error.startswith(_kernels(1)[0].directory)
    assert error.endswith("was ended after 0.5 s")
    assert wait_until_gone(compiler.starts) == []
    assert _nothing_is_visible(tmp_path / "root")


def test_a_compiler_that_is_not_there_is_said(tmp_path: Path) -> None:
    nowhere = Compiler(str(tmp_path / "nvcc"), recording().compiler)
    outcome = compile_all(Order(tmp_path / "root", nowhere, _kernels(1)))
    assert "No such file or directory" in _only_error(outcome)
    assert _nothing_is_visible(tmp_path / "root")


def test_one_kernel_that_fails_keeps_no_other_from_being_compiled(tmp_path: Path) -> None:
    real = shlex.quote(str(tmp_path / "real.cubin"))
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    bad, *good = _kernels(4)
    (tmp_path / "bad.cu").write_text(bad.source)
    body = f'if cmp -s "$source" {shlex.quote(str(tmp_path / "bad.cu"))}; then (exit 1); else cp {real} "$cubin"; fi'
    outcome = compile_all(Order(tmp_path / "root", write_compiler(tmp_path, body).compiler, (bad, *good)))
    assert outcome.compiled == 3
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith(bad.directory)
    assert all(KernelCache(tmp_path / "root").has(kernel.directory) for kernel in good)


def test_a_kernel_that_failed_is_tried_again_when_it_is_asked_for_again(tmp_path: Path) -> None:
    real, tried = (shlex.quote(str(tmp_path / name)) for name in ("real.cubin", "tried"))
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    compiler = write_compiler(tmp_path, f'if [ -e {tried} ]; then cp {real} "$cubin"; else : > {tried}; (exit 1); fi')
    (kernel,) = _kernels(1)

    async def ask_twice() -> None:
        with ThreadPoolExecutor(1) as executor:
            pool = CompilePool(executor, KernelCache(tmp_path / "root"), compiler.compiler, Tally(), 20, Places(1))
            with pytest.raises(KernelError, match="exit status 1"):
                await pool.ensure(kernel)
            await pool.ensure(kernel)

    asyncio.run(ask_twice())
    assert KernelCache(tmp_path / "root").has(kernel.directory)


def test_a_worker_process_that_dies_is_an_error_of_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nobody tidies up behind it
    # Where compilers live in the workers themselves, as NVRTC does, memory that runs short ends a worker.
    compiler = write_compiler(tmp_path, "kill -KILL $PPID")
    (kernel,) = _kernels(1)

    async def ensure() -> None:
        with ProcessPoolExecutor(1) as executor:
            pool = CompilePool(executor, KernelCache(tmp_path / "root"), compiler.compiler, Tally(), 20, Places(1))
            await pool.ensure(kernel)

    with pytest.raises(KernelError, match=rf"{kernel.directory}: .*terminated abruptly"):
        asyncio.run(ensure())


def test_after_a_worker_process_has_died_the_next_kernel_is_compiled_by_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nobody tidies up behind it
    real, tried = (shlex.quote(str(tmp_path / name)) for name in ("real.cubin", "tried"))
    (tmp_path / "real.cubin").write_bytes(real_cubin())
    body = f'if [ -e {tried} ]; then cp {real} "$cubin"; else : > {tried}; kill -KILL $PPID; fi'
    compiler, cache, (first, second) = write_compiler(tmp_path, body), KernelCache(tmp_path / "root"), _kernels(2)

    async def ensure_both() -> None:
        with RenewedExecutor(lambda: ProcessPoolExecutor(1)) as executor:
            pool = CompilePool(executor, cache, compiler.compiler, Tally(), 20, Places(1))
            with pytest.raises(KernelError, match="terminated abruptly"):
                await pool.ensure(first)
            await pool.ensure(second)
            await pool.ensure(first)

    asyncio.run(ensure_both())
    assert cache.has(first.directory) and cache.has(second.directory)
    assert len(compiler.starts) == 3


def test_an_executor_that_was_shut_down_is_not_renewed() -> None:
    executor = RenewedExecutor(lambda: ProcessPoolExecutor(1))
    with pytest.raises(BrokenExecutor):
        executor.submit(os._exit, 1).result()
    executor.shutdown()
    with pytest.raises(BrokenExecutor):
        executor.submit(os.getpid)


# A disk that is full, or cannot be written

_COMPILE = """
import resource, sys
import msgspec
from kit.compiling import Order, compile_all
order = msgspec.json.decode(sys.argv[1], type=Order, dec_hook=lambda kind, text: kind(text))
print(*compile_all(order).errors, sep="\\n")
"""


def _error_elsewhere(order: Order, mount: str) -> str:
    text = msgspec.json.encode(order, enc_hook=str).decode()
    return run_python(_COMPILE, text, prefix=in_mount_namespace(f"{mount} {shlex.quote(str(order.cache))}"))


@needs_mounts
def test_a_full_disk_names_the_kernel_and_says_what_to_do(tmp_path: Path) -> None:
    order = Order(_directory(tmp_path / "root"), write_copying_compiler(tmp_path).compiler, _kernels(1))
    error = _error_elsewhere(order, f"mount -t tmpfs -o size={len(real_cubin()) // 2} none")
    assert error.startswith(order.kernels[0].directory)
    assert "(No space left on device): make room, or set SGLANG_DG_CACHE_DIR" in error


@needs_mounts
def test_a_read_only_cache_is_enough_for_the_kernels_that_it_has(tmp_path: Path) -> None:
    compiler = write_copying_compiler(tmp_path)
    there, missing = _kernels(2)
    root = tmp_path / "root"
    assert compile_all(Order(root, compiler.compiler, (there,))).compiled == 1
    error = _error_elsewhere(
        Order(root, compiler.compiler, (there, missing)), f"mount -B -o ro {shlex.quote(str(root))}"
    )
    (line,) = error.splitlines()
    assert line.startswith(missing.directory)
    assert "Read-only file system" in line
    assert len(compiler.starts) == 1


def test_a_cache_that_cannot_be_a_directory_is_an_error_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    compiler = write_copying_compiler(tmp_path)
    assert "cannot be written" in _only_error(_compile(tmp_path, compiler))
    assert compiler.starts == []


# Other processes that come to nothing


def test_a_process_killed_in_mid_compile_leaves_nothing_half_done_and_the_next_one_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(_directory(tmp_path / "scratch")))  # nobody tidies up behind a killed process
    compiler = write_compiler(tmp_path, 'head -c 100 /dev/zero > "$cubin"; sleep 300 & wait')
    order = Order(tmp_path / "root", compiler.compiler, _kernels(1))
    with CompilingProcess() as killed:
        killed.wait_until_ready()
        killed.give(order)
        orphan = compiler.wait_for_start()
        try:
            assert _is_locked(order)
            killed.process.kill()
            killed.process.wait()
            assert _nothing_is_visible(order.cache)
            # Its compiler lives on for a while, and does not hold what the process held.
            assert is_alive(orphan)
            again = write_copying_compiler(_directory(tmp_path / "again"))
            begun = time.monotonic()
            assert compile_all(Order(order.cache, again.compiler, order.kernels)) == Outcome(compiled=1)
            assert time.monotonic() - begun < 5
        finally:
            os.killpg(orphan, signal.SIGKILL)


def _is_locked(order: Order) -> bool:
    held = KernelCache(order.cache).take_lock(order.kernels[0].directory)
    if held is not None:
        held.release()
    return held is None


def test_a_kernel_whose_lock_is_held_for_too_long_is_compiled_without_it(tmp_path: Path) -> None:
    compiler = write_copying_compiler(tmp_path)
    (kernel,) = kernels = _kernels(1)
    held = KernelCache(tmp_path / "root").take_lock(kernel.directory)
    assert held is not None
    with held:
        assert compile_all(Order(tmp_path / "root", compiler.compiler, kernels, limit_s=1)) == Outcome(compiled=1)


def test_a_kernel_whose_holder_gives_up_is_compiled_by_the_one_that_waited(tmp_path: Path) -> None:
    failing = write_compiler(_directory(tmp_path / "failing"), "sleep 0.5; (exit 1)")
    good = write_copying_compiler(_directory(tmp_path / "good"))
    kernels = _kernels(1)
    with CompilingProcess() as holder:
        holder.wait_until_ready()
        holder.give(Order(tmp_path / "root", failing.compiler, kernels))
        failing.wait_for_start()
        assert compile_all(Order(tmp_path / "root", good.compiler, kernels)) == Outcome(compiled=1)
        assert "exit status 1" in _only_error(holder.outcome())


def test_a_kernel_that_comes_in_by_somebody_without_our_lock_is_taken_as_it_is(tmp_path: Path) -> None:
    """DeepGEMM itself publishes by a rename, and knows of no lock."""
    compiler = write_copying_compiler(tmp_path, seconds=0.5)
    cache, (kernel,) = KernelCache(tmp_path / "root"), _kernels(1)
    theirs = real_cubin() + b"by DeepGEMM"
    with CompilingProcess() as process:
        process.wait_until_ready()
        process.give(Order(cache.root, compiler.compiler, (kernel,)))
        compiler.wait_for_start()
        cache.publish(kernel.directory, kernel.source, theirs)
        assert process.outcome().errors == ()
    assert (cache.path(kernel.directory) / "kernel.cubin").read_bytes() == theirs
