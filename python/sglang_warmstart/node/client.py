"""The client of the service, used by a rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.node import protocol
from sglang_warmstart.node.protocol import (
    Announce,
    Answer,
    AwaitBuilds,
    Build,
    BuildPlanned,
    Built,
    CannotDescribe,
    Compiled,
    Expect,
    Hello,
    Restore,
    Warm,
    Welcome,
)

# To listen, and to give a short answer.
ANSWER_S = 30.0
# The service keeps to a limit itself; this is for one that does not answer at all.
LATE_S = 15.0
# For kernels that somebody is restoring into the cache when a rank asks for them.
RESTORE_LIMIT_S = 180.0

A = TypeVar("A", Welcome, Answer, Built)


class ServiceGoneError(Exception):
    """The service does not answer; says how that showed."""


class ServiceClient:
    """A connection to the service of this node.

    Args:
        path: of its socket.
        wait_s: seconds to wait for the service to listen, and for a short answer.

    Raises:
        ServiceGoneError: nobody listens.
    """

    def __init__(self, path: Path, wait_s: float = ANSWER_S) -> None:
        self._wait_s = wait_s
        self._socket = _connected(path, wait_s)

    def hello(self, hello: Hello) -> Welcome:
        """Say who asks.

        Raises:
            ServiceGoneError: no answer.
        """
        return self._ask(hello, Welcome, self._wait_s)

    def restore(self, limit_s: float = RESTORE_LIMIT_S) -> Answer:
        """The targets of this launch's marker, if all their kernels are in the cache.

        Args:
            limit_s: seconds to wait for whoever is restoring kernels.

        Raises:
            ServiceGoneError: no answer.
        """
        return self._ask(Restore(), Answer, self._wait_s + limit_s)

    def left_out(self, target: str, reason: str) -> None:
        """Say that a target cannot be described.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(CannotDescribe(target, reason))

    def announce(self, targets: Iterable[Target], free_bytes: int) -> None:
        """Have work begin on targets that will be asked for.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(Announce(tuple(targets), free_bytes))

    def expect(self, hello: Hello, targets: Iterable[Target]) -> None:
        """Have work begin on targets that ranks will ask for; there need have been no :meth:`hello`.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(Expect(hello, tuple(targets)))

    def warm(self, targets: Iterable[Target], free_bytes: int, limit_s: float, searched: bool = False) -> Answer:
        """Wait until the kernels of all targets are in the cache, or the time is up.

        Args:
            limit_s: seconds. A service that does not answer is waited for a little longer (``LATE_S``).
            searched: see :class:`.protocol.Warm`.

        Raises:
            ServiceGoneError: no answer.
        """
        return self._ask(Warm(tuple(targets), free_bytes, limit_s, searched), Answer, limit_s + LATE_S)

    def build(self, recipe: Recipe) -> None:
        """Have built what will be called.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(Build(recipe))

    def compiled(self, recipe: Recipe) -> None:
        """Say what a library has compiled, for the plan of the next start.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(Compiled(recipe))

    def build_planned(self, plan: Path | None, environment: Mapping[str, str]) -> None:
        """Have built what the plan of this launch has.

        Raises:
            ServiceGoneError: nobody is there.
        """
        self._send(BuildPlanned(str(plan or ""), dict(environment)))

    def await_builds(self, limit_s: float) -> Built:
        """Wait until all that this rank wants built is there, or the time is up.

        Args:
            limit_s: seconds, as for :meth:`warm`.

        Raises:
            ServiceGoneError: no answer.
        """
        return self._ask(AwaitBuilds(limit_s), Built, limit_s + LATE_S)

    def close(self) -> None:
        """Say good-bye."""
        self._socket.close()

    def _ask(self, message: protocol.Message, kind: type[A], limit_s: float) -> A:
        try:
            self._send(message)
            end = time.monotonic() + limit_s
            length = protocol.length_of(self._receive(protocol.LENGTH.size, end))
            answer = protocol.decode(self._receive(length, end))
        except ServiceGoneError:
            # What may still come would be taken for the answer to the next question.
            self.close()
            raise
        except protocol.ProtocolError as error:
            self.close()
            raise ServiceGoneError(f"the service cannot be understood: {error}") from error
        if not isinstance(answer, kind):
            said = answer.problem if isinstance(answer, Welcome) else type(answer).__name__
            raise ServiceGoneError(f"the service does not answer a {type(message).__name__}, it says: {said}")
        return answer

    def _send(self, message: protocol.Message) -> None:
        try:
            self._socket.settimeout(self._wait_s)
            self._socket.sendall(protocol.encode(message))
        except OSError as error:
            self.close()
            raise ServiceGoneError(f"the service is gone: {error}") from error

    def _receive(self, count: int, end: float) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                part = self._socket.recv(count - len(parts))
            except TimeoutError:
                raise ServiceGoneError("the service does not answer") from None
            except OSError as error:
                raise ServiceGoneError(f"the service is gone: {error}") from error
            if not part:
                raise ServiceGoneError("the service has closed the connection")
            parts += part
        return bytes(parts)


def _connected(path: Path, wait_s: float) -> socket.socket:
    end = time.monotonic() + wait_s
    while True:
        attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        attempt.settimeout(max(0.001, end - time.monotonic()))
        try:
            attempt.connect(str(path))
            return attempt
        except OSError as error:
            attempt.close()
            # Its directory goes with it: one that is over will not listen again.
            if time.monotonic() > end or not path.parent.exists():
                raise ServiceGoneError(f"no service at {path}: {error.strerror or error}") from error
        time.sleep(0.05)
