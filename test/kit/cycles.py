"""What starts and stops, again and again, on one cache: servers with their services, and a writer that is not ours.

Both are programs of this module: ``python -c "from kit.cycles import server_main; server_main()" ORDER``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import msgspec
from sglang_warmstart.base import events, runs
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.record.way import WITHOUT_GPU
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.launch import start_service
from sglang_warmstart.node.protocol import Hello

# It is called as nvcc is. Most of the time it has an earlier cubin of the same source and flags, from nvcc itself.
_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec {nvcc} --version
source=$1 cubin=$4
shift 4
key=$({{ cat "$source"; echo "$*"; }} | sha256sum | cut -c 1-32)
count=$(wc -l < {runs})
if [ -f {memory}/$key ] && [ $((count % {every})) -ne 0 ]; then
  echo remembered >> {runs}
  sleep 0.$((count * 7 % 10))
  exec cp {memory}/$key "$cubin"
fi
echo nvcc >> {runs}
{nvcc} "$source" -cubin -o "$cubin" "$@" || exit $?
cp "$cubin" {memory}/$key.$$
mv {memory}/$key.$$ {memory}/$key
"""


class RememberingCompiler:
    """The real compiler, which mostly gives what it gave before: kernels take it seconds.

    Args:
        directory: of its own; no blanks in its path.
        nvcc: the compiler.
        every: how many runs there are to one that compiles in any case.
    """

    def __init__(self, directory: Path, nvcc: Path, every: int = 25) -> None:
        memory = directory / "memory"
        memory.mkdir(parents=True)
        self.path, self._runs = directory / "nvcc", directory / "runs"
        self._runs.touch()
        self.path.write_text(_COMPILER.format(nvcc=nvcc, runs=self._runs, memory=memory, every=every))
        self.path.chmod(0o755)

    def count(self, how: str) -> int:
        """Runs that began: "nvcc" or "remembered"."""
        return self._runs.read_text().split().count(how)


class ServerOrder(msgspec.Struct, frozen=True):
    """What a server is told.

    Args:
        cache: root of DeepGEMM's cache.
        compiler, cuda_home, deep_gemm: paths.
        targets: to ask for.
        rank: of its launch.
        limit_s: seconds for the kernels.
    """

    cache: str
    compiler: str
    cuda_home: str
    deep_gemm: str
    targets: tuple[Target, ...]
    rank: str
    limit_s: float


def server_main() -> None:
    """Start a service, ask it for targets, say what became of them in a line of JSON, and serve until stdin ends."""
    order = msgspec.json.decode(sys.argv[1], type=ServerOrder)
    directory, _ = runs.new_run(Path(order.cache))
    os.environ[EVENTS] = str(directory)
    events.open_log("main", os.environ)
    service = start_service(WITHOUT_GPU)
    said: dict[str, object] = {}
    try:
        client = ServiceClient(service.socket, 60)
        welcome = client.hello(
            Hello(
                cache=order.cache,
                environment={"CUDA_HOME": order.cuda_home, "DG_JIT_NVCC_COMPILER": order.compiler},
                deep_gemm=order.deep_gemm,
                gpu=gpu_of("h200"),
                launch={"model": "DeepSeek-V4", "rank": order.rank},
                workers=2,
            )
        )
        if welcome.problem:
            said["problem"] = welcome.problem
        else:
            restored = client.restore(30)
            answer = client.warm(order.targets, 80 << 30, order.limit_s)
            said["notes"] = [*restored.notes, *answer.notes]
            said["restored"] = restored.known
            said["errors"] = [each.error for each in answer.targets if each.error]
    except ServiceGoneError as error:
        said["gone"] = str(error)
    print(json.dumps(said), flush=True)
    events.emit("ready", "server", events.now())
    sys.stdin.read()


class WriterOrder(msgspec.Struct, frozen=True):
    """What the writer is told.

    Args:
        cache, compiler: see :class:`ServerOrder`.
        kernels: to have.
        journal: a file; see :func:`half_done`.
    """

    cache: str
    compiler: str
    kernels: tuple[RecordedKernel, ...]
    journal: str


def note(journal: str, what: str, kernel: str) -> None:
    """Add a line to the writer's journal."""
    with Path(journal).open("a") as file:
        file.write(f"{what} {kernel}\n")


def half_done(journal: Path) -> set[str]:
    """The kernels that a writer has begun, and none has finished since."""
    lines = [line.split() for line in journal.read_text().splitlines()]
    return {kernel for kernel, what in {kernel: what for what, kernel in lines}.items() if what == "begun"}


def writer_main() -> None:
    """Have kernels as a DeepGEMM of 2025 does.

    It makes a kernel's own directory first and writes kernel.cu there. When the compiler is done it renames the cubin
    into it, and ends the process if one of the two is missing then.
    """
    order = msgspec.json.decode(sys.argv[1], type=WriterOrder)
    root = Path(order.cache)
    for kernel in order.kernels:
        place = root / "cache" / kernel.directory
        files = [place / "kernel.cu", place / "kernel.cubin"]
        if all(path.exists() for path in files):
            continue
        note(order.journal, "begun", kernel.directory)
        place.mkdir(parents=True, exist_ok=True)
        files[0].write_text(kernel.source)
        scratch = root / "tmp" / uuid.uuid4().hex
        scratch.parent.mkdir(exist_ok=True)
        command = [order.compiler, str(files[0]), "-cubin", "-o", str(scratch), *kernel.flags.split()]
        subprocess.run(command, check=True)
        place.mkdir(parents=True, exist_ok=True)
        scratch.rename(files[1])
        if not all(path.exists() for path in files):
            raise SystemExit(f"{place} is not whole: {sorted(path.name for path in place.iterdir())}")
        note(order.journal, "done", kernel.directory)
        time.sleep(0.1)
    print("{}", flush=True)
