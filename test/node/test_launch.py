"""The service begins and ends with its parent, however that ends, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from kit.fake_nvcc import HANG
from kit.node import STANDIN, Node, Place, wait_until
from kit.standin_library import definition
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node import service
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.launch import start_service
from sglang_warmstart.node.protocol import Answer

TARGET = Target(kernel_type="GEMM_NT_F8F8BF16", n=2112, k=7168, num_groups=1, num_sms=132, m_max=150)
PLENTY = 100 << 30
HANGING = msgspec.structs.replace(TARGET, kernel_type="a GEMM that hangs at 20")


@dataclass
class Busy:
    """A node in the middle of its work: a child hangs in the driver, compilers hang, and a rank waits for them."""

    node: Node
    waiting: Future[Answer]


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    place = Place(tmp_path)
    place.nvcc.on_each_kernel(HANG)
    with ThreadPoolExecutor() as threads, Node(tmp_path) as node:
        waiting = threads.submit(place.rank(node).warm, [HANGING], PLENTY, 300.0)
        # The compilers of the two kernels that are found before the child hangs, and what each of them has started.
        assert wait_until(lambda: len(node.processes("sleep")) == 2)
        yield Busy(node, waiting)


def kill_parent(node: Node) -> None:
    node.parent.kill()


def end_parent(node: Node) -> None:
    node.end()


def terminate_service(node: Node) -> None:
    os.kill(node.service, signal.SIGTERM)
    # All that is of the service goes with it: the parent lives on.
    assert wait_until(lambda: [process.pid for process in node.processes()] == [node.parent.pid])
    node.parent.kill()


@pytest.mark.parametrize("end", [kill_parent, end_parent, terminate_service])
def test_nothing_is_left_when_the_service_ends_in_the_middle_of_its_work(
    busy: Busy, end: Callable[[Node], None]
) -> None:
    start = time.monotonic()
    end(busy.node)
    assert busy.node.left(5) == []
    assert time.monotonic() - start < 5
    assert not busy.node.socket.parent.exists()
    with pytest.raises(ServiceGoneError, match=r"the service (has closed the connection|is gone)"):
        busy.waiting.result(5)


def test_a_service_does_not_wait_for_a_lock_before_it_ends(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with ThreadPoolExecutor() as threads, Node(tmp_path) as node:
        rank = place.rank(node)
        rank.warm([TARGET], PLENTY, 30)
        (lock,) = place.cache.locks.directory.glob("marker-*.lock")
        held = place.cache.locks.take(lock.stem)
        assert held is not None
        with held:
            waiting = threads.submit(rank.warm, [TARGET], PLENTY, 30)
            time.sleep(0.2)
            assert not waiting.done()
            os.kill(node.service, signal.SIGTERM)
            assert wait_until(lambda: not node.socket.parent.exists(), 5)


def test_a_service_that_is_killed_is_noticed_and_takes_its_children_along(busy: Busy) -> None:
    node = busy.node
    # A compiler knows nothing of the service, and comes to its own end.
    compilers = {process.pid for process in node.processes("nvcc", "sleep")}
    os.kill(node.service, signal.SIGKILL)
    with pytest.raises(ServiceGoneError, match="the service has closed the connection"):
        busy.waiting.result(5)
    assert wait_until(lambda: {process.pid for process in node.processes()} == {node.parent.pid, *compilers}, 5)
    with pytest.raises(ServiceGoneError, match=f"no service at {node.socket}"):
        ServiceClient(node.socket, wait_s=0.1)


def test_the_next_start_removes_what_a_killed_service_has_left(busy: Busy, tmp_path: Path) -> None:
    left = busy.node.socket.parent
    assert left.exists()
    os.kill(busy.node.service, signal.SIGKILL)
    busy.node.parent.kill()
    busy.node.parent.wait()
    place = Place(tmp_path / "next")
    with Node(place.directory) as following:
        assert wait_until(lambda: not left.exists())
        with Node(place.directory):  # which finds one that is in use
            assert following.socket.parent.exists()
            place.rank(following)


def warm_one(node: Node, place: Place) -> None:
    """Ask for a target, from its recording to the cache."""
    (answer,) = place.rank(node).warm([TARGET], PLENTY, 30).targets
    assert (answer.error, answer.kernels) == ("", definition(TARGET))


def test_neither_the_service_nor_its_children_import_what_lies_above_the_package(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        warm_one(node, Place(tmp_path))
        ours = [process for process in node.processes() if process.pid != node.parent.pid]
        assert len(ours) > 1, "the service and its forkserver"
        # In SGLang's tree that would be SGLang, and so torch.
        for process in ours:
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), process


@pytest.mark.parametrize("prefix", ["a-very-long-name-" + 80 * "x", "a b; $(c)"])
def test_any_directory_will_do_for_temporary_files(tmp_path: Path, prefix: str) -> None:
    # Sockets have short paths, and DeepGEMM quotes none.
    with tempfile.TemporaryDirectory(prefix=prefix) as temporary:
        with Node(tmp_path, TMPDIR=temporary) as node:
            warm_one(node, Place(tmp_path))
        # As if it had been killed.
        left = node.socket.parent
        left.mkdir()
        (left / "alive").touch()
        (tmp_path / "next").mkdir()
        with Node(tmp_path / "next", TMPDIR=temporary):
            assert not left.exists()


def test_all_that_the_service_leaves_while_it_works_is_in_its_own_directory(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="short-") as temporary,
        Node(tmp_path, TMPDIR=temporary) as node,
    ):
        warm_one(node, Place(tmp_path))
        assert list(Path(temporary).iterdir()) == [node.socket.parent]
        node.end()
        assert list(Path(temporary).iterdir()) == []


def test_the_directory_is_private(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        assert node.socket.parent.stat().st_mode & 0o077 == 0


def test_a_rank_may_come_before_the_service_listens(tmp_path: Path) -> None:
    path = tmp_path / "late.sock"
    with ThreadPoolExecutor() as threads, socket.socket(socket.AF_UNIX) as late:
        rank = threads.submit(ServiceClient, path, 10.0)
        time.sleep(0.1)
        assert not rank.done()
        late.bind(str(path))
        late.listen()
        rank.result(5).close()


def test_control_c_is_for_the_server(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.client()
        os.kill(node.service, signal.SIGINT)
        warm_one(node, Place(tmp_path))
        assert os.getsid(node.service) != os.getsid(node.parent.pid)


def test_a_fork_of_the_parent_ends_without_the_service(tmp_path: Path) -> None:
    script = """
