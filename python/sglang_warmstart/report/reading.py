"""Read the events of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.base.events import Event, Process

# Some thousand years: what is longer is no time, and arithmetic with it overflows.
_LONGEST_S = 1e11


class NoEventsError(QuotingError):
    """There are no events to read; says where and what to do."""


@dataclass(frozen=True)
class Lane:
    """What one process did, in the order of time. All lanes of a run have the clock of its first one."""

    process: Process
    events: list[Event]


@dataclass(frozen=True)
class Run:
    """One run of a server, or of ``sglang-warmstart compile``.

    Args:
        name: of its directory.
        lanes: a lane for each process, the main one first, then ranks in their order.
        unreadable: a line for each file that could be read in part only, or not at all.
    """

    name: str
    lanes: list[Lane]
    unreadable: list[str] = field(default_factory=list)

    @property
    def start(self) -> float:
        """When its first process was started."""
        return min(lane.process.started for lane in self.lanes)

    @property
    def ready(self) -> float | None:
        """When the server was ready, if it was: its main process says so, or each rank of a node that has no server."""
        times = [
            (lane.process.role, event.at)
            for lane in self.lanes
            for event in [next((event for event in lane.events if event.kind == "ready"), None)]
            if event is not None
        ]
        of_main = [at for role, at in times if role == "main"]
        return min(of_main) if of_main else max((at for _, at in times), default=None)


def read_run(directory: Path) -> Run:
    """The events of a run's directory.

    Raises:
        NoEventsError: it has none.
    """
    lanes: dict[tuple[str, str, int], Lane] = {}
    unreadable: list[str] = []
    for path in sorted(directory.glob("*.jsonl"), key=_number_of):
        try:
            process, events, bad = _read_file(path)
        except (OSError, ValueError, RecursionError) as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        if bad:
            unreadable.append(f"{path.name}: {bad} lines cannot be read")
        lanes.setdefault((process.boot, process.role, process.pid), Lane(process, [])).events.extend(events)
    if not lanes:
        why = f"no file of {directory} can be read ({unreadable[0]})" if unreadable else f"no events in {directory}"
        raise NoEventsError(f"{why}: name the directory of a run, or a directory of runs")
    for lane in lanes.values():
        lane.events.sort(key=lambda event: event.at)
    return Run(directory.name, _on_one_clock(sorted(lanes.values(), key=_order)), unreadable)


def find_run(directory: Path, name: str | None = None) -> Path:
    """The directory of a run: ``directory`` itself, or the newest (or the named) one below it.

    Raises:
        NoEventsError: there is none.
    """
    if name is None and any(directory.glob("*.jsonl")):
        return directory
    runs = sorted(path for path in directory.glob(name or "*") if any(path.glob("*.jsonl")))
    if not runs:
        raise NoEventsError(f"no events in {directory}: start a server with the plugin, or name another directory")
    return runs[-1]


def _on_one_clock(lanes: list[Lane]) -> list[Lane]:
    """The lanes of other hosts, or boots, with their times moved to the clock of the first lane."""
    first = lanes[0].process
    return [
        lane if lane.process.boot == first.boot else _moved(lane, lane.process.epoch - first.epoch) for lane in lanes
    ]


def _moved(lane: Lane, seconds: float) -> Lane:
    process = msgspec.structs.replace(
        lane.process, started=lane.process.started + seconds, epoch=lane.process.epoch - seconds
    )
    return Lane(process, [msgspec.structs.replace(event, at=event.at + seconds) for event in lane.events])


def _read_file(path: Path) -> tuple[Process, list[Event], int]:
    lines = _lines(path)
    header = next(lines, b"")
    process = msgspec.json.decode(header, type=Process)
    if not _are_times(process.started, process.epoch):
        raise ValueError("its times are none")
    decoder = msgspec.json.Decoder(Event)
    events, bad = [], 0
    for line in lines:
        try:
            event = decoder.decode(line)
        except (ValueError, RecursionError):  # no event, or no UTF-8
            bad += 1
            continue
        if _are_times(event.at, event.seconds):
            events.append(event)
        else:
            bad += 1
    return process, events, bad


def _are_times(*seconds: float) -> bool:
    return all(abs(each) < _LONGEST_S for each in seconds)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _number_of(path: Path) -> tuple[str, int]:
    stem, _, number = path.name.removesuffix(".jsonl").partition(".")
    return stem, _number(number)


_ROLES = ("main", "rank", "restore", "service", "compile")


def _order(lane: Lane) -> tuple[int, list[int], int]:
    process = lane.process
    role = _ROLES.index(process.role) if process.role in _ROLES else len(_ROLES)
    ranks = [_number(process.labels.get(name, "0")) for name in ("dp_rank", "pp_rank", "tp_rank")]
    return role, ranks, process.pid


def _number(label: str) -> int:
    return int(label) if label.isdecimal() and len(label) < 10 else 0
