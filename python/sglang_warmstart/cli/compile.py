"""``sglang-warmstart compile``: make a bundle from plans, on any machine that has the compiler."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sglang_warmstart.bundle import archive, cluster, packing
from sglang_warmstart.bundle.build import Cubin, compile_all
from sglang_warmstart.bundle.cluster import Workers
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.signature import PrivateKey
from sglang_warmstart.cli.compile_view import View
from sglang_warmstart.cli.ending import EXIT_FAILED, EXIT_INTERRUPTED, command, read_plans
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.node import limits

# A bundle is written anew as kernels come, so that little is lost whatever happens, and rarely enough to cost nothing.
_WRITE_AGAIN_S = 10.0
_WRITE_SHARE = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Bundle:
    """The bundle that is being made.

    Args:
        path: where it goes.
        plan: that it is made from.
        key: that signs it.
    """

    path: Path
    plan: Plan
    key: PrivateKey | None
    cubins: dict[str, bytes | Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    caches: list[tuple[LibraryCache, dict[str, Path]]] = field(default_factory=list)

    def resume(self, directory: Path) -> None:
        """Take over what an earlier run has left in it.

        Args:
            directory: for its files.

        Raises:
            BundleError: what is there is another bundle.
        """
        if not self.path.exists():
            return
        try:
            with self.path.open("rb") as stream:
                # What is taken over is signed with the rest: so it has to be this key's own.
                manifest = archive.read(stream, is_signed_by=self.key.public_key if self.key else None)
                old = manifest.plan
                if any(getattr(old, part) != getattr(self.plan, part) for part in ("compiler", "kind", "headers")):
                    raise BundleError("of another compiler or another DeepGEMM")
                if manifest.cubins and not manifest.cubins.keys() & self.plan.kernels.keys():
                    raise BundleError("of another plan, it has no kernel of this one")
                archive.extract(stream, manifest, directory)
        except (BundleError, OSError) as error:
            raise BundleError(f"{self.path} is there, and is not gone on with: {error}: remove it first") from error
        self.cubins = {
            name: directory / sha256 for name, sha256 in manifest.cubins.items() if name in self.plan.kernels
        }
        self.caches = [
            (cache, {file.sha256: directory / file.sha256 for file in cache.files}) for cache in manifest.caches
        ]

    def see_place(self) -> None:
        """See that it can be written there, before compilers work for it.

        Raises:
            BundleError: it cannot.
        """
        try:
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise BundleError(
                f"{self.path} cannot be written ({error.strerror or error}): name another place"
            ) from error

    def write(self) -> None:
        """Write what there is, whole or not at all.

        Raises:
            BundleError: it cannot be written.
        """
        contents = packing.contents_of(self.plan, self.cubins, failed=self.failed, caches=self.caches)
        archive.write(self.path, contents.manifest, contents.open, sign=self.key.sign if self.key else None)


class BundleFiller:
    """Puts each kernel into the bundle, and tells the view."""

    def __init__(self, bundle: Bundle, view: View) -> None:
        self._bundle, self._view = bundle, view
        self._next_write = time.monotonic() + _WRITE_AGAIN_S
        self.kernels: list[dict[str, Any]] = []

    def compiled(self, name: str, kernel: Cubin) -> None:
        """See :class:`.build.Receiver`."""
        self._bundle.cubins[name] = kernel.data
        self.kernels.append(
            {"name": name, "seconds": round(kernel.seconds, 3), "bytes": len(kernel.data), "worker": kernel.worker}
        )
        self._view.compiled(name, kernel)
        start = time.monotonic()
        if start > self._next_write:
            self._bundle.write()
            took = time.monotonic() - start
            self._next_write = time.monotonic() + max(_WRITE_AGAIN_S, took / _WRITE_SHARE)

    def failed(self, name: str, reason: str) -> None:
        """See :class:`.build.Receiver`."""
        self._bundle.failed[name] = reason
        self._view.failed(name, reason)


@command
def compile_plan(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plans, of `record` or `plan export`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write (.tar.zst).")],
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
    """Compile the kernels of plans into one bundle. No GPU is needed.

    What BUNDLE has from an earlier run is kept. Exit status 0 when it has all kernels, 1 when some could not be
    compiled (the others are in it), 2 when this machine is not what the plan asks for, 130 after Ctrl-C.
    """
    plan = read_plans(plans)
    bundle = Bundle(output, plan, PrivateKey.load(key) if key is not None else None)
    if address is not None and not address.startswith(cluster.SCHEME):
        raise typer.BadParameter(f"{address}: expected {cluster.SCHEME}HOST:PORT", param_hint="--cluster")
    with tempfile.TemporaryDirectory(prefix="warmstart-compile-") as directory, interruptible():
        bundle.see_place()
        bundle.resume(Path(directory))
        missing = [name for name in plan.kernels if name not in bundle.cubins]
        resumed, start = len(bundle.cubins), time.monotonic()
        view = View(Console(stderr=as_json), plan, missing, resumed)
        filler = BundleFiller(bundle, view)
        interrupted = False
        try:
            with _workers(plan, jobs, address, nvcc, deep_gemm) as workers, view.over(workers):
                compile_all(plan, missing, workers.executor, filler, nvcc=nvcc, deep_gemm=deep_gemm)
        except (KeyboardInterrupt, SystemExit):
            # Ctrl-C; or whoever has read the lines is gone: rich ends a program for that.
            interrupted = True
        with held_off():
            if bundle.cubins:
                bundle.write()
        summary = {
            "bundle": str(output) if bundle.cubins else None,
            "bytes": output.stat().st_size if bundle.cubins else 0,
            "kernels": len(plan.kernels),
            "compiled": len(filler.kernels),
            "resumed": resumed,
            "failed": bundle.failed,
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
    raise typer.Exit(EXIT_FAILED if bundle.failed else 0)


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
