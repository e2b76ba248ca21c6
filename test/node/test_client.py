"""A rank's side, where the service does not do as it should: a wait ends, and an answer is never mistaken."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node import client as client_module
from sglang_warmstart.node import protocol
from sglang_warmstart.node.client import ServiceClient, ServiceGoneError
from sglang_warmstart.node.protocol import Announce, Answer, Restore, Warm, Warmed, Welcome

TARGET = Target(kernel_type="GEMM_NT_F8F8BF16", n=2112, k=7168, num_groups=1, num_sms=132, m_max=100)


@contextmanager
def served_by(directory: Path, serve: Callable[[socket.socket], None]) -> Iterator[ServiceClient]:
    """A client of something that stands where the service does, and waits 0.3 s for its answers."""
    path = directory / "service.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        client = ServiceClient(path, wait_s=0.3)
        try:
            yield client
        finally:
            client.close()
            thread.join(10)


def read(connection: socket.socket) -> protocol.Message | None:
    prefix = connection.recv(protocol.LENGTH.size, socket.MSG_WAITALL)
    if not prefix:
        return None
    return protocol.decode(connection.recv(protocol.length_of(prefix), socket.MSG_WAITALL))


def test_questions_and_answers_go_both_ways(tmp_path: Path) -> None:
    heard: list[protocol.Message | None] = []
    answers = [Answer(()), Answer((Warmed(TARGET),), compiled=3)]

    def serve(connection: socket.socket) -> None:
        for answer in answers:
            heard.append(read(connection))
            # In pieces, as a socket may hand it over.
            for byte in protocol.encode(answer):
                connection.sendall(bytes([byte]))
        heard.append(read(connection))

    with served_by(tmp_path, serve) as client:
        assert client.restore() == answers[0]
        assert client.warm([TARGET], 7, 1.5) == answers[1]
        client.announce([TARGET], 7)
    assert heard == [Restore(), Warm((TARGET,), 7, 1.5), Announce((TARGET,), 7)]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "the service has closed the connection"),
        (protocol.encode(Answer(()))[:-1], "the service has closed the connection"),
        (protocol.encode(Welcome(problem="say Hello first")), "does not answer a Restore, it says: say Hello first"),
        (protocol.encode(Restore()), "does not answer a Restore, it says: Restore"),
        (b"\0\0\0\5hello", "the service cannot be understood: not a message"),
        (b"HTTP/1.1 400 Bad Request", "the service cannot be understood: a message of 1213486160 bytes"),
    ],
    ids=["nothing", "cut off", "another answer", "a question", "no message", "http"],
)
def test_a_service_that_answers_otherwise_counts_as_gone(tmp_path: Path, sent: bytes, reason: str) -> None:
    def serve(connection: socket.socket) -> None:
        read(connection)
        connection.sendall(sent)

    with served_by(tmp_path, serve) as client, pytest.raises(ServiceGoneError, match=reason):
        client.restore()


def test_a_wait_for_an_answer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LATE_S", 0.2)

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"\0")  # and no more
        while read(connection):
            pass

    with served_by(tmp_path, serve) as client:
        start = time.monotonic()
        with pytest.raises(ServiceGoneError, match="the service does not answer"):
            client.warm([TARGET], 7, 0.2)
        assert 0.4 <= time.monotonic() - start < 3


def test_an_answer_that_is_late_is_not_taken_for_the_next(tmp_path: Path) -> None:
    asked_again = threading.Event()

    def serve(connection: socket.socket) -> None:
        read(connection)
        asked_again.wait(5)
        with suppress(BrokenPipeError):
            connection.sendall(protocol.encode(Answer((), compiled=1)))

    with served_by(tmp_path, serve) as client:
        with pytest.raises(ServiceGoneError, match="the service does not answer"):
            client.restore(limit_s=0)
        threading.Timer(0.1, asked_again.set).start()
        with pytest.raises(ServiceGoneError, match="the service is gone"):
            client.restore()


def test_a_service_that_hears_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    gone = threading.Event()

    def serve(_: socket.socket) -> None:
        gone.wait(10)

    with served_by(tmp_path, serve) as client:
        with pytest.raises(ServiceGoneError, match="the service is gone: timed out"):
            for _ in range(1000):
                client.announce([TARGET] * 1000, 7)
        gone.set()


@pytest.mark.parametrize("path", ["missing.sock", 200 * "x"])
def test_where_nobody_listens_the_wait_ends(tmp_path: Path, path: str) -> None:
    with pytest.raises(ServiceGoneError, match=f"no service at {tmp_path / path}"):
        ServiceClient(tmp_path / path, wait_s=0.1)


def test_a_service_whose_directory_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ServiceGoneError, match="no service at"):
        ServiceClient(tmp_path / "gone" / "service.sock", wait_s=30.0)
    assert time.monotonic() - start < 10


def test_a_service_that_accepts_nobody_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        clients = []
        with pytest.raises(ServiceGoneError, match="no service at"):
            for _ in range(3):  # one of them waits to be accepted
                clients.append(ServiceClient(path, wait_s=0.1))
        for client in clients:
            client.close()
