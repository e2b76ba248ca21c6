"""Where the seconds of a start-up went: each instant belongs to one category, so that their seconds add up to it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sglang_warmstart.base.events import Event
from sglang_warmstart.report.reading import Lane, Run


@dataclass(frozen=True)
class Category:
    """What an instant may go to.

    Args:
        key: in data and stylesheets.
        title: for a reader.
        kernels: whether it is there because kernels have to be; the rest is SGLang's own.
    """

    key: str
    title: str
    kernels: bool = False


# In the order in which a start-up comes to them.
CATEGORIES = (
    Category("process", "Start processes, imports"),
    Category("distributed", "Distributed set-up"),
    Category("weights", "Load weights"),
    Category("setup", "Other set-up of a rank"),
    Category("warmup", "Kernel warm-up, the rest of it"),
    Category("find", "Find which kernels are needed", kernels=True),
    Category("compile", "Compile kernels ahead", kernels=True),
    Category("load", "Load and restore kernels", kernels=True),
    Category("jit", "Compile kernels on call (JIT)", kernels=True),
    Category("graphs", "Capture CUDA graphs"),
    Category("server", "Server warm-up"),
    Category("other", "Not accounted for"),
)

_STEPS = {
    "imports": "process",
    "launch": "process",
    "distributed": "distributed",
    "load weights": "weights",
    "kernel warm-up": "warmup",
    "wait for kernels": "compile",
    "CUDA graphs": "graphs",
    "piecewise CUDA graphs": "graphs",
    "server warm-up": "server",
}
_KINDS = {
    "discover": "find",
    "record": "find",
    "compile": "compile",
    "load": "load",
    "restore": "load",
    "jit": "jit",
    "ready": "other",
}


@dataclass(frozen=True)
class Stretch:
    """Time that belongs to one category, in seconds since the run's start."""

    begin: float
    end: float
    category: str


@dataclass(frozen=True)
class Breakdown:
    """Where the seconds went.

    Args:
        seconds: from the start of the first process until the server was ready; until the last event where it never
            was.
        parts: category's key -> its seconds, all of :data:`CATEGORIES` in their order. They add up to ``seconds``.
        stretches: the same in the order of time, without gaps.
    """

    seconds: float
    parts: dict[str, float]
    stretches: list[Stretch]


def category_of(event: Event) -> str:
    """The key of the category that an event's time goes to."""
    if event.kind == "step":
        return _STEPS.get(event.name, "setup")
    return _KINDS[event.kind]


def end_of(run: Run) -> float:
    """When the start-up was over: the server was ready or, if it never was, the last event had ended."""
    if run.ready is not None:
        return max(run.ready, run.start)
    return max([run.start, *(event.at + event.seconds for lane in run.lanes for event in lane.events)])


def breakdown_of(run: Run) -> Breakdown:
    """Attribute each instant of a start-up to one category.

    The server is ready when its slowest rank is, so that one is followed: the rank whose scheduler was made last. An
    instant belongs to the innermost event of it that is under way then, which is the one that began last. Where it has
    none, as before it was started and while the server warms up, the other ranks are looked at, the slower ones first;
    then the main process. What none of them accounts for is "other". What services compile meanwhile does not count
    by itself: a rank that needs it waits, and that is an event of the rank.

    A run without ranks and main process, as of ``sglang-warmstart compile``, is followed by the processes that it has.
    """
    start, end = run.start, end_of(run)
    spans = sorted(
        (max(event.at, start), min(event.at + event.seconds, end), priority, category_of(event))
        for priority, lane in enumerate(_followed(run, end))
        for event in lane.events
    )
    stretches = list(_merged(_attributed([span for span in spans if span[0] < span[1]], start, end)))
    parts = {category.key: 0.0 for category in CATEGORIES}
    for each in stretches:
        parts[each.category] += each.end - each.begin
    return Breakdown(end - start, parts, stretches)


def _followed(run: Run, end: float) -> list[Lane]:
    """Processes whose events tell where the time went, the one that decides first."""
    ranks = [lane for lane in run.lanes if lane.process.role == "rank"]
    ranks.sort(key=lambda lane: _done(lane, end), reverse=True)
    chosen = ranks + [lane for lane in run.lanes if lane.process.role == "main"]
    return chosen or run.lanes


def _done(lane: Lane, end: float) -> float:
    made = [event for event in lane.events if event.kind == "step" and event.name == "scheduler"]
    return max((event.at + event.seconds for event in made or lane.events if event.at < end), default=0.0)


def _attributed(
    spans: Sequence[tuple[float, float, int, str]], start: float, end: float
) -> Iterator[tuple[float, float, str]]:
    """Each piece between two times at which anything begins or ends, and whose it is.

    Args:
        spans: begin, end, priority (0 goes first) and category, by begin, all within start and end.
    """
    times = sorted({start, end, *(time for begin, stop, _, _ in spans for time in (begin, stop))})
    under_way: list[tuple[int, float, float, str]] = []
    following = 0
    for left, right in pairwise(times):
        while following < len(spans) and spans[following][0] <= left:
            begin, stop, priority, category = spans[following]
            heapq.heappush(under_way, (priority, -begin, stop, category))
            following += 1
        while under_way and under_way[0][2] <= left:
            heapq.heappop(under_way)
        yield left - start, right - start, under_way[0][3] if under_way else "other"


def _merged(pieces: Iterator[tuple[float, float, str]]) -> Iterator[Stretch]:
    open_piece: tuple[float, float, str] | None = None
    for begin, end, category in pieces:
        if open_piece is not None and open_piece[2] == category:
            open_piece = (open_piece[0], end, category)
            continue
        if open_piece is not None:
            yield Stretch(*open_piece)
        open_piece = (begin, end, category)
    if open_piece is not None:
        yield Stretch(*open_piece)
