"""Record a target's kernels in a forked child. Its stubs, its CUDA context and its private cache end with it."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import msgspec

from sglang_warmstart.base.errors import first_line, one_line
from sglang_warmstart.base.processes import KILL_S, end_with_pipe
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.gemms import asked_values
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel, RecordingCompiler
from sglang_warmstart.deepgemm.target import Target


class LibraryError(ImportError):
    """A library cannot be had in this process, in one line. A forkserver goes on without the module that raises it."""


class RecordingFailed(msgspec.Struct, frozen=True, tag=True):
    """The last words of a child that could not finish.

    Args:
        reason: in one line.
        no_context: it got no CUDA context.
        no_library: DeepGEMM cannot be loaded at all.
    """

    reason: str
    no_context: bool = False
    no_library: bool = False


class RecordingDone(msgspec.Struct, frozen=True, tag=True):
    """The last words of a child that could.

    Args:
        calls: Ms that were asked.
        seconds: of the sweep alone.
    """

    calls: int
    seconds: float


class RecordingOrder(msgspec.Struct, frozen=True):
    """What a child is told.

    Args:
        target: to sweep.
        gpu: to do it on.
        environment: the variables that DeepGEMM reads.
        version: what the real compiler prints for ``--version``.
        stub: path of the stub cubin.
        directory: of this child alone.
        library: the module that calls DeepGEMM.
        jit: the name of DeepGEMM's dialect.
    """

    target: Target
    gpu: Gpu
    environment: dict[str, str]
    version: str
    stub: str
    directory: str
    library: str
    jit: str = "0.1"


class RecordingProblem(Exception):
    """A target could not be recorded."""

    def __init__(self, failed: RecordingFailed) -> None:
        super().__init__(failed.reason)
        self.failed = failed


_Words = msgspec.msgpack.Decoder(RecordingFailed | RecordingDone)


def record(
    context: ForkServerContext | SpawnContext, order: RecordingOrder, limit_s: float, stopped: Callable[[], bool]
) -> Iterator[RecordedKernel]:
    """Record a target in a child, and yield its kernels as they appear.

    Args:
        context: whose children start; with a forkserver that has imported the library they do so at once.
        limit_s: seconds after which the child is ended.
        stopped: whether to give up, asked several times a second.

    Raises:
        RecordingProblem: the child could not do it, ended without a word, or took too long.
    """
    directory = Path(tempfile.mkdtemp(dir=order.directory))
    order = msgspec.structs.replace(order, directory=str(directory))
    mine, its = context.Pipe(duplex=False)
    # Nothing is ever sent here: it is closed when this process ends, and the child with it.
    its_life, my_life = context.Pipe(duplex=False)
    arguments = (its, its_life, msgspec.msgpack.encode(order))
    process = context.Process(target=child_main, args=arguments, daemon=True)
    try:
        try:
            process.start()
        except (OSError, EOFError) as error:
            reason = f"no process for recording: {type(error).__name__}: {first_line(error)}"
            raise RecordingProblem(RecordingFailed(reason)) from error
        finally:
            its.close()
            its_life.close()
        end = time.monotonic() + limit_s
        while True:
            if stopped() or time.monotonic() > end:
                raise RecordingProblem(RecordingFailed(f"recording was ended after {limit_s:g} s"))
            if not mine.poll(0.2):
                continue
            try:
                kind, body = mine.recv_bytes(), mine.recv_bytes()
            except EOFError:
                process.join(5)
                reason = f"the recording process ended without a word (exit code {process.exitcode})"
                raise RecordingProblem(RecordingFailed(reason)) from None
            if kind == b"kernel":
                yield msgspec.msgpack.decode(body, type=RecordedKernel)
                continue
            words = _Words.decode(body)
            if isinstance(words, RecordingFailed):
                raise RecordingProblem(words)
            return
    finally:
        mine.close()
        my_life.close()
        if process.pid is not None:
            # Also one that has said all it had to: it has nothing left to tidy up.
            process.kill()
            process.join(KILL_S)
        shutil.rmtree(directory, ignore_errors=True)


def child_main(connection: Connection, life: Connection, encoded: bytes) -> None:
    """Sweep a target and send its kernels: the body of the child, which ends when the other side of ``life`` does."""
    end_with_pipe(life)
    order = msgspec.msgpack.decode(encoded, type=RecordingOrder)
    try:
        words: RecordingFailed | RecordingDone = _sweep(connection, order)
    except BrokenPipeError:
        return  # nobody is there to hear
    except Exception as error:
        words = RecordingFailed(one_line(error))
    with contextlib.suppress(BrokenPipeError):
        connection.send_bytes(b"words")
        connection.send_bytes(msgspec.msgpack.encode(words))
    # The context may be beyond repair, and there is nothing left to tidy up.
    os._exit(0)


def _sweep(connection: Connection, order: RecordingOrder) -> RecordingFailed | RecordingDone:
    dialect = dialects.named(order.jit)
    for name in dialect.settings(os.environ):
        del os.environ[name]
    os.environ.update(order.environment)
    compiler = RecordingCompiler(Path(order.directory), dialect)
    compiler.install(os.environ, version=order.version, stub=Path(order.stub))
    try:
        library: Any = importlib.import_module(order.library)
    except Exception as error:
        reason = first_line(error) if isinstance(error, LibraryError) else one_line(error)
        return RecordingFailed(reason, no_library=True)
    try:
        library.open_device(order.gpu)
    except Exception as error:
        return RecordingFailed(f"no CUDA context for recording: {first_line(error)}", no_context=True)
    call = library.prepare(order.target, order.target.m_max)
    start, asked = time.perf_counter(), asked_values(order.target)
    for kernel in compiler.sweep(call, asked):
        connection.send_bytes(b"kernel")
        connection.send_bytes(msgspec.msgpack.encode(kernel))
    return RecordingDone(len(asked), time.perf_counter() - start)
