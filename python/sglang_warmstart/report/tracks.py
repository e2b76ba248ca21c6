"""Arrange the events of a run for drawing: parallel work on parallel tracks, nested events below their parent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_warmstart.base.events import Event, Process
from sglang_warmstart.report.reading import Run

# In this order below the process that they belong to.
_LANES = ("", "stub", "recorder", "worker")

# Begin and end, in whole microseconds: sums of floats make one event end after the next one begins.
Span = tuple[int, int]


# Many of these work side by side, each at one thing at a time.
_GROUPED = ("recorder", "worker")


@dataclass(frozen=True)
class Track:
    """What one process did, or one of those that work side by side in it.

    Args:
        title: what it is called; no two tracks of a run share one.
        process: that did it.
        events: in the order of time, those that contain others before them.
        spans: when each event began and ended, in whole microseconds since the run's start.
        rows: of each event, from 0; those of one row do not overlap, and an event lies below all that contain it.
    """

    title: str
    process: Process
    events: list[Event]
    spans: list[Span]
    rows: list[int]

    @property
    def group(self) -> str:
        """What it is one of many of: "worker", "recorder", or nothing."""
        kind = self.events[0].lane.partition(" ")[0] if self.events else ""
        return kind if kind in _GROUPED else ""


def tracks_of(run: Run) -> list[Track]:
    """The tracks of a run: main, ranks, and then those that compile and restore."""
    several_hosts = len({lane.process.host for lane in run.lanes}) > 1
    found: list[tuple[str, Process, list[Event]]] = []
    for lane in run.lanes:
        by_lane: dict[str, list[Event]] = {}
        for event in lane.events:
            by_lane.setdefault(event.lane, []).append(event)
        # A process that has said nothing yet was there all the same.
        if not by_lane:
            by_lane[""] = []
        for name in sorted(by_lane, key=_natural):
            title = name or title_of(lane.process)
            found.append((f"{lane.process.host} {title}" if several_hosts else title, lane.process, by_lane[name]))
    seen = Counter(title for title, _, _ in found)
    return [
        _track(title if seen[title] == 1 else f"{title} (pid {process.pid})", process, events, run.start)
        for title, process, events in found
    ]


def title_of(process: Process) -> str:
    """What a process is called: a rank by its place, such as "PP0 TP1"."""
    names = ("dp_rank", "pp_rank", "tp_rank")
    place = " ".join(f"{name[:2].upper()}{process.labels[name]}" for name in names if name in process.labels)
    return place or process.role


def rows_of(spans: Iterable[Span]) -> list[int]:
    """The row of each span: below all those that are under way when it begins.

    Args:
        spans: in the order of :class:`Track`.
    """
    ends: list[int] = []
    rows = []
    for begin, end in spans:
        while ends and ends[-1] <= begin:
            ends.pop()
        rows.append(len(ends))
        ends.append(end)
    return rows


def microseconds(seconds: float) -> int:
    """In whole ones."""
    return round(seconds * 1e6)


def _track(title: str, process: Process, events: Iterable[Event], start: float) -> Track:
    placed = [(_span(event, start), event) for event in events]
    placed.sort(key=lambda each: (each[0][0], -each[0][1]))
    spans = [span for span, _ in placed]
    return Track(title, process, [event for _, event in placed], spans, rows_of(spans))


def _span(event: Event, start: float) -> Span:
    return microseconds(event.at - start), microseconds(event.at + max(event.seconds, 0.0) - start)


def _natural(name: str) -> tuple[int, list[tuple[int, str]]]:
    kind = name.partition(" ")[0]
    # "worker 2" before "worker 10".
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]
    return _LANES.index(kind) if kind in _LANES else len(_LANES), parts
