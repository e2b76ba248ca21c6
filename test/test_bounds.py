"""Every wait has a bound. docs/bounds.md lists them, and here each that is shown nowhere else expires."""

from __future__ import annotations

import ast
import asyncio
import importlib
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kit.bundles import identity
from kit.node import GPU
from kit.recorded import real_cubin, recording
from kit.scripted_compiler import write_copying_compiler
from sglang_warmstart.base import files, processes
from sglang_warmstart.base.locks import Locks
from sglang_warmstart.base.private_directory import make_directory
from sglang_warmstart.base.processes import OwnProcess
from sglang_warmstart.deepgemm import cache as caches
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import marker as markers
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import CompilerError
from sglang_warmstart.deepgemm.nogpu import build
from sglang_warmstart.libraries import machine, ninja
from sglang_warmstart.node import pool, protocol, service

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "sglang_warmstart"
# How often something is looked at, and for how long something is kept: nobody waits for that.
NO_WAIT = re.compile(r"TRY|CHECK|LOOK|KEPT|LEFT")
# Commands of an operator, and what they alone do: no server waits for them.
COMMANDS = ("cli/", "report/", "bundle/build.py", "bundle/cluster.py")
SHORT_S = 0.3


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "bounds.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


def constants() -> dict[str, float]:
    """The seconds that modules name, by "file NAME"."""
    found = {}
    files_of_servers = (
        path for path in PACKAGE.rglob("*.py") if not str(path.relative_to(PACKAGE)).startswith(COMMANDS)
    )
    for path in files_of_servers:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.endswith("_S") and isinstance(node.value, ast.Constant) and not NO_WAIT.search(name):
                    found[f"{path.relative_to(PACKAGE)} {name}"] = float(node.value.value)
    return found


def test_the_page_has_every_wait_with_its_limit() -> None:
    assert {row[1].strip("`"): float(row[2].removesuffix(" s")) for row in rows()} == constants()


@pytest.mark.parametrize("shown_by", sorted({row[4].strip("`") for row in rows()}))
def test_each_is_seen_to_expire_by_a_test_that_is_there(shown_by: str) -> None:
    path, _, name = shown_by.partition("::")
    assert f"def {name}(" in (ROOT / "test" / path).read_text(encoding="utf-8")


# Those that are shown nowhere else


def took(start: float) -> bool:
    return SHORT_S <= time.monotonic() - start < 30


def slow(directory: Path, name: str) -> Path:
    """A program that does not come to an end."""
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    return program


def test_a_process_that_does_not_end_by_itself_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_S", SHORT_S)
    directory, alive = make_directory()
    process = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; sleep 60"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    start = time.monotonic()
    with alive, process.stdout:
        OwnProcess(directory, process).stop()
    assert took(start) and process.poll() is not None and not directory.exists()


class _Immortal:
    """A process that waits in a file system for good, as its parent sees it."""

    pid = 1 << 30  # there is none

    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def poll(self) -> None: ...

    def wait(self, limit_s: float | None = None) -> int:
        assert limit_s is not None, "it would be waited for for ever"
        time.sleep(limit_s)
        raise subprocess.TimeoutExpired("it", limit_s)


def test_a_process_that_no_signal_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_S", SHORT_S / 2)
    monkeypatch.setattr(processes, "KILL_S", SHORT_S / 2)
    monkeypatch.setattr(compilers, "KILL_S", SHORT_S)
    directory, alive = make_directory()
    start = time.monotonic()
    with alive:
        OwnProcess(directory, cast(Any, _Immortal())).stop()
    assert took(start) and not directory.exists()
    start = time.monotonic()
    compilers._Running().end(cast(Any, _Immortal()))
    assert took(start)


def test_a_service_that_ends_does_not_wait_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(service.Service):
        async def keep_further(self, service: Path) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(service, "END_S", SHORT_S)
    monkeypatch.setattr(service.compilers, "end_all_runs", lambda: None)  # those of this process run on
    start = time.monotonic()
    assert asyncio.run(service.run(Stuck(tmp_path), tmp_path / "socket", parent=0)) == 0
    assert took(start)


def test_a_service_that_was_started_early_does_not_wait_for_a_server_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "UNCALLED_S", SHORT_S)
    monkeypatch.setattr(service.compilers, "end_all_runs", lambda: None)
    start = time.monotonic()
    early = service.Service(tmp_path, early=True)
    assert asyncio.run(service.run(early, tmp_path / "socket", parent=os.getppid())) == 0
    assert took(start)


