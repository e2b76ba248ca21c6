"""Write runs as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing.

The format is Chrome's "Trace Event Format": complete events ("X") with times in microseconds. Two events of one thread
must be disjoint, or one must lie within the other. So an event that overlaps otherwise goes to another thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_warmstart.base.events import Event
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.report.breakdown import category_of
from sglang_warmstart.report.reading import Run
from sglang_warmstart.report.tracks import Span, Track, title_of, tracks_of

_DETAILS = ("library", "shape", "target", "error", "remedy")


def write_trace(runs: Sequence[Run], path: Path) -> None:
    """Write the trace of one run, or of several next to each other, each from its own start.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(trace_of(runs), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    write_atomically(path, text.encode())


def trace_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The trace."""
    events: list[dict[str, Any]] = []
    # Numbers of their own: two runs, or two hosts, may have had the same ones.
    numbers: dict[tuple[int, str, int, str], int] = {}
    for run_number, run in enumerate(runs):
        threads: dict[int, int] = {}
        for track in tracks_of(run):
            process = track.process
            key = (run_number, process.boot, process.pid, process.role)
            if key not in numbers:
                numbers[key] = len(numbers) + 1
                prefix = f"{run.name}: " if len(runs) > 1 else ""
                name = f"{prefix}{title_of(process)} (pid {process.pid} on {process.host})"
                events += _process(numbers[key], name, len(numbers))
            pid = numbers[key]
            for part, thread in enumerate(_threads(track)):
                tid = threads[pid] = threads.get(pid, 0) + 1
                events += _thread(pid, tid, track.title if part == 0 else f"{track.title} (overlapping {part})")
                events += [_event(event, span, pid, tid) for event, span in thread]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _threads(track: Track) -> list[list[tuple[Event, Span]]]:
    """The events of a track, so that those of one list are disjoint or lie within each other."""
    threads: list[tuple[list[tuple[Event, Span]], list[int]]] = [([], [])]
    for event, span in zip(track.events, track.spans, strict=True):
        begin, end = span
        for _, under_way in threads:
            while under_way and under_way[-1] <= begin:
                under_way.pop()
        fitting = (each for each in threads if not each[1] or end <= each[1][-1])
        chosen = next(fitting, None)
        if chosen is None:
            chosen = ([], [])
            threads.append(chosen)
        chosen[0].append((event, span))
        chosen[1].append(end)
    return [thread for thread, _ in threads]


def _process(pid: int, name: str, order: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}}


def _thread(pid: int, tid: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _event(event: Event, span: Span, pid: int, tid: int) -> dict[str, Any]:
    begin, end = span
    if event.kind == "ready":
        # "g": drawn through all processes.
        return {"ph": "i", "s": "g", "name": "ready", "cat": "ready", "ts": begin, "pid": pid, "tid": tid}
    details: dict[str, Any] = {name: getattr(event, name) for name in _DETAILS if getattr(event, name)}
    details |= {"kind": event.kind, "phase": event.phase, "kernels": event.kernels, "cached": event.cached}
    return {
        "ph": "X",
        "name": event.name or event.kind,
        "cat": ",".join(filter(None, (event.kind, category_of(event)))),
        "ts": begin,
        "dur": end - begin,
        "pid": pid,
        "tid": tid,
        "args": details,
    }
