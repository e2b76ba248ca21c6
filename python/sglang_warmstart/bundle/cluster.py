"""Executors: the cores of this machine, or the workers of a dask cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

from sglang_warmstart.bundle.build import check_here
from sglang_warmstart.bundle.toolchain import Pinned, ToolchainError
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm.plan import Plan

SCHEME = "dask://"
_CONNECT_S = 30.0


@dataclass(frozen=True)
class Workers:
    """What compiles.

    Args:
        executor: for the jobs.
        count: how many of them run at once.
        where: in words.
    """

    executor: Executor
    count: int
    where: str


@contextlib.contextmanager
def of_this_machine(plan: Plan, jobs: int, nvcc: str | None, deep_gemm: str | None) -> Iterator[Workers]:
    """Cores of this machine. On leaving it early, compilers that run are ended.

    Args:
        jobs: compilers that run at once.
        nvcc, deep_gemm: where those are, if it was named.

    Raises:
        ToolchainError: this machine does not have what the plan asks for.
    """
    if problem := check_here(Pinned.of(plan), nvcc, deep_gemm):
        raise ToolchainError(problem)
    executor: Executor
    if plan.kind == "nvrtc":
        executor = ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            # Ctrl-C in the terminal reaches them too, and is for this process to deal with.
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        )
    else:
        executor = ThreadPoolExecutor(jobs, thread_name_prefix="compile")
    try:
        yield Workers(executor, jobs, "this machine")
    except BaseException:
        # Each compiler has a session of its own: Ctrl-C in the terminal does not reach it.
        compilers.end_all_runs()
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def of_cluster(plan: Plan, address: str, nvcc: str | None, deep_gemm: str | None) -> Iterator[Workers]:
    """The workers of a dask cluster. Each is asked first whether it has what the plan asks for.

    Args:
        address: of the scheduler: ``dask://HOST:PORT``.
        nvcc, deep_gemm: where those are on the workers, if it was named.

    Raises:
        ToolchainError: no such cluster, or a worker of it is not as it should be.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ToolchainError("--cluster needs dask: pip install 'sglang-warmstart[dask]'") from error
    _see_port(address)
    # It reports each lost connection, and what is of interest of that is said here.
    # Dask has given levels of their own to some of these.
    for name in ["distributed", *(each for each in logging.root.manager.loggerDict if each.startswith("distributed."))]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(  # type: ignore[no-untyped-call]
            f"tcp://{address.removeprefix(SCHEME)}", timeout=_CONNECT_S, set_as_default=False
        )
    except (OSError, ValueError, TimeoutError) as error:
        raise ToolchainError(f"{address}: no dask scheduler: {error}") from error
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise ToolchainError(f"{address}: the cluster has no workers: start some")
        said = client.run(functools.partial(check_here, Pinned.of(plan), nvcc, deep_gemm), on_error="return")
        for worker, answer in sorted(said.items()):
            if answer:
                raise ToolchainError(f"worker {worker}: {_line(answer)}")
        threads = sum(worker["nthreads"] for worker in workers.values())
        executor = client.get_executor(pure=False)  # type: ignore[no-untyped-call]
        try:
            yield Workers(executor, threads, f"{len(workers)} workers of {address}")
        finally:
            executor.shutdown(wait=False)


def _see_port(address: str) -> None:
    # Dask tries again and again where nobody listens.
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 0xFFFF:
        raise ToolchainError(f"{address}: expected {SCHEME}HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ToolchainError(f"{address}: no dask scheduler: {error.strerror or error}") from error


def _line(answer: object) -> str:
    text = " ".join(str(answer).split())
    # As text: dask wraps what a worker cannot so much as load.
    missing = re.search(r"No module named '[\w.]+'", text)
    return f"{missing[0]}: install sglang-warmstart there" if missing else text
