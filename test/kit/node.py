"""A node of a server: a process that has started the service, and all that this starts in turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from sglang_warmstart.base.private_directory import remove_directory
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import Kind
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.node.client import ServiceClient
from sglang_warmstart.node.protocol import Hello, Welcome

from kit.environment import python_path
from kit.fake_nvcc import FakeNvcc

STANDIN = "kit.standin_library"
GPU = Gpu("NVIDIA H200", 132, (9, 0), 0)

# Every process of a node has it in its environment, wherever it has gone in the tree of processes.
_MARK = "KIT_NODE"

_PARENT = """
import json, pathlib, sys
from sglang_warmstart.node.launch import start_service
library, finder, *paths = sys.argv[1:]
paths = [pathlib.Path(path) if path else None for path in paths]
finder = json.loads(finder)
service = start_service(library or None, *paths[:2], build_plan=paths[2], guesses=paths[3], finder=finder)
print(service.process.pid, service.socket, flush=True)
sys.stdin.read()
"""


class Node:
    """The process starts on entering the context, and everything that it has started is gone after leaving it.

    Args:
        directory: for the log.
        library: what the service takes for DeepGEMM; empty for what it would choose.
        modules: a directory from which its processes import, too.
        restoring, plans, build_plan, guesses, finder: as of ``start_service``.
        environment: on top of this process's own.
    """

    def __init__(
        self,
        directory: Path,
        library: str = STANDIN,
        modules: Path | None = None,
        restoring: Path | None = None,
        plans: Path | None = None,
        build_plan: Path | None = None,
        guesses: Path | None = None,
        finder: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self._log = directory / "log"
        self._mark = uuid.uuid4().hex
        own = {"PYTHONPATH": python_path(Path(__file__).parents[1], modules), _MARK: self._mark}
        self._environment = {**os.environ, **own, **environment}
        self._options = [
            library,
            json.dumps(finder),
            *(str(path or "") for path in (restoring, plans, build_plan, guesses)),
        ]
        self._clients: list[ServiceClient] = []

    def __enter__(self) -> Node:
        with self._log.open("wb") as log:
            self.parent = subprocess.Popen(
                [sys.executable, "-c", _PARENT, *self._options],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.parent.stdout is not None
        said = self.parent.stdout.readline()
        assert said, f"no service was started:\n{self.log}"
        pid, path = said.rstrip("\n").split(" ", 1)
        self.service, self.socket = int(pid), Path(path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        # One that is being started is not in the list yet; it ends with the others, or is in the next one.
        end = time.monotonic() + 5
        while (processes := self.processes()) and time.monotonic() < end:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)
        self.parent.wait()
        for pipe in (self.parent.stdin, self.parent.stdout):
            assert pipe is not None
            pipe.close()
        if left := self.left():
            raise RuntimeError(f"processes of the node survived SIGKILL: {left}")
        remove_directory(self.socket.parent)

    def end(self) -> int:
        """Let the parent come to its own end. Returns its status."""
        assert self.parent.stdin is not None
        self.parent.stdin.close()
        return self.parent.wait(20)

    def client(self, wait_s: float = 30.0) -> ServiceClient:
        """A connection to the service."""
        self._clients.append(ServiceClient(self.socket, wait_s))
        return self._clients[-1]

    @property
    def log(self) -> str:
        """What all its processes wrote to their standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def processes(self, *names: str) -> list[psutil.Process]:
        """All that live, or those with one of these names."""
        return [process for process, name in self._processes() if not names or name in names]

    def is_running(self, command: str) -> bool:
        """Whether one of them has this in its command line."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if command in " ".join(process.cmdline()):
                    return True
        return False

    def left(self, limit_s: float = 10.0) -> list[psutil.Process]:
        """Those that live when the time is up; returns as soon as there are none."""
        self.parent.poll()
        wait_until(lambda: not self.processes(), limit_s)
        return self.processes()

    def _processes(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process, process.name()


@dataclass
class Place:
    """A cache and a compiler, and what a rank says of them.

    Args:
        directory: of all this.
    """

    directory: Path
    nvcc: FakeNvcc = field(init=False)

    def __post_init__(self) -> None:
        self.nvcc = FakeNvcc(self.directory / "nvcc")
        # What shows its dialect; nobody here reads a header.
        (self.deep_gemm / "include" / "deep_gemm").mkdir(parents=True, exist_ok=True)

    @property
    def deep_gemm(self) -> Path:
        """The directory of the package."""
        return self.directory / "deep_gemm"

    @property
    def cache(self) -> KernelCache:
        """DeepGEMM's."""
        return KernelCache(self.directory / "kernels")

    def hello(self, *, gpu: Gpu = GPU, launch: Launch | None = None, kind: Kind = "nvcc", **environment: str) -> Hello:
        """A rank's first words."""
        return Hello(
            cache=str(self.cache.root),
            environment={"DG_JIT_NVCC_COMPILER": str(self.nvcc.path), **environment},
            deep_gemm=str(self.deep_gemm),
            gpu=gpu,
            launch=launch or {"model": "DeepSeek-V3", "rank": "0"},
            kind=kind,
            workers=4,
        )

    def rank(self, node: Node, hello: Hello | None = None) -> ServiceClient:
        """A rank that has been welcomed."""
        client = node.client()
        assert client.hello(hello or self.hello()) == Welcome()
        return client


def wait_until(condition: Callable[[], object], limit_s: float = 10.0) -> bool:
    """Wait for a condition. Returns whether it has come true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
