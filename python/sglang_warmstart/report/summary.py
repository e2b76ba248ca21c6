"""Summarise a run: what was compiled, for what and by whom, and what should not have been compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from sglang_warmstart.base.events import Event
from sglang_warmstart.report.breakdown import CATEGORIES, Breakdown, breakdown_of
from sglang_warmstart.report.reading import Run
from sglang_warmstart.report.tracks import Track, tracks_of


@dataclass(frozen=True)
class Compile:
    """A compile, and where it took place."""

    event: Event
    track: str


@dataclass(frozen=True)
class TargetRow:
    """What was compiled for a target.

    Args:
        kernels: that were compiled for it.
        cached: that the cache had.
        failed: that could not be compiled.
        seconds: of all its compiles together.
        longest: of its events, where one looks for it.
    """

    name: str
    kernels: int
    cached: int
    failed: int
    seconds: float
    longest: Event


@dataclass(frozen=True)
class Kernel:
    """What happened to a kernel.

    Args:
        ahead: how often it was compiled ahead of its use.
        on_call: how often because it was called.
        cached: how often a cache had it.
        seconds: of all that together.
        longest: of its events.
    """

    name: str
    library: str
    ahead: int
    on_call: int
    cached: int
    seconds: float
    longest: Event


@dataclass(frozen=True)
class Summary:
    """What a run comes to.

    Args:
        compiles: all of them, ahead and on call, the longest first.
        serving: compiles on call while serving, in the order of time. There should be none.
        ahead: kernels that were compiled ahead of their use.
        workers: that compiled them.
        on_call: kernels that were compiled because they were called, before the server was ready.
        late: targets that exact warm-up learned of by a call, before the server was ready.
        cached: compiles that the cache made unnecessary.
        restored: kernels that came out of a bundle or a marker.
        failed: compiles that failed.
    """

    run: Run
    tracks: list[Track]
    breakdown: Breakdown
    compiles: list[Compile]
    targets: list[TargetRow]
    kernels: list[Kernel]
    serving: list[Compile]
    ahead: int
    workers: int
    on_call: int
    late: int
    cached: int
    restored: int
    failed: int

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts that it ran on."""
        return sorted({lane.process.host for lane in self.run.lanes})

    @property
    def began(self) -> datetime:
        """When its first process was started."""
        first = min((lane.process for lane in self.run.lanes), key=lambda process: process.started)
        try:
            return datetime.fromtimestamp(first.epoch + first.started, timezone.utc)
        except (OverflowError, ValueError, OSError):
            # A clock that is far off, or a file that somebody has written.
            return datetime.fromtimestamp(0, timezone.utc)

    @property
    def when(self) -> str:
        """The same, for a reader."""
        return self.began.strftime("%Y-%m-%d %H:%M:%S UTC")


def summarise(run: Run) -> Summary:
    """Count what a run's events say."""
    tracks = tracks_of(run)
    placed = [(track, event) for track in tracks for event in track.events]
    compiles = [Compile(event, track.title) for track, event in placed if _is_compile(event)]
    done = [each for each in compiles if not each.event.error]
    ahead = [each for each in done if _is_ahead(each.event)]
    calls = [each.event for each in done if each.event.kind == "jit" and each.event.phase == "startup"]
    return Summary(
        run=run,
        tracks=tracks,
        breakdown=breakdown_of(run),
        compiles=sorted(compiles, key=lambda each: -each.event.seconds),
        targets=_targets(event for _, event in placed),
        kernels=_kernels(event for _, event in placed),
        serving=sorted((each for each in compiles if is_while_serving(each.event)), key=lambda each: each.event.at),
        ahead=sum(each.event.kernels for each in ahead),
        workers=len({each.track for each in ahead}),
        on_call=sum(event.kernels for event in calls),
        late=sum(event.kernels == 0 for event in calls),
        cached=sum(event.kernels for _, event in placed if event.kind == "compile" and event.cached),
        restored=_restored(event for _, event in placed if event.kind == "restore"),
        failed=sum(bool(each.event.error) for each in compiles),
    )


def is_while_serving(event: Event) -> bool:
    """Whether it is what must never happen: a compile that a request waits for."""
    return event.kind == "jit" and event.phase == "serving" and not event.cached


def verdict(summary: Summary) -> str:
    """What a run comes to, in one sentence."""
    seconds = in_words(summary.breakdown.seconds)
    if summary.run.ready is not None:
        begin = f"Ready after {seconds}"
    elif any(lane.process.role in ("main", "rank") for lane in summary.run.lanes):
        begin = f"Not ready: the last event is {seconds} after the start"
    else:
        begin = f"Ended after {seconds}"
    parts = []
    if summary.ahead:
        by = f" by {_count(summary.workers, 'worker')}" if summary.workers else ""
        parts.append(f"{_count(summary.ahead, 'kernel')} compiled{by}")
    if summary.on_call or summary.late:
        parts.append(f"{summary.on_call + summary.late} on call" if parts else _on_call(summary))
    compiled = bool(parts)
    if not compiled:
        parts.append("no kernel compiled")
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    if summary.serving:
        parts.append(f"{len(summary.serving)} while serving")
    elif summary.run.ready is not None and compiled:
        parts.append("none after ready")
    return f"{begin}; {', '.join(parts)}."


def letter(number: int) -> str:
    """What a compared run is called: A, B, C."""
    return chr(ord("A") + number)


