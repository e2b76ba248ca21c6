"""The pictures of docs show the events that GPU hosts left, drawn by the report's own page."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.browser import Browser
from kit.report_page import Page
from report.picture import EVENTS, PICTURES, Picture, digest, source_of
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import in_words, summarise, verdict

RUNS = sorted(path.name for path in EVENTS.iterdir())


@pytest.fixture(params=PICTURES, ids=lambda each: each.name)
def picture(request: pytest.FixtureRequest) -> Picture:
    found: Picture = request.param
    return found


def test_it_was_made_from_the_committed_events(picture: Picture, tmp_path: Path) -> None:
    how = "make it anew: PYTHONPATH=test .venv/bin/python test/report/picture.py"
    assert source_of(picture.path) == digest(picture.runs(tmp_path)), how


def test_what_it_draws_are_those_starts(picture: Picture, chromium: Browser, tmp_path: Path) -> None:
    runs = picture.runs(tmp_path)
    write_page([read_run(each) for each in runs], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", width=1280, height=800)
    page = Page(chromium)
    if picture is PICTURES[0]:  # all three are on the first screen
        assert chromium.run("return document.querySelector('.frame').getBoundingClientRect().bottom") < 800
    end = float(chromium.find(".frame").get_attribute("data-end"))
    for number, each in enumerate(runs):
        summary = summarise(read_run(each))
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
