"""What is drawn in the page's timeline beside plain bars: what tells them apart without colour, what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.browser import Browser, browser
from kit.report_page import Timeline, colour_of
from kit.sample_runs import step, write_large, write_process
from sglang_warmstart.base.events import Event
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

pytestmark = pytest.mark.timeout(300)

READY = 20.0

# How many pixels have each colour (RGBA) in a part of a lane's first row.
_COLOURS = """
const [frame, left, right, y] = arguments, canvas = frame.querySelector(".lanes"), box = canvas.getBoundingClientRect();
const { data } = canvas.getContext("2d").getImageData(left - box.left, y - box.top - 5, Math.max(right - left, 1), 10);
const found = {};
for (let i = 0; i < data.length; i += 4) {
  const colour = [...data.slice(i, i + 4)].join();
  found[colour] = (found[colour] || 0) + 1;
}
return found;
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as window:
        yield window


@pytest.fixture
def timeline(chromium: Browser, tmp_path: Path) -> Timeline:
    # Names of one letter are not written into bars of which a part is looked at.
    write_process(
        tmp_path / "run",
        "rank",
        2,
        0.0,
        [
            step("s", 1, 4),
            Event(kind="load", name="c", at=5, seconds=3, library="triton", cached=True),
            Event(kind="jit", name="j", at=9, seconds=3, library="triton"),
            Event(kind="jit", name="v", at=21, seconds=2, library="triton", phase="serving"),
        ],
        tp_rank="0",
    )
    write_process(tmp_path / "run", "main", 1, 0.0, [Event(kind="ready", name="server", at=READY)])
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    return Timeline(chromium)


def colours(timeline: Timeline, begin: float, end: float) -> dict[tuple[int, ...], int]:
    left, y = timeline.point("TP0", begin)
    right, _ = timeline.point("TP0", end)
    found = timeline.browser.run(_COLOURS, timeline.frame, round(left), round(right), round(y))
    return {tuple(int(part) for part in colour.split(",")): count for colour, count in found.items()}


def test_a_compile_on_call_is_hatched(timeline: Timeline) -> None:
    plain, hatched = colours(timeline, 3, 3.8), colours(timeline, 10.5, 11.8)
    assert plain.keys() == {(*colour_of(timeline.browser, "setup"), 255)}
    filled = hatched[(*colour_of(timeline.browser, "jit"), 255)]
    assert 0.2 < filled / sum(hatched.values()) < 0.95


def test_what_was_in_a_cache_is_hollow(timeline: Timeline) -> None:
    found = colours(timeline, 6.5, 7.8)
    assert all(0 < alpha < 128 for *_, alpha in found)


def test_a_compile_while_serving_has_a_frame(timeline: Timeline) -> None:
    alarm = (*colour_of(timeline.browser, "alarm"), 255)
    around = round(0.03 * timeline.shown().span, 2)
    assert colours(timeline, 21 - around, 21.5).get(alarm, 0) > 5
    assert alarm not in colours(timeline, 8.5, 12.5)


def test_a_line_shows_when_it_was_ready(timeline: Timeline) -> None:
    ink = (*colour_of(timeline.browser, "ink"), 255)
    assert colours(timeline, READY - 0.2, READY + 0.2).get(ink, 0) >= 4
    assert ink not in colours(timeline, READY - 2, READY - 1)


def test_shift_and_wheel_move(timeline: Timeline) -> None:
    x, y = timeline.point("TP0", 10.0)
    for _ in range(4):
        timeline.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    before = timeline.settled()
    timeline.browser.mouse("mouseWheel", x, y, deltaX=100, deltaY=0)
    after = timeline.browser.until(lambda: now if (now := timeline.shown()).begin > before.begin else None)
    assert after.span == pytest.approx(before.span, rel=1e-3)


def test_the_tooltip_goes_with_the_focus(timeline: Timeline) -> None:
    timeline.focus()
    timeline.browser.keys("\ue014")
    assert timeline.browser.find("#tip").is_displayed()
    timeline.browser.run("arguments[0].blur()", timeline.frame)
    assert not timeline.browser.find("#tip").is_displayed()


def test_what_is_left_of_the_view_is_not_looked_at(chromium: Browser, tmp_path: Path) -> None:
    write_page([read_run(write_large(tmp_path / "large"))], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    timeline = Timeline(chromium)
    # All the loads are at the end, and nearly all compiles before it.
    x, y = timeline.point("worker 1", 231.0)
    for _ in range(12):
        chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
        timeline.settled()
    shown = timeline.shown()
    assert shown.begin > 220
    # The 5,000 loads, what those and the time between them are attributed to, and the last compiles of 64 workers.
    assert shown.events < 5_000 + 2 * 625 + 64 * 4
