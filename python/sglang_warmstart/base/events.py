"""Events of a process: one file of JSON lines per process, in a directory per run.

The first line of a file describes the process (:class:`Process`). Every other line is an :class:`Event`. Times are
seconds of CLOCK_MONOTONIC, which all processes of a node share. Nothing here ever fails a server: if a file cannot be
written, one line says so, and the later events of that process are lost.
"""

from __future__ import annotations

import heapq
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from sglang_warmstart.base.answers import answered
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.log import LOGGER_NAME
from sglang_warmstart.base.switches import EVENTS, METRICS

# In that directory: there as soon as the server is ready.
READY = "ready"

# A file grows to this; the first one of a process, with its start-up, is kept, and the two newest of the others.
FILE_LIMIT = 4 << 20
# A plan has some hundred recipes.
EARLY_MAX = 10_000

Kind = Literal["step", "discover", "record", "compile", "load", "restore", "ready", "jit"]
Phase = Literal["startup", "serving"]

logger = logging.getLogger(f"{LOGGER_NAME}.events")


class Process(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose events a file holds.

    Args:
        role: "main", "rank", "service" (it compiles for a node), "restore" (of a bundle), "compile" (of a plan).
        pid: its number.
        host: its host's name.
        boot: what tells one boot of a host from another; times of two boots have nothing in common.
        started: when it was started, in the seconds of ``Event.at``.
        epoch: what to add to those for seconds since 1970.
        labels: which rank it is ("pp_rank", "tp_rank"), and the like.
    """

    role: str
    pid: int
    host: str
    boot: str
    started: float
    epoch: float
    labels: dict[str, str] = {}


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that took a while, or a moment.

    Args:
        kind: "step" (SGLang's own: loading weights, capturing graphs), "discover" (targets were found), "record" (a
            target's kernels were), "compile" (a kernel, ahead of its use), "load" (kernels, into a process), "restore"
            (kernels, into a cache), "ready" (the server), "jit" (a library compiled a kernel because it was called).
        name: of the step, the target or the kernel.
        at: when it began, in seconds of CLOCK_MONOTONIC.
        seconds: how long it took.
        phase: "serving" from when the server was ready.
        library: its name in the table of libraries (:mod:`sglang_warmstart.libraries.table`), such as "deep-gemm".
        lane: which of those that work side by side in this process, such as "worker 3".
        shape: of the call that needed it, as far as it is known.
        target: that a kernel was compiled for, if it was one.
        kernels: how many it was about, where that is not one; targets, where it discovers those.
        cached: nothing was compiled: the library's cache had it.
        error: why it failed, if it did.
        remedy: what would have covered a compile that should not have happened.
    """

    kind: Kind
    name: str
    at: float
    seconds: float = 0.0
    phase: Phase = "startup"
    library: str = ""
    lane: str = ""
    shape: str = ""
    target: str = ""
    kernels: int = 1
    cached: bool = False
    error: str = ""
    remedy: str = ""


class EventLog:
    """The events of this process.

    Args:
        directory: of the run; it is made if it is not there.
        process: this one.
        file_limit: bytes after which the next file is begun.
    """

    def __init__(self, directory: Path, process: Process, file_limit: int = FILE_LIMIT) -> None:
        self.directory = directory
        self.process = process
        self.listeners: list[Callable[[Event], None]] = []
        self._header = msgspec.json.encode(process) + b"\n"
        self._stem = f"{process.role}-{process.pid}"
        self._limit = file_limit
        self._lock = threading.Lock()
        self._file: int | None = None
        self._number = 0
        self._size = 0
        self._lost = False
        self._hangs = False
        self._ready = False
        with self._lock:
            self._write(self._header)
        self._was_there = not self._lost

    def emit(self, event: Event) -> None:
        """Write an event, and tell those who listen."""
        line = _encoded(event) + b"\n"
        with self._lock:
            self._write(line)
        for listener in self.listeners:
            listener(event)

    @property
    def ready_file(self) -> Path:
        """There as soon as the server is ready."""
        return self.directory / READY

    @property
    def phase(self) -> Phase:
        """Whether the server has been ready. A look at the file system, until it has."""
        if not self._ready and not self._hangs:
            try:
                self._ready = answered(self._is_said)
            except OSError:
                self._hangs = True
        return "serving" if self._ready else "startup"

    def _is_said(self) -> bool:
        # os.access, unlike Path.exists, raises nothing. Runs whose start-up is long over are removed in time, and the
        # file with them.
        return os.access(self.ready_file, os.F_OK) or (self._was_there and not os.access(self.directory, os.F_OK))

    def begin_serving(self) -> None:
        """For this process the server is ready, whatever others are told."""
        self._ready = True

    def close(self) -> None:
        """No more events are written."""
        with self._lock:
            self._lost = True
            if (file := self._file) is not None:
                self._file = None
                with suppress(OSError):
                    answered(lambda: os.close(file))

    def _write(self, line: bytes) -> None:
        if self._lost:
            return
        try:
            answered(lambda: self._append(line))
        except OSError as error:
            self._lost = True
            logger.warning("warmstart: events are not recorded in %s: %s", self.directory, error.strerror or error)

    def _append(self, line: bytes) -> None:
        if self._file is None or self._size + len(line) > self._limit:
            self._next_file()
        assert self._file is not None
        # A line that is cut off, by a full disk, is the last one of its file, and readers leave it out.
        if os.write(self._file, line) < len(line):
            raise OSError("the disk is full")
        self._size += len(line)

    def _next_file(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        number = self._number if self._file is None else self._number + 1
        file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self._file is not None:
            os.close(self._file)
            os.write(file, self._header)
            if number > 2:
                self._path(number - 2).unlink(missing_ok=True)
        self._file, self._number, self._size = file, number, len(self._header)

    def _path(self, number: int) -> Path:
        suffix = f".{number}" if number else ""
        return self.directory / f"{self._stem}{suffix}.jsonl"


def _encoded(event: Event) -> bytes:
    try:
        return msgspec.json.encode(event)
    except UnicodeEncodeError:
        # A path that is not UTF-8 is in it.
        texts = {name: value for name in event.__struct_fields__ if isinstance(value := getattr(event, name), str)}
        valid = {name: value.encode("utf-8", "replace").decode("utf-8") for name, value in texts.items()}
        return msgspec.json.encode(msgspec.structs.replace(event, **valid))


_log: EventLog | None = None
_early: list[Event] | None = None  # of a process that expects its log


def expect_log() -> None:
    """Keep the events of this process until :func:`open_log` is told where they go, or that they go nowhere.

    A service that is started before the server works before it hears that.
    """
    global _early
    if _log is None:
        _early = []


def open_log(role: str, environment: Mapping[str, str], **labels: str) -> EventLog | None:
    """Have the events of this process recorded from now on, if its environment says where.

    Args:
        role: as of :class:`Process`.
        labels: likewise.
    """
    global _log, _early
    directory = environment.get(EVENTS)
    if directory is None:
        _early = None
        return None
    if _log is None or _log.directory != Path(directory):
        close_log()
        _log = EventLog(Path(directory), this_process(role, **labels))
        if METRICS in environment:
            try:
                # Here and not above: it imports prometheus_client, which no other process needs.
                from sglang_warmstart.base.metrics import Listener

                _log.listeners.append(_helping(Listener()))
            except Exception as error:
                # It is a help for the server, and not to be in its way.
                logger.warning("warmstart: no metrics: %s: %s", type(error).__name__, error)
        early, _early = _early, None
        for event in early or ():
            _log.emit(event)
    return _log


def _helping(listener: Callable[[Event], None]) -> Callable[[Event], None]:
    failed = False

    def listen(event: Event) -> None:
        nonlocal failed
        if failed:
            return
        try:
            listener(event)
        except Exception as error:
            # Its files may be on a full disk, say: that is no reason for a request to fail.
            failed = True
            logger.warning("warmstart: no more metrics: %s: %s", type(error).__name__, error)

    return listen


def close_log() -> None:
    """As in a process that has just been started."""
    global _log
    if _log is not None:
        _log.close()
        _log = None


def log_of_process() -> EventLog | None:
    """What this process records its events in, if it does."""
    return _log


class Lanes:
    """Numbers for those that work side by side: the lowest one that is free. Used from one thread."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._made = 0

    def take(self) -> int:
        """A number that nobody else has."""
        if self._free:
            return heapq.heappop(self._free)
        self._made += 1
        return self._made

    def give_back(self, number: int) -> None:
        """It is free again."""
        heapq.heappush(self._free, number)


def now() -> float:
    """The time of events."""
    return time.monotonic()


def emit(kind: Kind, name: str, at: float, seconds: float = 0.0, **details: Any) -> None:
    """Record an event of this process, if they are recorded at all.

    Args:
        details: as of :class:`Event`.
    """
    if _log is not None:
        details.setdefault("phase", _log.phase)
        _log.emit(Event(kind=kind, name=name, at=at, seconds=seconds, **details))
    elif (early := _early) is not None and len(early) < EARLY_MAX:
        early.append(Event(kind=kind, name=name, at=at, seconds=seconds, **details))


@contextmanager
def timed(kind: Kind, name: str, **details: Any) -> Iterator[dict[str, Any]]:
    """Record what takes place inside as an event, also where it fails. More details may be added to what it yields."""
    at = now()
    try:
        yield details
    except BaseException as error:
        details.setdefault("error", first_line(error))
        raise
    finally:
        emit(kind, name, at, now() - at, **details)


def this_process(role: str, **labels: str) -> Process:
    """This process, as the first line of its file."""
    at = now()
    return Process(
        role=role,
        pid=os.getpid(),
        host=socket.gethostname(),
        boot=_boot(),
        started=_started(at),
        epoch=time.time() - at,
        labels=labels,
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(at: float) -> float:
    """When this process was started: the 22nd field of ``/proc/self/stat``, in clock ticks since the boot."""
    try:
        # Behind the name, which may hold blanks and brackets.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        # CLOCK_BOOTTIME goes on while a machine sleeps.
        return since_boot - (time.clock_gettime(time.CLOCK_BOOTTIME) - at)
    except (OSError, ValueError, IndexError):
        return at
