"""On paper: how long a cluster compiles plans of thousands of kernels, from measured seconds per kernel and per task.

``python -m simulation.cluster`` in ``test`` prints the table, and ``... measure`` measures the overhead anew.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec
from kit.plans import real_plan
from kit.recorded import KernelText, recording
from kit.toolchain import toolchain
from sglang_warmstart.bundle import archive, packing
from sglang_warmstart.bundle.build import PortableJob, check_here, compile_portable
from sglang_warmstart.bundle.toolchain import Pinned
from sglang_warmstart.deepgemm import digest
from sglang_warmstart.deepgemm.plan import PlannedKernel
from sglang_warmstart.node.pool import size_of

MEASURED = Path(__file__).parents[2] / "gpu" / "results" / "compile.json"
OVERHEAD = Path(__file__).with_name("overhead.json")
KERNELS, WORKERS = (39, 500, 2000, 5000), (1, 2, 16, 64, 256, 512)
SEED = 0


class Kernel(msgspec.Struct, frozen=True):
    """A kernel that was compiled for real.

    Args:
        guess: by which the product orders them.
        seconds: that the compiler took.
        size: bytes of its cubin.
    """

    guess: int
    seconds: float
    size: int


class Trial(msgspec.Struct, frozen=True):
    """A real run of tasks that sleep as long as kernels take, many times faster.

    Args:
        tasks, slots: how many, and how many of them at once.
        faster: so many times.
        seconds: that it took.
    """

    tasks: int
    slots: int
    faster: float
    seconds: float


class Overhead(msgspec.Struct, frozen=True):
    """What a run costs beside compilers.

    Args:
        cores: of the machine where it was measured.
        workers, tasks: of that measurement.
        tasks_per_second: that do nothing, with sources and cubins of the usual size.
        seconds_per_task: the same the other way round: the scheduler, and the client, have one after the other.
        round_trip_s: from a task that is given to the cluster while it is idle to its result.
        worker_start_s: of a worker's process, until the scheduler knows it.
        check_s: until the client is connected, and the workers have said that they have what the plan asks for.
        write_s_per_kernel: for the last bundle.
        trials: to compare the model with.
    """

    cores: int
    workers: int
    tasks: int
    tasks_per_second: float
    seconds_per_task: float
    round_trip_s: float
    worker_start_s: float
    check_s: float
    write_s_per_kernel: float
    trials: tuple[Trial, ...] = ()


@cache
def overhead() -> Overhead:
    """As it was measured last."""
    return msgspec.json.decode(OVERHEAD.read_bytes(), type=Overhead)


class _Each(msgspec.Struct):
    name: str
    seconds: float
    bytes: int


class _Run(msgspec.Struct):
    seconds: float
    each: list[_Each]


@cache
def real_run() -> tuple[float, tuple[Kernel, ...]]:
    """What `compile --json` said of a real run on two cores: its seconds, and its kernels, the first to begin first."""
    run = msgspec.json.decode(MEASURED.read_bytes(), type=_Run)
    sources = {_planned_name(name, text): text.source for name, text in recording().kernels.items()}
    kernels = (Kernel(size_of(sources[each.name]), each.seconds, each.bytes) for each in run.each)
    return run.seconds, tuple(sorted(kernels, key=lambda kernel: -kernel.guess))


def _planned_name(name: str, text: KernelText) -> str:
    signature = digest.signature_of(recording().compiler)
    return digest.directory_of(digest.name_of(name), signature, text.flags, text.source)


def plan_of(count: int) -> list[Kernel]:
    """A plan of so many kernels, the first to begin first: the real one, or drawn from it with repetition."""
    _, measured = real_run()
    if count == len(measured):
        return list(measured)
    return sorted(random.Random(SEED + count).choices(measured, k=count), key=lambda kernel: -kernel.guess)


def makespan(seconds: Sequence[float], workers: int, per_task_s: float = 0.0, idle_s: float = 0.0) -> float:
    """When the last task ends if each one goes, in this order, to the worker that is free first.

    Args:
        seconds: of each task.
        per_task_s: what the scheduler takes for each task: it does one after the other.
        idle_s: for which a worker waits between tasks besides.
    """
    free, scheduler, end = [0.0] * workers, 0.0, 0.0
    for each in seconds:
        scheduler = max(scheduler, free[0]) + per_task_s
        ends = scheduler + idle_s + each
        heapq.heapreplace(free, ends)
        end = max(end, ends)
    return end


class Forecast(msgspec.Struct, frozen=True):
    """What the model says of a run.

    Args:
        seconds: by the clock, from the start of the workers to the bundle.
        efficiency: the compilers' own seconds, of those that all workers were there for.
        limit: what it would have to be faster.
    """

    seconds: float
    efficiency: float
    limit: str


def forecast(count: int, workers: int, cost: Overhead | None = None) -> Forecast:
    """The model's answer for a plan on a cluster whose workers have a core each."""
    cost = cost or overhead()
    seconds = [kernel.seconds for kernel in plan_of(count)]
    total = sum(seconds)
    fixed = cost.worker_start_s + cost.check_s + count * cost.write_s_per_kernel
    wall = fixed + makespan(seconds, workers, cost.seconds_per_task, cost.round_trip_s)
    limits = {
        "cores": total / workers,
        "longest kernel": max(seconds),
        "scheduler": count * cost.seconds_per_task,
    }
    return Forecast(wall, total / (workers * wall), max(limits, key=lambda name: limits[name]))


