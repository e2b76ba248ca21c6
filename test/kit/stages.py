"""Runs a function in every pipeline stage of a model: one real process each, connected over gloo."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from kit.environment import child_environment, in_process
from kit.ports import free_ports
from kit.runner import make_runner

Result = TypeVar("Result")

_EXIT_LIMIT_S = 5.0


class StageFailed(RuntimeError):
    """A stage raised, died or did not finish; the message has the stage's own traceback."""


@dataclass(frozen=True)
class _Stage:
    model_path: Path
    pp_rank: int
    pp_size: int
    dist_port: int
    server_args: Mapping[str, object]
    plugins: bool
    # Pickled by hand: unpickling imports the module that defines the function, which may import SGLang, and so must
    # come after in_process().
    work: bytes


@dataclass(frozen=True)
class _Answer:
    failure: str | None
    result: bytes = b""


def run_stages(
    work: Callable[..., Result],
    pp_size: int,
    model_path: Path,
    *args: object,
    plugins: bool = True,
    server_args: Mapping[str, object] | None = None,
    time_limit_s: float = 120.0,
) -> list[Result]:
    """Call `work(runner, *args)` in each of `pp_size` processes; the results, by rank.

    With `plugins` each process loads SGLang's plugins before it makes its runner, as a scheduler process does. The
    processes inherit `os.environ`. `work`, `args` and the results are pickled.
    """
    pickled = pickle.dumps((work, args))
    (dist_port,) = free_ports(1)
    spawn = multiprocessing.get_context("spawn")
    children: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(pp_size):
            here, there = spawn.Pipe()
            stage = _Stage(model_path, rank, pp_size, dist_port, server_args or {}, plugins, pickled)
            # A daemon: ends with this process, however that ends.
            process = spawn.Process(target=_run_stage, args=(there, stage), name=f"stage-{rank}", daemon=True)
            process.start()
            there.close()  # or the death of the child would not end the pipe
            children.append((process, here))
        answers = _collect(children, time_limit_s)
    finally:
        _end(children)
    return [pickle.loads(answer.result) for answer in answers]


def _collect(children: list[tuple[BaseProcess, Connection]], time_limit_s: float) -> list[_Answer]:
    """Raises at the first failure: the other stages then wait for the failed one and would never answer."""
    deadline = time.monotonic() + time_limit_s
    waiting = {connection: rank for rank, (_, connection) in enumerate(children)}
    answers: dict[int, _Answer] = {}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(str(rank) for rank in waiting.values())
            raise StageFailed(f"no answer from stage {ranks} after {time_limit_s:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            answers[rank] = _receive(children[rank][0], connection, rank)
    return [answers[rank] for rank in range(len(children))]


def _receive(process: BaseProcess, connection: Connection, rank: int) -> _Answer:
    try:
        answer = connection.recv()
    except EOFError:
        process.join(_EXIT_LIMIT_S)
        raise StageFailed(f"stage {rank} died with exit code {process.exitcode}") from None
    assert isinstance(answer, _Answer)
    if answer.failure is not None:
        raise StageFailed(f"stage {rank} failed:\n{answer.failure}")
    return answer


def _end(children: list[tuple[BaseProcess, Connection]]) -> None:
    for process, connection in children:
        # At once and hard: a stage that has answered has nothing left to do, and one that waits in a collective for a
        # stage that is gone hears nothing gentler.
        process.kill()
        process.join()
        process.close()
        connection.close()


def _run_stage(connection: Connection, stage: _Stage) -> None:
    try:
        os.environ.update(child_environment())
        in_process()
        logging.basicConfig(level=logging.INFO, format=f"[PP{stage.pp_rank}] %(message)s")
        work, args = pickle.loads(stage.work)
        answer = _Answer(failure=None, result=pickle.dumps(_work_in_stage(work, args, stage)))
    except BaseException:  # also SystemExit: the parent reports whatever ended the stage
        answer = _Answer(failure=traceback.format_exc())
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        connection.send(answer)
        # Rank 0 holds the process group's store: a stage stays until the parent has all answers and ends it.
        connection.recv()
    # Interpreter exit would wait for threads of the process group, whose other side may be gone.
    os._exit(0)


def _work_in_stage(work: Callable[..., Any], args: tuple[object, ...], stage: _Stage) -> object:
    if stage.plugins:
        # In this order, as in a scheduler process: its target function lives in that module, and loads the plugins.
        import sglang.srt.managers.scheduler  # noqa: F401
        from sglang.srt.plugins import load_plugins

        load_plugins()
    runner = make_runner(stage.model_path, stage.pp_rank, stage.pp_size, stage.dist_port, stage.server_args)
    return work(runner, *args)