def compared(first: Summary, *others: Summary) -> str:
    """Tell each other run apart from the first one, in one sentence each."""
    return " ".join(_compared(first, other, letter(number)) for number, other in enumerate(others, 1))


def _compared(left: Summary, right: Summary, name: str) -> str:
    seconds = right.breakdown.seconds - left.breakdown.seconds
    both_ready = left.run.ready is not None and right.run.ready is not None
    done = "ready" if both_ready else "over"
    if abs(seconds) < 0.05:
        return f"A and {name} are {done} after {in_words(right.breakdown.seconds)}."
    way = "earlier" if seconds < 0 else "later"
    return (
        f"{name} is {done} {in_words(abs(seconds))} {way} than A: after {in_words(right.breakdown.seconds)} instead of "
        f"{in_words(left.breakdown.seconds)}."
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """The numbers for machines. Times are in seconds since the run's start."""
    run, start = summary.run, summary.run.start
    titles = {category.key: category.title for category in CATEGORIES}

    def told(each: Compile) -> dict[str, Any]:
        event = each.event
        return {
            "name": event.name,
            "library": event.library,
            "kind": event.kind,
            "phase": event.phase,
            "track": each.track,
            "at": event.at - start,
            "seconds": event.seconds,
            "shape": event.shape,
            "target": event.target,
            "error": event.error,
            "remedy": event.remedy,
        }

    return {
        "run": run.name,
        "hosts": summary.hosts,
        "began": summary.began.isoformat(),
        "ready": run.ready is not None,
        "seconds": summary.breakdown.seconds,
        "verdict": verdict(summary),
        "categories": [
            {"category": key, "title": titles[key], "seconds": seconds}
            for key, seconds in summary.breakdown.parts.items()
        ],
        **{name: getattr(summary, name) for name in COUNTS},
        "serving": [told(each) for each in summary.serving],
        "compiles": [told(each) for each in summary.compiles],
        "targets": [
            {
                "target": each.name,
                "kernels": each.kernels,
                "cached": each.cached,
                "failed": each.failed,
                "seconds": each.seconds,
            }
            for each in summary.targets
        ],
        "kernels": [
            {
                "name": each.name,
                "library": each.library,
                "ahead": each.ahead,
                "on_call": each.on_call,
                "cached": each.cached,
                "seconds": each.seconds,
            }
            for each in summary.kernels
        ],
        "unreadable": run.unreadable,
    }


# What is counted in a summary.
COUNTS = ("ahead", "workers", "on_call", "late", "cached", "restored", "failed")


def in_words(seconds: float) -> str:
    """Seconds for a reader: three digits or so. The page has whole microseconds, and is to say the same."""
    seconds = round(seconds, 6)
    if abs(seconds) < 0.0005:
        return f"{seconds * 1e6:.0f} µs" if seconds else "0 s"
    if abs(seconds) < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 9.995 else f"{seconds:.1f} s"


def _is_compile(event: Event) -> bool:
    # The stub stands for a kernel while targets are recorded; it is none that a server runs.
    return event.kind in ("compile", "jit") and not event.cached and event.lane != "stub"


def _is_ahead(event: Event) -> bool:
    return event.kind == "compile"


def _restored(events: Iterable[Event]) -> int:
    # The marker answers each rank anew, and of kernels that came out of a bundle as well.
    most: dict[str, int] = {}
    for event in events:
        most[event.library] = max(most.get(event.library, 0), event.kernels)
    return sum(most.values())


def _targets(events: Iterable[Event]) -> list[TargetRow]:
    found: dict[str, TargetRow] = {}
    for event in events:
        if event.kind not in ("compile", "jit") or not event.target:
            continue
        old = found.get(event.target) or TargetRow(event.target, 0, 0, 0, 0.0, event)
        found[event.target] = replace(
            old,
            kernels=old.kernels + (0 if event.cached or event.error else event.kernels),
            cached=old.cached + event.cached,
            failed=old.failed + bool(event.error),
            seconds=old.seconds + event.seconds,
            longest=max(old.longest, event, key=lambda each: each.seconds),
        )
    return sorted(found.values(), key=lambda each: (-each.seconds, each.name))


def _kernels(events: Iterable[Event]) -> list[Kernel]:
    found: dict[tuple[str, str], Kernel] = {}
    for event in events:
        if not _is_of_one_kernel(event):
            continue
        key = (event.library, event.name)
        old = found.get(key) or Kernel(event.name, event.library, 0, 0, 0, 0.0, event)
        fresh = not event.cached and not event.error
        found[key] = replace(
            old,
            ahead=old.ahead + (fresh and event.kind == "compile"),
            on_call=old.on_call + (fresh and event.kind == "jit"),
            cached=old.cached + event.cached,
            seconds=old.seconds + event.seconds,
            longest=max(old.longest, event, key=lambda each: each.seconds),
        )
    return sorted(found.values(), key=lambda each: (-each.seconds, each.name))


def _is_of_one_kernel(event: Event) -> bool:
    # A load of several is of the targets of a rank; a jit of none is of a target.
    if event.kind == "load":
        return event.cached
    return event.kind in ("compile", "jit") and event.kernels == 1 and event.lane != "stub"


def _on_call(summary: Summary) -> str:
    if not summary.on_call:
        return f"{_count(summary.late, 'target')} found by a call"
    return f"{_count(summary.on_call + summary.late, 'kernel')} compiled on call"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
