"""Compile the kernels of a plan with an executor: threads of this machine, or a cluster."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Executor, Future, as_completed
from typing import Protocol

import msgspec

from sglang_warmstart.bundle import toolchain as toolchains
from sglang_warmstart.bundle.toolchain import Pinned, Toolchain, ToolchainError
from sglang_warmstart.deepgemm import cubin, stub
from sglang_warmstart.deepgemm.compiler import CompileJob, CompilerError, compile_kernel
from sglang_warmstart.deepgemm.plan import INCLUDE, Plan
from sglang_warmstart.node.pool import size_of

# On a machine that does other things too; the largest of DeepGEMM's kernels takes nvcc 8 s where all cores compile.
LIMIT_S = 600.0


class PortableJob(msgspec.Struct, frozen=True):
    """One kernel to compile, on this machine or on another: whoever does it looks for its own compiler and headers.

    Args:
        source: CUDA source.
        flags: the compiler's, with ``{include}`` for the headers.
        pinned: what the machine has to have.
        nvcc, deep_gemm: where those are, if it was named.
        limit_s: seconds after which the compiler is ended.
    """

    source: str
    flags: str
    pinned: Pinned
    nvcc: str | None = None
    deep_gemm: str | None = None
    limit_s: float = LIMIT_S


class Cubin(msgspec.Struct, frozen=True):
    """A compiled kernel.

    Args:
        data: the cubin.
        seconds: that it took.
        worker: host and process that compiled it.
    """

    data: bytes
    seconds: float
    worker: str


class Receiver(Protocol):
    """Takes each kernel as it comes. Called from one thread."""

    def compiled(self, name: str, kernel: Cubin) -> None:
        """A kernel is there."""

    def failed(self, name: str, reason: str) -> None:
        """A kernel could not be compiled."""


def compile_portable(job: PortableJob) -> Cubin:
    """Compile a kernel with what this machine has. Runs in a thread here, or in a worker of a cluster.

    Raises:
        CompilerError: with the compiler's own message.
    """
    start, worker = time.monotonic(), f"{os.uname().nodename}:{os.getpid()}"
    try:
        # A worker may have come after all others were asked.
        found = _checked(job.pinned, job.nvcc, job.deep_gemm)
    except ToolchainError as error:
        raise CompilerError(f"{worker}: {error}") from None
    flags = job.flags.replace(INCLUDE, str(found.include))
    data = compile_kernel(CompileJob(job.source, flags, found.compiler, job.limit_s))
    defect = "a recorder's stub" if stub.is_stub(data) else cubin.defect_of(data)
    if defect is not None:
        raise CompilerError(f"what the compiler left is no cubin: {defect}")
    return Cubin(data, time.monotonic() - start, worker)


def check_here(pinned: Pinned, nvcc: str | None, deep_gemm: str | None) -> str:
    """See that this machine has what a plan asks for. Runs here, or in a worker of a cluster.

    Returns:
        Nothing but an empty text if it has, else one line that says what is wrong. (An exception would have to travel.)
    """
    # A cluster's worker may live for long, and what is installed there may change meanwhile.
    _checked.cache_clear()
    try:
        _checked(pinned, nvcc, deep_gemm)
    except ToolchainError as error:
        return str(error)
    return ""


def compile_all(
    plan: Plan,
    names: Iterable[str],
    executor: Executor,
    receiver: Receiver,
    *,
    nvcc: str | None = None,
    deep_gemm: str | None = None,
    compile_one: Callable[[PortableJob], Cubin] = compile_portable,
) -> None:
    """Compile kernels of a plan, the largest first: they would else be the last to end.

    One that cannot be compiled does not keep the others from it. Ends early only by an exception, such as Ctrl-C; what
    was compiled until then has been told to the receiver, and what waits is dropped.

    Args:
        names: of the kernels.
        executor: runs ``compile_one``.
        nvcc, deep_gemm: where those are, if it was named.
    """
    pinned = Pinned.of(plan)

    def job(name: str) -> PortableJob:
        kernel = plan.kernels[name]
        return PortableJob(kernel.source, plan.flags[kernel.flags], pinned, nvcc, deep_gemm)

    ordered = sorted(names, key=lambda name: -size_of(plan.kernels[name].source))
    futures: dict[Future[Cubin], str] = {executor.submit(compile_one, job(name)): name for name in ordered}
    untold = dict(futures)

    def tell(future: Future[Cubin]) -> None:
        name = untold.pop(future)
        try:
            kernel = future.result()
        except CancelledError:
            receiver.failed(name, "the cluster has dropped it: see whether its scheduler still runs")
        except Exception as error:
            # The compiler's, or a cluster's own: a worker that is lost, say.
            receiver.failed(name, str(error) or type(error).__name__)
        else:
            receiver.compiled(name, kernel)

    try:
        for future in as_completed(futures):
            tell(future)
    except KeyboardInterrupt:
        # Some may have ended while the receiver was busy.
        for future in [each for each in untold if each.done()]:
            tell(future)
        raise
    finally:
        for future in futures:
            future.cancel()


@functools.lru_cache(maxsize=8)
def _checked(pinned: Pinned, nvcc: str | None, deep_gemm: str | None) -> Toolchain:
    found = toolchains.find(pinned.kind, os.environ, nvcc, deep_gemm, pinned.jit)
    toolchains.check(found, pinned)
    return found