@pytest.mark.parametrize(
    ("said", "goes_on"),
    [
        (protocol.BuildPlanned(""), True),
        (protocol.Expect(protocol.Hello("/nowhere", {}, "/nowhere", GPU, {}), ()), False),
    ],
    ids=["a server", "who looks for targets"],
)
def test_but_one_that_a_server_has_called_goes_on(
    said: protocol.Message, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "UNCALLED_S", SHORT_S)

    async def call() -> None:
        called = service.Service(tmp_path, early=True)
        server = await asyncio.start_unix_server(called.serve, tmp_path / "socket")
        _, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(protocol.encode(said))
        writer.close()
        await asyncio.sleep(2 * SHORT_S)
        assert called.is_forgotten != goes_on
        server.close()

    asyncio.run(call())


def test_a_kernel_whose_lock_is_held_is_compiled_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOCK_S", SHORT_S)
    compiler = write_copying_compiler(tmp_path)
    kernel = recording().relocated(next(iter(recording().kernels)), tmp_path)
    cache = KernelCache(tmp_path / "root")
    held = Locks(cache.own / "locks").take(kernel.directory)
    start = time.monotonic()

    async def ensure() -> None:
        with ThreadPoolExecutor(1) as executor:
            await pool.CompilePool(executor, cache, compiler.compiler, pool_watcher(), 20).ensure(kernel)

    asyncio.run(ensure())
    assert took(start) and cache.has(kernel.directory) and held is not None


def pool_watcher() -> Any:
    def nothing() -> None: ...

    return SimpleNamespace(planned=nothing, started=nothing, ended=nothing, finished=nothing)


def test_a_marker_whose_lock_is_held_is_written_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "LOCK_S", SHORT_S)
    all_markers = markers.Markers(KernelCache(tmp_path), identity())
    path = all_markers.path({})
    held = Locks(all_markers.cache.own / "locks").take(f"marker-{path.parent.name}-{path.stem}")
    start = time.monotonic()
    assert all_markers.add({}, []) and took(start) and path.is_file() and held is not None


def test_a_kernel_of_another_machine_is_looked_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "VISIBLE_S", SHORT_S)
    monkeypatch.setattr(files, "put", lambda *_, **__: False)  # there is one, and it cannot be seen yet
    cache, start = KernelCache(tmp_path), time.monotonic()
    cache.publish("kernel.a.b", "source", real_cubin())
    assert took(start)


def test_a_compiler_that_does_not_say_which_it_is_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "VERSION_S", SHORT_S)
    start = time.monotonic()
    with pytest.raises(CompilerError, match="timed out"):
        compilers.find({"DG_JIT_NVCC_COMPILER": str(slow(tmp_path, "nvcc"))})
    assert took(start)


def test_stand_ins_that_take_too_long_to_compile_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LIMIT_S", SHORT_S)
    start = time.monotonic()
    with pytest.raises(build.StandInsError, match="timed out"):
        build._compile(str(slow(tmp_path, "cc")), build.StandIn("libcuda.so.1", ("DRIVER",)), tmp_path)
    assert took(start)


@pytest.mark.parametrize("asked", ["a version", "whether there is work"])
def test_a_program_that_does_not_answer_is_done_without(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_PROGRAM_LIMIT_S", SHORT_S)
    monkeypatch.setattr(ninja, "_ASK_LIMIT_S", SHORT_S)
    slow(tmp_path, "ninja")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = time.monotonic()
    if asked == "a version":
        assert machine.program_version("ninja", os.environ) == "not there"
    else:
        assert ninja._has_work(tmp_path, tmp_path / "build.ninja") is False
    assert took(start)


def test_a_call_that_fails_waits_a_moment_to_be_told_that_it_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = importlib.import_module("sglang_warmstart.libraries.deep_gemm_watch")
    monkeypatch.setattr(watch, "_REFUSAL_WAIT_S", SHORT_S)
    start = time.monotonic()
    told = SimpleNamespace(_told=watch.threading.Condition(), _refusals=[])
    (command,) = (each for each in vars(watch).values() if hasattr(each, "refusal"))
    assert command.refusal(told) is None and took(start)


def test_an_sglang_that_does_not_say_where_its_caches_are_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = importlib.import_module("sglang_warmstart.sglang.caches")
    monkeypatch.setattr(asking, "_ASK_LIMIT_S", SHORT_S)
    (tmp_path / "environ.py").write_text("import time; time.sleep(60)\n")
    start = time.monotonic()
    with pytest.raises(OSError, match="does not say where its caches are"):
        asking._asked(tmp_path / "environ.py", os.environ)
    assert took(start)
