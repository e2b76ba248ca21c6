"""The command before DeepGEMM's compiler runs it, whatever becomes of those who listen."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_warmstart.libraries import deep_gemm_front as compiler_command


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.setblocking(False)
        yield listening


def run(place: Path, *compiler: str, refuse: str = "0", ready: str = "ready") -> subprocess.CompletedProcess[str]:
    words = [str(place / "socket"), str(place / ready), refuse, *compiler]
    command = [sys.executable, "-IS", compiler_command.__file__, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_both_ends_of_a_run_are_told(listener: socket.socket, tmp_path: Path) -> None:
    assert run(tmp_path, "/bin/sh", "-c", "exit 3").returncode == 3
    assert b'"begins": "-c"' in listener.recv(4096)
    assert b'"status": 3' in listener.recv(4096)


def test_a_listener_that_is_gone_does_not_matter(tmp_path: Path) -> None:
    assert run(tmp_path, "/bin/true").returncode == 0


def test_a_listener_that_never_reads_does_not_stop_a_compile(listener: socket.socket, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                other.sendto(b"{}", str(tmp_path / "socket"))
    begin = time.monotonic()
    assert run(tmp_path, "/bin/sh", "-c", f"echo compiled > {tmp_path}/out").returncode == 0
    assert (tmp_path / "out").read_text() == "compiled\n"
    # It did wait, for as long as it may, at both ends: the queue was full.
    assert time.monotonic() - begin > 2 * compiler_command.SPEAK_LIMIT_S


def test_what_is_refused_is_not_compiled(listener: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    result = run(tmp_path, "/bin/sh", "-c", f"echo compiled > {tmp_path}/out", refuse="1")
    assert result.returncode == 1
    assert result.stderr.startswith("refused: SGLANG_WARMSTART_JIT_MONITOR=error")
    assert not (tmp_path / "out").exists()
    assert b'"begins": "-c"' in listener.recv(4096)
    assert b'"refused": true' in listener.recv(4096)
    assert run(tmp_path, "/bin/true", refuse="1", ready="not yet").returncode == 0
    # The run's directory is removed only when its start-up is long over.
    assert run(tmp_path, "/bin/true", refuse="1", ready="removed/ready").returncode == 1


def test_who_is_refused_waits_until_the_listener_has_looked(listener: socket.socket, tmp_path: Path) -> None:
    # What it looks at, the source and the call, is gone afterwards.
    (tmp_path / "ready").touch()
    words = [str(tmp_path / "socket"), str(tmp_path / "ready"), "1", "/bin/false", "kernel.cu"]
    listener.settimeout(60)
    with subprocess.Popen([sys.executable, "-IS", compiler_command.__file__, *words]) as process:
        message, address = listener.recvfrom(4096)
        assert b'"begins": "kernel.cu"' in message
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(compiler_command.SPEAK_LIMIT_S / 2)
        listener.sendto(b"heard", address)
        message, _ = listener.recvfrom(4096)
        assert b'"refused": true' in message
        assert process.wait(60) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"ready", "socket"}


def test_a_compiler_that_is_not_there_is_said(listener: socket.socket, tmp_path: Path) -> None:
    result = run(tmp_path, str(tmp_path / "nvcc"))
    assert (result.returncode, result.stderr) == (127, f"{tmp_path / 'nvcc'}: No such file or directory\n")