def table() -> str:
    """The forecasts as Markdown."""
    lines = ["| Kernels | CPU seconds | Workers | Wall seconds | Efficiency | Limit |", "|--:|--:|--:|--:|--:|---|"]
    for count, workers in itertools.product(KERNELS, WORKERS):
        found = forecast(count, workers)
        total = sum(kernel.seconds for kernel in plan_of(count))
        lines.append(
            f"| {count} | {total:,.0f} | {workers} | {found.seconds:,.0f} | {found.efficiency:.0%} | {found.limit} |"
        )
    return "\n".join(lines) + "\n"


def errors() -> dict[str, tuple[float, float]]:
    """Real runs: what each took, and what the model says of it."""
    real, kernels = real_run()
    count = len(kernels)
    found = {
        f"{count} kernels on 2 cores of one machine": (
            real,
            makespan([kernel.seconds for kernel in kernels], 2) + count * overhead().write_s_per_kernel,
        )
    }
    cost = overhead()
    for trial in cost.trials:
        seconds = [kernel.seconds / trial.faster for kernel in plan_of(trial.tasks)]
        modelled = makespan(seconds, trial.slots, cost.seconds_per_task, cost.round_trip_s)
        found[f"{trial.tasks} sleeping tasks on {trial.slots} slots of a real cluster"] = (trial.seconds, modelled)
    return found


def validation() -> str:
    """The same in words."""
    return "; ".join(
        f"{what}: {real:.1f} s, by the model {modelled:.1f} s ({modelled / real - 1:+.1%})"
        for what, (real, modelled) in errors().items()
    )


# Measuring. Takes half a minute and both cores.


def _nothing(source: str, size: int) -> bytes:
    assert source
    return bytes(size)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def measure_overhead(workers: int = 3, tasks: int = 2000) -> Overhead:
    """Measure it with a local cluster of processes, and write it down."""
    from distributed import Client, LocalCluster

    real = real_plan()
    found = toolchain()
    common = {"processes": True, "dashboard_address": None, "host": "127.0.0.1"}
    begun = time.monotonic()
    with LocalCluster(n_workers=workers, threads_per_worker=1, **common) as cluster:
        worker_start_s = time.monotonic() - begun
        begun = time.monotonic()
        with Client(cluster.scheduler_address, set_as_default=False) as client:
            assert set(client.run(check_here, Pinned.of(real), str(found.nvcc), str(found.deep_gemm)).values()) == {""}
            check_s = time.monotonic() - begun
            executor = client.get_executor(pure=False)
            kernels, (source, *_) = plan_of(tasks), (kernel.source for kernel in real.kernels.values())
            assert len(executor.submit(_nothing, source, 1).result()) == 1
            trips = []
            for kernel in kernels[:50]:
                begun = time.monotonic()
                executor.submit(_nothing, source, kernel.size).result()
                trips.append(time.monotonic() - begun)
            begun = time.monotonic()
            for future in [executor.submit(_nothing, source, kernel.size) for kernel in kernels]:
                future.result()
            per_task = (time.monotonic() - begun) / tasks
    trials = []
    for processes, threads in ((4, 4), (4, 16), (4, 64)):
        with (
            LocalCluster(n_workers=processes, threads_per_worker=threads, **common) as cluster,
            Client(cluster.scheduler_address, set_as_default=False) as client,
        ):
            executor, slots, faster = client.get_executor(pure=False), processes * threads, 10.0
            executor.submit(_sleep, 0.0).result()
            kernels = plan_of(500)
            begun = time.monotonic()
            for future in [executor.submit(_sleep, kernel.seconds / faster) for kernel in kernels]:
                future.result()
            trials.append(Trial(len(kernels), slots, faster, round(time.monotonic() - begun, 2)))
    result = Overhead(
        cores=len(os.sched_getaffinity(0)),
        workers=workers,
        tasks=tasks,
        tasks_per_second=round(1 / per_task, 1),
        seconds_per_task=round(per_task, 6),
        round_trip_s=round(statistics.median(trips), 6),
        worker_start_s=round(worker_start_s, 2),
        check_s=round(check_s, 2),
        write_s_per_kernel=round(_write_s_per_kernel(), 6),
        trials=tuple(trials),
    )
    OVERHEAD.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return result


def _write_s_per_kernel(count: int = 500) -> float:
    """For a bundle of real kernels, each of them a little different."""
    plan, found = real_plan(), toolchain()
    paths = {"nvcc": str(found.nvcc), "deep_gemm": str(found.deep_gemm)}
    jobs = [
        PortableJob(each.source, plan.flags[each.flags], Pinned.of(plan), **paths) for each in plan.kernels.values()
    ]
    data = [compile_portable(job).data for job in jobs]
    kernels, cubins = {}, {}
    signature = digest.signature_of(plan.compiler)
    for number, (name, kernel) in zip(range(count), itertools.cycle(plan.kernels.items())):
        source = f"{kernel.source}// {number}\n"
        fresh = digest.directory_of(digest.name_of(name), signature, plan.flags[kernel.flags], source)
        kernels[fresh] = PlannedKernel(kernel.flags, source)
        noise = random.Random(number).randbytes(64)
        cubins[fresh] = data[number % len(data)] + noise
    many = msgspec.structs.replace(plan, kernels=kernels, launches=())
    with tempfile.TemporaryDirectory() as directory:
        begun = time.monotonic()
        contents = packing.contents_of(many, cubins)
        archive.write(Path(directory, "bundle"), contents.manifest, contents.open)
        return (time.monotonic() - begun) / count


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(measure_overhead())
    print(table())
    print(validation())
