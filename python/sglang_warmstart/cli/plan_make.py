"""``sglang-warmstart plan --gpu``: make a plan on a machine without a GPU, with DeepGEMM's own host library."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_warmstart.bundle import toolchain
from sglang_warmstart.bundle.toolchain import ToolchainError
from sglang_warmstart.cli.ending import command, read_plans, write_plan
from sglang_warmstart.deepgemm import wanted
from sglang_warmstart.deepgemm.dialects import UnknownJitError, dialect_of
from sglang_warmstart.deepgemm.identity import Gpu, Identity, build_hash, distribution_of, headers_hash
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.deepgemm.nogpu.devices import UnknownGpuError, gpu_of
from sglang_warmstart.deepgemm.nogpu.host import PLACE
from sglang_warmstart.deepgemm.plan import NO_GPU, LeftOut, Plan, PlanError, Planner
from sglang_warmstart.deepgemm.record.child import RecordingOrder, RecordingProblem, record
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.record.way import WITHOUT_GPU
from sglang_warmstart.deepgemm.stub import MARK
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.deepgemm.wanted import WantedError

_LIMIT_S = 120.0
_FILE_LIMIT = 64 << 20
# No server has such a launch: what is known of its targets is known, and the launch is not taken for warmed.
LAUNCH: Launch = {"made": "without a GPU"}


@dataclass(frozen=True)
class Wish:
    """What one rank is to have.

    Args:
        gpu: of the rank.
        settings: DeepGEMM's variables there.
        launch: of the rank.
        targets: to be recorded.
    """

    gpu: Gpu
    settings: dict[str, str]
    launch: Launch
    targets: tuple[Target, ...]


@command
def make(
    source: Annotated[Path, typer.Argument(metavar="TARGETS|PLAN", help="A JSON list of targets, or a plan.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The file to write (JSON).")],
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME[:SMS]", help="The GPU, such as h200. Default: that of the plan.")
    ] = "",
    nvcc: Annotated[
        str | None,
        typer.Option(help="The compiler that will be used. Default: that of the plan, or the one found here."),
    ] = None,
    deep_gemm: Annotated[
        str | None, typer.Option(help="The directory of the package deep_gemm. Default: the one installed here.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Targets recorded at once. Default: the cores.")] = None,
) -> None:
    """Make a plan without a GPU: DeepGEMM itself says which kernels it would compile.

    Exit status 0 when it has all targets, 1 when DeepGEMM refuses some, 2 when it cannot be made at all.
    """
    package = package_of(deep_gemm)
    wishes, version = _wishes(source, named_gpu(gpu) if gpu else None, nvcc, package)
    write_plan(output, planned(wishes, version, package, jobs))


def named_gpu(word: str) -> Gpu:
    """The GPU of ``--gpu``.

    Raises:
        PlanError: there is none of that name.
    """
    try:
        return gpu_of(word)
    except UnknownGpuError as error:
        raise PlanError(f"--gpu: {error}") from error


def package_of(deep_gemm: str | None) -> Path:
    """The directory of ``--deep-gemm``, or of the DeepGEMM that is installed.

    Raises:
        ToolchainError: there is none.
    """
    package = Path(deep_gemm).absolute() if deep_gemm is not None else toolchain.installed_deep_gemm()
    if package is None:
        raise ToolchainError("DeepGEMM is not installed here: install sgl-deep-gemm, or name it with --deep-gemm")
    return package


def _wishes(source: Path, gpu: Gpu | None, nvcc: str | None, deep_gemm: Path) -> tuple[list[Wish], str]:
    """What is to be recorded, and what the compiler prints for ``--version``."""
    try:
        with source.open("rb") as file:
            data = file.read(_FILE_LIMIT)
    except OSError as error:
        raise PlanError(f"{source}: {error.strerror or error}") from error
    if data.lstrip().startswith(b"["):
        if gpu is None:
            raise PlanError(f"{source} is a list of targets: say with --gpu for which GPU")
        try:
            targets = wanted.read(data, gpu)
        except WantedError as error:
            raise PlanError(f"{source}: {error}") from error
        return [Wish(gpu, {}, LAUNCH, tuple(targets))], version_here(nvcc, deep_gemm)
    plan = read_plans([source])
    wishes = {
        (wish.gpu, tuple(sorted(wish.launch.items()))): wish
        for wish in (
            Wish(
                gpu or Gpu(launch.gpu, launch.num_sms, launch.capability, 0),
                launch.settings,
                launch.launch,
                tuple(
                    wanted.moved(each.target, launch.num_sms, gpu) if gpu else each.target for each in launch.targets
                ),
            )
            for launch in plan.launches
        )
    }
    return list(wishes.values()), plan.compiler if nvcc is None else version_here(nvcc, deep_gemm)


def version_here(nvcc: str | None, deep_gemm: Path) -> str:
    """What the compiler of ``--nvcc``, or the one found here, prints for ``--version``."""
    try:
        jit = dialect_of(deep_gemm).name
    except UnknownJitError as error:
        raise ToolchainError(str(error)) from error
    return toolchain.find("nvcc", os.environ, nvcc, str(deep_gemm), jit).compiler.version


def planned(
    wishes: list[Wish], version: str, deep_gemm: Path, jobs: int | None, left_out: Iterable[LeftOut] = ()
) -> Plan:
    """The plan of what is wished.

    Args:
        wishes: at least one.
        version: what the compiler prints for ``--version``.
        deep_gemm: the package.
        jobs: targets recorded at once; None for as many as there are cores.
        left_out: what could not be wished for.

    Raises:
        PlanError: no target is in it.
        ToolchainError: it cannot be made with this DeepGEMM and compiler.
    """
    try:
        dialect = dialect_of(deep_gemm)
    except UnknownJitError as error:
        raise ToolchainError(str(error)) from error
    if problem := dialect.check_compiler(version):
        raise ToolchainError(f"the plan's compiler will not do for the DeepGEMM in {deep_gemm}: {problem}: see --nvcc")

    def identity(wish: Wish) -> Identity:
        return Identity(
            gpu=wish.gpu.name,
            num_sms=wish.gpu.num_sms,
            capability=wish.gpu.capability,
            deep_gemm=build_hash(deep_gemm),
            installed_in=str(deep_gemm),
            compiler=version,
            kind="nvcc",
            settings=wish.settings,
            jit=dialect.name,
        )

    planner = Planner(identity(wishes[0]), distribution_of(deep_gemm), headers_hash(deep_gemm), made=NO_GPU)
    for each in left_out:
        planner.leave_out(each.target, each.reason)
    found = _recorded(wishes, version, deep_gemm, dialect.name, jobs or os.cpu_count() or 1)
    for wish in wishes:
        kept: list[tuple[Target, list[RecordedKernel]]] = []
        for target in wish.targets:
            result = found[wish.gpu, target]
            if isinstance(result, RecordingProblem):
                planner.leave_out(str(target), str(result))
            else:
                kept.append((target, result))
        planner.add(identity(wish), wish.launch, kept)
    plan = planner.plan()
    if plan.left_out and not any(launch.targets for launch in plan.launches):
        first = plan.left_out[0]
        raise PlanError(f"DeepGEMM refuses every target: {first.target}: {first.reason}")
    return plan


def _recorded(
    wishes: Iterable[Wish], version: str, deep_gemm: Path, jit: str, jobs: int
) -> dict[tuple[Gpu, Target], list[RecordedKernel] | RecordingProblem]:
    """Each target, recorded once, in a process of its own. Shows the progress.

    Raises:
        ToolchainError: DeepGEMM cannot be had without a GPU here.
    """
    # The forkserver loads the library once, on top of the stand-ins; its children inherit it.
    os.environ[PLACE] = str(deep_gemm)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WITHOUT_GPU, record.__module__])
    settings = {(wish.gpu, target): wish.settings for wish in wishes for target in wish.targets}
    found: dict[tuple[Gpu, Target], list[RecordedKernel] | RecordingProblem] = {}
    with tempfile.TemporaryDirectory(prefix="warmstart-plan-") as directory, _shown(len(settings)) as advance:
        stub = Path(directory, "stub.cubin")
        stub.write_bytes(MARK)  # nothing loads it

        def one(gpu: Gpu, target: Target) -> list[RecordedKernel]:
            order = RecordingOrder(target, gpu, settings[gpu, target], version, str(stub), directory, WITHOUT_GPU, jit)
            return list(record(context, order, _LIMIT_S, lambda: False))

        with ThreadPoolExecutor(min(jobs, len(settings) or 1)) as threads:
            futures = {threads.submit(one, *key): key for key in settings}
            for future in as_completed(futures):
                try:
                    found[futures[future]] = future.result()
                except RecordingProblem as problem:
                    if problem.failed.no_library:
                        threads.shutdown(wait=False, cancel_futures=True)
                        raise ToolchainError(str(problem)) from problem
                    found[futures[future]] = problem
                advance(str(futures[future][1]))
    return found


@contextmanager
def _shown(total: int) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("targets"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=total)

    def advance(target: str) -> None:
        bar.advance(task)
        if not console.is_terminal:
            done = int(bar.tasks[0].completed)
            console.print(f"{done}/{total}  {target}", markup=False, highlight=False, soft_wrap=True)

    with bar if console.is_terminal else nullcontext():
        yield advance
