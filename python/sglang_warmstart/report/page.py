"""The report as a page: one HTML file that needs nothing else and never uses the network.

Names of kernels, errors and shapes come from outside. In the page they are data, never markup. They go into a JSON
block that nothing in them can end, and the script shows them as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sglang_warmstart import __version__
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.report.breakdown import CATEGORIES, category_of
from sglang_warmstart.report.reading import Run
from sglang_warmstart.report.summary import Compile, Summary, compared, summarise, verdict
from sglang_warmstart.report.tracks import Span, Track, microseconds

# Events that overlap without containing each other, deeper than this, share the last row.
MOST_ROWS = 8

_CATEGORY = {category.key: number for number, category in enumerate(CATEGORIES)}
# Of an event's flags.
_CACHED, _SERVING = 1, 2


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page of one run, or of several that are compared with the first.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, page_of([summarise(run) for run in runs]).encode())


def page_of(summaries: Sequence[Summary]) -> str:
    """The whole page."""
    template, style, script = (_text(name) for name in ("page.html", "page.css", "page.js"))
    title = " and ".join(summary.run.name for summary in summaries)
    parts = {
        "TITLE": html.escape(f"Start-up of {title}"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embedded(data_of(summaries)),
    }
    # In one pass: what is filled in may hold what looks like a place.
    pieces = template.split("@@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def embedded(data: Any) -> str:
    """JSON that a script element may hold, whatever the strings in it are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode()


def data_of(summaries: Sequence[Summary]) -> dict[str, Any]:
    """What the script draws: all texts once, in a list, and elsewhere by their places in it."""
    texts = _Texts()
    runs = [_run(summary, texts) for summary in summaries]
    return {
        "version": __version__,
        "categories": [[category.key, category.title, category.kernels] for category in CATEGORIES],
        "runs": runs,
        "compared": compared(*summaries),
        "texts": texts.list,
    }


class _Texts:
    def __init__(self) -> None:
        self._places = {"": 0}

    @property
    def list(self) -> list[str]:
        return list(self._places)

    def __call__(self, text: str) -> int:
        return self._places.setdefault(text, len(self._places))


def _run(summary: Summary, texts: _Texts) -> dict[str, Any]:
    run, breakdown = summary.run, summary.breakdown
    places = {
        id(event): [number, place]
        for number, track in enumerate(summary.tracks)
        for place, event in enumerate(track.events)
    }

    def where(event: Event) -> list[int]:
        return places[id(event)]

    def compiled(each: Compile) -> list[int]:
        return where(each.event)

    return {
        "name": run.name,
        "hosts": summary.hosts,
        "when": summary.when,
        "verdict": verdict(summary),
        "ready": None if run.ready is None else microseconds(run.ready - run.start),
        "total": microseconds(breakdown.seconds),
        "parts": [microseconds(seconds) for seconds in breakdown.parts.values()],
        "stretches": [
            [microseconds(each.begin), microseconds(each.end), _CATEGORY[each.category]] for each in breakdown.stretches
        ],
        "tracks": [_track(track, texts) for track in summary.tracks],
        "serving": [compiled(each) for each in summary.serving],
        "compiles": [compiled(each) for each in summary.compiles],
        "targets": [
            [texts(each.name), each.kernels, each.cached, each.failed, microseconds(each.seconds), *where(each.longest)]
            for each in summary.targets
        ],
        "kernels": [
            [
                texts(each.name),
                texts(each.library),
                each.ahead,
                each.on_call,
                each.cached,
                microseconds(each.seconds),
                *where(each.longest),
            ]
            for each in summary.kernels
        ],
        "unreadable": run.unreadable,
    }


def _track(track: Track, texts: _Texts) -> dict[str, Any]:
    process = track.process
    return {
        "title": track.title,
        "group": track.group,
        "about": f"{process.role}, pid {process.pid} on {process.host}",
        "events": [
            _event(event, span, min(row, MOST_ROWS - 1), texts)
            for event, span, row in zip(track.events, track.spans, track.rows, strict=True)
        ],
    }


def _event(event: Event, span: Span, row: int, texts: _Texts) -> list[int]:
    flags = _CACHED * event.cached + _SERVING * (event.phase == "serving")
    begin, end = span
    values = [
        begin,
        end - begin,
        row,
        _CATEGORY[category_of(event)],
        texts(event.kind),
        texts(event.name),
        event.kernels,
        flags,
        *(texts(text) for text in (event.library, event.shape, event.target, event.error, event.remedy)),
    ]
    # Most events have none of the last ones.
    while values[-1] == 0 and len(values) > 6:
        values.pop()
    return values


def _text(name: str) -> str:
    return files(__package__).joinpath("page_files").joinpath(name).read_text(encoding="utf-8")
