"""docs/start-up.png shows the events that a GPU host left, drawn by the report's own page."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.browser import Browser
from kit.report_page import Page
from report.picture import EVENTS, PICTURE, STARTS, digest, source_of, write_starts
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import in_words, summarise, verdict

RUNS = sorted(path.name for path in EVENTS.iterdir())


def test_it_was_made_from_the_committed_events() -> None:
    assert source_of(PICTURE) == digest(), "make it anew: PYTHONPATH=test .venv/bin/python test/report/picture.py"


def test_what_it_draws_are_those_starts(chromium: Browser, tmp_path: Path) -> None:
    write_starts(tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", width=1280, height=800)
    page = Page(chromium)
    # All three are on the first screen.
    assert chromium.run("return document.querySelector('.frame').getBoundingClientRect().bottom") < 800
    end = float(chromium.find(".frame").get_attribute("data-end"))
    for number, name in enumerate(STARTS):
        summary = summarise(read_run(EVENTS / name))
        head, seconds = chromium.run(
            "const run = document.querySelectorAll('.run')[arguments[0]];"
            "const led = run.querySelector('.led .row'), wide = led.getBoundingClientRect().width;"
            "const ends = [...led.children].map((bar) => bar.getBoundingClientRect().right);"
            "return [run.querySelector('h2').textContent,"
            " (Math.max(...ends) - led.getBoundingClientRect().left) / wide]",
            number,
        )
        assert verdict(summary) in head
        assert seconds * end == pytest.approx(summary.breakdown.seconds, abs=0.002 * end)
        # The longest event of the rank is where it was.
        track = next(track for track in summary.tracks if track.process.role == "rank")
        longest = max(track.events, key=lambda event: event.seconds)
        tip = page.hover(track.title, longest.at - summary.run.start + longest.seconds / 2, run=number)
        assert tip.startswith(f"{longest.name}\n")
        assert in_words(longest.seconds) in tip


@pytest.mark.parametrize("name", RUNS)
def test_a_committed_start_has_no_gaps(name: str) -> None:
    run = read_run(EVENTS / name)
    breakdown = summarise(run).breakdown
    assert run.ready is not None
    assert breakdown.parts["other"] < 0.01 * breakdown.seconds
