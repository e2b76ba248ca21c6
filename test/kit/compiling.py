"""Have a pool compile kernels: in this process, or in one that can be raced, limited and killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import msgspec
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.node.pool import CompilePool, KernelError, Places

from kit.environment import python_path


class Tally:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.wanted = self.given = self.ran = self.done = 0

    def planned(self) -> None:
        self.wanted += 1

    def started(self) -> None:
        self.given += 1

    def ended(self) -> None:
        self.ran += 1

    def finished(self) -> None:
        self.done += 1


class Order(msgspec.Struct, frozen=True):
    """What to compile, and where to."""

    cache: Path
    compiler: Compiler
    kernels: tuple[RecordedKernel, ...]
    workers: int = 2
    limit_s: float = 120.0


class Outcome(msgspec.Struct, frozen=True):
    """What became of it.

    Args:
        compiled: kernels that this pool compiled itself.
        errors: of the kernels that could not be.
    """

    compiled: int
    errors: tuple[str, ...] = ()


def compile_all(order: Order, watcher: Tally | None = None) -> Outcome:
    """Compile the kernels side by side in this process."""
    return asyncio.run(_compile_all(order, watcher or Tally()))


async def _compile_all(order: Order, watcher: Tally) -> Outcome:
    with ThreadPoolExecutor(order.workers) as executor:
        cache = KernelCache(order.cache)
        pool = CompilePool(executor, cache, order.compiler, watcher, order.limit_s, Places(order.workers))
        ended = await asyncio.gather(*(pool.ensure(kernel) for kernel in order.kernels), return_exceptions=True)
    errors = [each for each in ended if each is not None]
    for error in errors:
        if not isinstance(error, KernelError):
            raise error
    return Outcome(pool.compiled, tuple(map(str, errors)))


class CompilingProcess:
    """A process that carries out one order. It is killed on leaving the context, if it has not ended."""

    def __init__(self) -> None:
        here = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={**os.environ, "PYTHONPATH": python_path(here)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> CompilingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def wait_until_ready(self) -> None:
        """Return when it waits for its order."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def give(self, order: Order) -> None:
        """Have it begin."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(order, enc_hook=str))
        self.process.stdin.close()

    def outcome(self) -> Outcome:
        """What became of the order, when that is decided."""
        assert self.process.stdout is not None
        return msgspec.json.decode(self.process.stdout.read(), type=Outcome)


def compile_in_processes(orders: Sequence[Order]) -> list[Outcome]:
    """Carry out each order in a process of its own; all of them begin together."""
    with ExitStack() as stack:
        processes = [stack.enter_context(CompilingProcess()) for _ in orders]
        for process in processes:
            process.wait_until_ready()
        for process, order in zip(processes, orders, strict=True):
            process.give(order)
        return [process.outcome() for process in processes]


def main() -> None:
    """The body of such a process."""
    print("ready", flush=True)
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order, dec_hook=lambda kind, text: kind(text))
    sys.stdout.buffer.write(msgspec.json.encode(compile_all(order)))


if __name__ == "__main__":
    main()
