"""The messages between ranks and the node's service: frames of MessagePack over a Unix socket."""

from __future__ import annotations

import math
import struct

import msgspec

from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.deepgemm.compiler import Kind
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.marker import Launch
from sglang_warmstart.deepgemm.target import KernelUse, Target
from sglang_warmstart.libraries.recipe import Recipe

# A frame is the length of its message, in 4 bytes, and the message.
LENGTH = struct.Struct(">I")
LIMIT = 64 << 20


class ProtocolError(QuotingError):
    """The other side does not speak as it should; says what it said."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A rank's first words. Answered by ``Welcome``.

    Args:
        cache: root of DeepGEMM's cache.
        environment: the rank's variables that DeepGEMM and the search for its compiler read.
        deep_gemm: directory of the package.
        gpu: the rank's own.
        launch: what decides which targets there are.
        kind: which compiler is to be used.
        workers: the user's bound on parallel compiles, or None.
    """

    cache: str
    environment: dict[str, str]
    deep_gemm: str
    gpu: Gpu
    launch: Launch
    kind: Kind = "nvcc"
    workers: int | None = None


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The service's answer.

    Args:
        notes: what the rank's log is to say.
        problem: why no target can be warmed here; empty if it can.
        only_plans: kernels are recorded for a plan, and not compiled: no GEMM can run.
    """

    notes: tuple[str, ...] = ()
    problem: str = ""
    only_plans: bool = False


class Restore(msgspec.Struct, frozen=True, tag=True):
    """Is there a marker of this launch? Answered by ``Answer``, once nobody is restoring kernels into the cache."""


class CannotDescribe(msgspec.Struct, frozen=True, tag=True):
    """A target that the rank cannot describe, for the plan to say so. Not answered.

    Args:
        target: as it is called in the log.
        reason: in one line.
    """

    target: str
    reason: str


class Announce(msgspec.Struct, frozen=True, tag=True):
    """Targets that will be asked for: work on them may begin. Not answered.

    Args:
        free_bytes: of the GPU's memory.
    """

    targets: tuple[Target, ...]
    free_bytes: int


class Expect(msgspec.Struct, frozen=True, tag=True):
    """Targets that ranks will ask for: work on them may begin. Said before there are ranks. Not answered.

    Args:
        hello: what these ranks will say, but for their launch.
    """

    hello: Hello
    targets: tuple[Target, ...]


class Warm(msgspec.Struct, frozen=True, tag=True):
    """Targets whose kernels are needed. Answered by ``Answer`` when they are in the cache, or the time is up.

    Args:
        free_bytes: of the GPU's memory.
        limit_s: seconds until then.
        searched: with what was asked for before, these are all targets of the launch.
    """

    targets: tuple[Target, ...]
    free_bytes: int
    limit_s: float
    searched: bool = False


class Warmed(msgspec.Struct, frozen=True):
    """What became of a target.

    Args:
        kernels: all that it needs, by ascending M, if there is no error.
        error: why it cannot be warmed.
        no_context: it could not be recorded, for want of a CUDA context.
        not_ready: the time was up.
    """

    target: Target
    kernels: tuple[KernelUse, ...] = ()
    error: str = ""
    no_context: bool = False
    not_ready: bool = False


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What became of the targets.

    Args:
        targets: in the order of the question; those of the marker for ``Restore``.
        compiled: kernels that this service has compiled so far.
        notes: what the rank's log is to say.
        known: for ``Restore``, whether these are all targets of the launch: it may have none.
    """

    targets: tuple[Warmed, ...]
    compiled: int = 0
    notes: tuple[str, ...] = ()
    known: bool = False


class Build(msgspec.Struct, frozen=True, tag=True):
    """What will be called is built now. Not answered; there need have been no ``Hello``."""

    recipe: Recipe


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """What this rank has had compiled, or has found in a cache: for the plan of the next start. Not answered."""

    recipe: Recipe


class BuildPlanned(msgspec.Struct, frozen=True, tag=True):
    """Where the plan of this launch is, of all that is not DeepGEMM's: it is built now. Not answered.

    Args:
        plan: its path; empty where nothing is to be built.
        environment: variables that say where caches and the events of this run are; a service that was started before
            the server does not know.
    """

    plan: str
    environment: dict[str, str] = {}


class AwaitBuilds(msgspec.Struct, frozen=True, tag=True):
    """All that this rank wants built is needed. Answered by ``Built`` when it is there, or the time is up.

    Args:
        limit_s: seconds until then.
    """

    limit_s: float


class Built(msgspec.Struct, frozen=True, tag=True):
    """What became of it.

    Args:
        built: what is in the caches.
        failed: why others are not, each in one line.
        not_ready: those for which the time was up.
    """

    built: int = 0
    failed: tuple[str, ...] = ()
    not_ready: int = 0


_OfRank = Hello | Restore | CannotDescribe | Announce | Expect | Warm | Build | Compiled | BuildPlanned | AwaitBuilds
Message = _OfRank | Welcome | Answer | Built

_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message as a frame."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message of a frame, without its length.

    Raises:
        ProtocolError: it is none.
    """
    try:
        message: Message = _decoder.decode(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if isinstance(message, (Build, Compiled)) and not _is_sound(message.recipe):
        raise ProtocolError("a recipe that no plan can hold")
    return message


def _is_sound(recipe: Recipe) -> bool:
    """A plan is JSON, which has fewer values than a message."""
    try:
        return bool(recipe.digest) and 0 <= recipe.seconds < math.inf
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return False


def length_of(prefix: bytes) -> int:
    """The length of the message that follows.

    Raises:
        ProtocolError: nobody sends as much.
    """
    (length,) = LENGTH.unpack(prefix)
    if length > LIMIT:
        raise ProtocolError(f"a message of {length} bytes")
    return int(length)
