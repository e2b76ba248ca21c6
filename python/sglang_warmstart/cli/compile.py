"""``sglang-warmstart compile``: make a bundle or a cache from plans, on any machine that has the compiler."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sglang_warmstart.bundle import cluster
from sglang_warmstart.bundle.build import Cubin, compile_all
from sglang_warmstart.bundle.cluster import Workers
from sglang_warmstart.bundle.signature import PrivateKey
from sglang_warmstart.cli.compile_image import are_of_builds, compile_image
from sglang_warmstart.cli.compile_output import Output, output_of
from sglang_warmstart.cli.compile_view import View
from sglang_warmstart.cli.ending import EXIT_FAILED, EXIT_INTERRUPTED, command, read_plans
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.node import limits

# A bundle is written anew as kernels come, so that little is lost whatever happens, and rarely enough to cost nothing.
_WRITE_AGAIN_S = 10.0
_WRITE_SHARE = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Filler:
    """Puts each kernel where it goes, and tells the view."""

    def __init__(self, output: Output, view: View) -> None:
        self._output, self._view = output, view
        self._next_write = time.monotonic() + _WRITE_AGAIN_S
        self.kernels: list[dict[str, Any]] = []

    def compiled(self, name: str, kernel: Cubin) -> None:
        """See :class:`.build.Receiver`."""
        self._output.put(name, kernel.data)
        self.kernels.append(
            {"name": name, "seconds": round(kernel.seconds, 3), "bytes": len(kernel.data), "worker": kernel.worker}
        )
        self._view.compiled(name, kernel)
        start = time.monotonic()
        if start > self._next_write:
            self._output.write()
            took = time.monotonic() - start
            self._next_write = time.monotonic() + max(_WRITE_AGAIN_S, took / _WRITE_SHARE)

    def failed(self, name: str, reason: str) -> None:
        """See :class:`.build.Receiver`."""
        self._output.failed[name] = reason
        self._view.failed(name, reason)


@command
def compile_plan(
    plans: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN...", help="Plans: of `record`, `plan export`, or of builds."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="BUNDLE|DIR", help="The bundle to write (FILE.tar.zst), or a cache (a directory)."
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Kernels compiled at once. Default: the cores. Free memory may allow fewer."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--cluster", metavar="dask://HOST:PORT", help="Compile on the workers of a dask cluster."),
    ] = None,
    nvcc: Annotated[
        str | None, typer.Option(help="The compiler. Default: the one that DeepGEMM finds, or nvidia-cuda-nvcc.")
    ] = None,
    deep_gemm: Annotated[
        str | None, typer.Option(help="The directory of the package deep_gemm. Default: the one installed here.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign the bundle with this Ed25519 key (PEM).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compile the kernels of plans into one bundle, or into a cache that DeepGEMM uses as it is. No GPU is needed.

    Plans of builds, which a start leaves in warmstart/ahead of DeepGEMM's cache, have what all JIT libraries compiled:
    into a directory with their caches, for an image in which it has the same place.

    What is there from an earlier run is kept. Exit status 0 when it has all kernels, 1 when some could not be
    compiled (the others are in it), 2 when this machine is not what the plan asks for, 130 after Ctrl-C.
    """
    if are_of_builds(plans):
        raise typer.Exit(compile_image(plans, output, as_json))
    plan = read_plans(plans)
    made = output_of(output, plan, PrivateKey.load(key) if key is not None else None, deep_gemm)
    if address is not None and not address.startswith(cluster.SCHEME):
        raise typer.BadParameter(f"{address}: expected {cluster.SCHEME}HOST:PORT", param_hint="--cluster")
    with tempfile.TemporaryDirectory(prefix="warmstart-compile-") as directory, interruptible():
        there = made.open(Path(directory))
        missing = [name for name in plan.kernels if name not in there]
        resumed, start = len(there), time.monotonic()
        view = View(Console(stderr=as_json), plan, missing, resumed)
        filler = Filler(made, view)
        interrupted = False
        try:
            with _workers(plan, jobs, address, nvcc, deep_gemm) as workers, view.over(workers):
                compile_all(plan, missing, workers.executor, filler, nvcc=nvcc, deep_gemm=deep_gemm)
        except (KeyboardInterrupt, SystemExit):
            # Ctrl-C; or whoever has read the lines is gone: rich ends a program for that.
            interrupted = True
        with held_off():
            if resumed or filler.kernels:
                made.write()
                made.close()
        summary = {
            "bundle": str(output) if resumed or filler.kernels else None,
            "bytes": made.bytes if resumed or filler.kernels else 0,
            "kernels": len(plan.kernels),
            "compiled": len(filler.kernels),
            "resumed": resumed,
            "failed": made.failed,
            "interrupted": interrupted,
            "nvcc": Compiler("", plan.compiler).release,
            "seconds": round(time.monotonic() - start, 3),
            "compile_seconds": round(sum(each["seconds"] for each in filler.kernels), 3),
            "each": filler.kernels,
        }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        view.summary(summary)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    raise typer.Exit(EXIT_FAILED if made.failed else 0)


def _workers(
    plan: Plan, jobs: int | None, address: str | None, nvcc: str | None, deep_gemm: str | None
) -> AbstractContextManager[Workers]:
    if address is not None:
        return cluster.of_cluster(plan, address, nvcc, deep_gemm)
    return cluster.of_this_machine(plan, limits.compile_workers(jobs), nvcc, deep_gemm)


def _heard() -> list[signal.Signals]:
    # Who was started by nohup does not want to hear of SIGHUP.
    return [each for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is gone, do what Ctrl-C does."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in _heard() if each != signal.SIGINT}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def held_off() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: the last bundle is being written."""
    came: list[int] = []
    # Not by a mask: a thread without it, such as one of dask's, would take the signal for all.
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in _heard()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        raise KeyboardInterrupt