import os, sys
from sglang_warmstart.node.launch import start_service
service = start_service("kit.standin_library")
if os.fork() == 0:
    sys.exit()
os.wait()
print(service.socket.parent, service.socket.parent.exists(), service.process.poll())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    directory, exists, status = ended.stdout.split()
    assert (exists, status) == ("True", "None")
    assert not Path(directory).exists()


def test_a_start_that_fails_leaves_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="short-") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        monkeypatch.setattr(sys, "executable", f"{temporary}/no-python")
        with pytest.raises(FileNotFoundError):
            start_service(STANDIN)
        assert list(Path(temporary).iterdir()) == []


def run_service(path: Path, parent: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", service.__name__, "--socket", str(path), "--library", STANDIN]
    command += ["--parent", str(os.getpid() if parent is None else parent)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=20)


def test_a_socket_path_that_is_taken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sglang-warmstart-taken" / "service.sock"
    path.parent.mkdir()
    path.write_bytes(b"somebody else's")
    ended = run_service(path)
    assert ended.returncode == 2
    assert ended.stderr == f"warmstart service: {path} is taken: name another --socket\n"
    assert path.read_bytes() == b"somebody else's"


def test_a_socket_path_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "service.sock"
    ended = run_service(path)
    assert ended.returncode == 1
    assert ended.stderr == f"warmstart service: {path} cannot be served: No such file or directory\n"


def test_a_service_whose_parent_is_gone_ends_at_once_and_removes_no_directory_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "somebody else's").touch()
    ended = run_service(tmp_path / "service.sock", parent=1 << 22)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "somebody else's").exists()


def write_hanging_nvrtc(modules: Path, compiling: Path) -> None:
    """Stand in for NVRTC's bindings, whether or not they are installed."""
    bindings = modules / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    (modules / "cuda" / "__init__.py").touch()
    (bindings / "__init__.py").touch()
    text = f"""
import enum, pathlib, time
nvrtcResult = enum.Enum("nvrtcResult", "NVRTC_SUCCESS")
def nvrtcVersion():
    return nvrtcResult.NVRTC_SUCCESS, 13, 0
def nvrtcCreateProgram(*arguments):
    pathlib.Path({str(compiling)!r}).touch()
    time.sleep(1000)
"""
    (bindings / "nvrtc.py").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_that_compile_by_nvrtc_end_with_the_service(tmp_path: Path, number: signal.Signals) -> None:
    write_hanging_nvrtc(tmp_path, tmp_path / "compiling")
    place = Place(tmp_path)
    with Node(tmp_path, modules=tmp_path) as node:
        place.rank(node, place.hello(kind="nvrtc")).announce([TARGET], PLENTY)
        assert wait_until((tmp_path / "compiling").exists)
        os.kill(node.service, number)
        assert wait_until(lambda: [process.pid for process in node.processes()] == [node.parent.pid], 5)
