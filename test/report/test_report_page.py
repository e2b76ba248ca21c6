"""The page in a real browser: what it shows, how one moves in it, and that nothing gets into it or out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.browser import Browser, browser
from kit.report_page import Timeline, colour_of, rows, said
from kit.sample_runs import HOSTILE, step, write_exact, write_hostile, write_large, write_process, write_stock
from sglang_warmstart.base.events import Event
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

pytestmark = pytest.mark.timeout(300)

# Of 10,000 events with their names; a page is mailed around and kept with a build.
PAGE_LIMIT = 1_500_000


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as window:
        yield window


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages")
    exact = read_run(write_exact(place / "exact", serving=True))
    stock = read_run(write_stock(place / "stock"))
    write_page([exact], place / "exact.html")
    write_page([stock, exact], place / "compare.html")
    write_page([read_run(write_large(place / "large"))], place / "large.html")
    write_page([read_run(write_hostile(place / "hostile"))], place / "hostile.html")
    return place


@pytest.fixture
def exact(chromium: Browser, pages: Path) -> Timeline:
    chromium.open(pages / "exact.html")
    return Timeline(chromium)


def element(of: Browser, name: str) -> str:
    text: str = of.find(name).text
    return text


# ---- What it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_the_colours_of_the_scheme(chromium: Browser, pages: Path, scheme: str) -> None:
    chromium.open(pages / "exact.html", scheme=scheme)
    timeline = Timeline(chromium)
    # Before it is looked at: Chromium warns of reading pixels back.
    assert chromium.console() == []
    background = sum(colour_of(chromium, "ground"))
    assert (background > 600) == (scheme == "light")
    for lane, second, row, category in (
        ("start-up", 10.0, 0, "process"),
        ("main", 3.0, 0, "process"),
        ("PP0 TP0", 25.0, 1, "weights"),
        ("PP0 TP0", 50.0, 2, "compile"),
        ("worker 3", 40.0, 0, "compile"),
    ):
        assert timeline.pixel(lane, second, row)[:3] == colour_of(chromium, category), lane
    # Where nothing is under way nothing is drawn.
    assert timeline.pixel("restore", 43.0)[3] == 0


def test_the_scheme_may_change_while_it_is_open(exact: Timeline) -> None:
    light = exact.pixel("main", 3.0)
    exact.browser.prefer("dark")
    exact.settled()
    assert exact.pixel("main", 3.0)[:3] == colour_of(exact.browser, "process") != light[:3]


def test_the_head_says_what_it_comes_to(exact: Timeline) -> None:
    assert element(exact.browser, "h1") == (
        "Ready after 79.4 s; 39 kernels compiled by 4 workers, 2 on call, 1 while serving."
    )
    assert element(exact.browser, "header").splitlines()[-1] == (
        "gpu-node-7 \u00b7 2026-09-10 12:26:40 UTC \u00b7 5 processes"
    )


def test_the_parts_are_those_of_the_text_and_add_up(exact: Timeline) -> None:
    found = exact.browser.run(
        "return [...document.querySelectorAll('#parts tbody tr, #parts tfoot tr')]"
        ".map((row) => [...row.children].slice(0, 3).map((cell) => cell.textContent))"
    )
    assert ["Compile kernels ahead", "38.4 s", "48.4 %"] in found
    *parts, whole = ([name, float(seconds.removesuffix(" s"))] for name, seconds, _ in found)
    assert whole == ["start to ready", 79.4]
    assert sum(seconds for _, seconds in parts) == pytest.approx(79.4, abs=0.05 * len(parts))
    # The bar says the same for those who do not see it.
    assert "Compile kernels ahead 38.4 s" in exact.browser.find(".stack").get_attribute("aria-label")
    widths = exact.browser.run("return [...document.querySelectorAll('.stack span')].map((each) => each.offsetWidth)")
    assert max(widths) == pytest.approx(sum(widths) * 38.4 / 79.4, rel=0.03)


def test_what_was_compiled_while_serving_comes_first(exact: Timeline) -> None:
    ids = exact.browser.run("return [...document.querySelectorAll('section')].map((each) => each.id)")
    assert ids == ["serving", "where", "timeline", "compiles", "targets", "kernels"]
    ((kernel, seconds, began, library, where, shape, instead),) = rows(exact.browser, "serving")
    assert (kernel, seconds, library, where) == ("_fwd_grouped_kernel_stage1", "0.84 s", "triton", "PP1 TP0")
    assert began == "83.6 s"
    assert shape.startswith("x: *bf16")
    assert instead.startswith("a forward of this shape before the server is ready would have")


def test_a_compile_while_serving_is_marked_in_the_timeline(chromium: Browser, pages: Path) -> None:
    marked = {}
    for page in ("exact", "large"):
        chromium.open(pages / f"{page}.html")
        timeline = Timeline(chromium)
        timeline.settled()
        marked[page] = [timeline.count(canvas, colour_of(chromium, "alarm")) for canvas in (".lanes", ".axis")]
    assert marked["large"] == [0, 0]
    # A frame around it, and a triangle above.
    assert marked["exact"][0] > 60
    assert marked["exact"][1] > 15


def test_what_was_found_what_was_compiled_and_what_is_unknown_look_different(chromium: Browser, tmp_path: Path) -> None:
    events = [
        Event(kind="load", name="", at=1.0, seconds=1.0, library="triton"),
        Event(kind="load", name="", at=3.0, seconds=1.0, library="triton", cached=True),
        Event(kind="jit", name="", at=5.0, seconds=1.0, library="triton"),
    ]
    write_process(tmp_path / "run", "rank", 1, 0.0, events, tp_rank="0")
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    timeline = Timeline(chromium)
    full, hollow = ({timeline.pixel("TP0", begin + part / 20)[3] for part in range(4, 16)} for begin in (1.0, 3.0))
    assert full == {255}
    assert max(hollow) < 128
    assert len({timeline.pixel("TP0", 1.0 + part / 40) for part in range(8, 32)}) == 1
    # Hatched: not one colour.
    assert len({timeline.pixel("TP0", 5.0 + part / 200) for part in range(40, 160)}) > 1
    # What is not accounted for has an outline, as its colour is next to that of the ground.
    strong = colour_of(chromium, "strong")
    assert timeline.count(".lanes", strong) > 300


def test_what_overlaps_more_than_there_are_rows_is_drawn_however_far_one_zooms(
    chromium: Browser, tmp_path: Path
) -> None:
    # Ten threads that compile; the last but two outlasts all that shares its row.
    lengths = [90.0] * 7 + [80.0, 1.0, 1.0, *(0.5 for _ in range(20))]
    events = [Event(kind="jit", name=f"thread {n}", at=1.0 + n, seconds=s) for n, s in enumerate(lengths)]
    write_process(tmp_path / "run", "rank", 1, 0.0, events, tp_rank="0")
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    timeline = Timeline(chromium)
    x, y = timeline.point("TP0", 60.0, row=7)
    for _ in range(6):
        chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    chromium.until(lambda: timeline.settled().begin > 35)
    assert timeline.shown().events == 8 + 1  # and what they are attributed to
    assert timeline.hover("TP0", 60.0, row=7).startswith("thread 7\n")


def test_a_dashed_line_is_where_the_server_was_ready(exact: Timeline) -> None:
    ink = colour_of(exact.browser, "ink")
    _, width, _ = exact.place("restore")
    pixel = exact.shown().span / width
    found = {
        second
        for second in (40.0, 79.4, 82.0)
        for shift in range(-3, 4)
        for row in (-1, 0, 1)  # some of it is a gap
        if exact.pixel("restore", second + shift * pixel, row)[:3] == ink
    }
    assert found == {79.4}


def test_without_any_there_is_no_warning(chromium: Browser, tmp_path: Path) -> None:
    write_page([read_run(write_exact(tmp_path / "run"))], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    assert chromium.all("#serving, .alarm") == []
    assert element(chromium, "h1").endswith("none after ready.")


def test_what_could_not_be_read_is_said(chromium: Browser, tmp_path: Path) -> None:
    write_exact(tmp_path / "run")
    (tmp_path / "run" / "rank-4101.jsonl").write_text("<b>no header</b>\n")
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    assert "rank-4101.jsonl: JSON is malformed" in element(chromium, ".note")


def test_a_run_that_has_said_nothing_yet_is_a_page_all_the_same(chromium: Browser, tmp_path: Path) -> None:
    write_process(tmp_path / "run", "main", 1, 0.0, [])
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    timeline = Timeline(chromium)
    timeline.focus()
    chromium.keys("\ue014", "\ue015", "+", "0", "\ue007")
    timeline.settled()
    assert element(chromium, "h1").startswith("Not ready")
    assert chromium.console() == []


# ---- The mouse -------------------------------------------------------------------------------------------------------


def test_the_tooltip_is_that_of_the_event_under_the_mouse(exact: Timeline) -> None:
    step_of_main = exact.hover("main", 3.0)
    assert step_of_main.splitlines()[0] == "imports"
    assert "6.20 s" in step_of_main
    assert exact.hover("PP1 TP0", 50.0, row=0).splitlines()[0] == "scheduler"
    assert exact.hover("PP1 TP0", 50.0, row=1).splitlines()[0] == "kernel warm-up"
    assert exact.hover("PP1 TP0", 50.0, row=2).splitlines()[0] == "wait for kernels"
    worker = exact.hover("worker 2", 33.0)
    assert worker.startswith("sm90_fp8_gemm_1d2d.")
    for said_of_it in ("compiled ahead", "worker 2", "deep-gemm", "n=24576 k=1536"):
        assert said_of_it in worker
    serving = exact.hover("PP1 TP0", 84.0)
    assert serving.startswith("_fwd_grouped_kernel_stage1\n")
    assert "compiled on call, while serving" in serving
    assert exact.hover("main", 40.0) == ""


def test_the_tooltip_says_when_it_is_one_of_many(exact: Timeline) -> None:
    x, y = exact.point("PP0 TP0", 70.6, row=2)
    for shift in range(-40, 60):
        exact.browser.mouse("mouseMoved", x + shift, y)
        if "zoom in to tell them apart" in exact.browser.find("#tip").text:
            return
    pytest.fail("240 loads within a second are not said to be many")


def test_the_tooltip_stays_in_the_window(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "exact.html", width=700, height=500)
    timeline = Timeline(chromium)
    assert timeline.hover("PP1 TP0", 84.0)
    box = chromium.run("return document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["top"] >= 0
    assert box["right"] <= 700
    assert box["bottom"] <= 500


def test_the_wheel_zooms_around_the_mouse(exact: Timeline) -> None:
    before = exact.shown()
    x, y = exact.point("worker 1", 40.0)
    exact.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    after = exact.browser.until(lambda: now if (now := exact.shown()).span < before.span else None)
    assert after.span < 0.85 * before.span
    assert exact.point("worker 1", 40.0)[0] == pytest.approx(x, abs=1.5)
    exact.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
    exact.browser.until(lambda: exact.shown().span == pytest.approx(before.span, rel=0.01))


def test_the_wheel_scrolls_the_page_where_there_is_nothing_to_zoom_out_of(exact: Timeline) -> None:
    home = exact.shown()
    x, y = exact.point("main", 40.0)
    top = exact.browser.run("return scrollY")

    def is_scrolled_by_a_turn() -> bool:
        # Chromium gives a turn that follows another at once to what had that one: here, to the page before.
        exact.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
        exact.settled()
        return bool(exact.browser.run("return scrollY") > top)

    exact.browser.until(is_scrolled_by_a_turn)
    assert exact.shown().span == home.span


def test_dragging_moves_and_a_double_click_resets(exact: Timeline) -> None:
    home = exact.shown()
    x, y = exact.point("worker 1", 40.0)
    for _ in range(6):
        exact.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    zoomed = exact.browser.until(lambda: now if (now := exact.shown()).span < home.span / 3 else None)
    exact.browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    for shift in (10, 40, 80):
        exact.browser.mouse("mouseMoved", x + shift, y, button="left", buttons=1)
    exact.browser.mouse("mouseReleased", x + 80, y, button="left", clickCount=1)
    moved = exact.settled()
    assert moved.span == pytest.approx(zoomed.span, rel=1e-3)
    assert moved.begin < zoomed.begin
    # What was under the mouse still is.
    assert exact.point("worker 1", 40.0)[0] == pytest.approx(x + 80, abs=2)
    for count in (1, 2):
        exact.browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=count)
        exact.browser.mouse("mouseReleased", x, y, button="left", clickCount=count)
    back = exact.settled()
    assert (back.begin, back.end) == (home.begin, home.end)


def test_a_click_selects_and_says_what_it_is(exact: Timeline) -> None:
    x, y = exact.point("worker 2", 33.0)
    exact.browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    exact.browser.mouse("mouseReleased", x, y, button="left", clickCount=1)
    selected = exact.settled().selected
    assert selected.startswith("sm90_fp8_gemm_1d2d.")
    assert said(exact.browser).startswith(f"{selected}: what compiled ahead, took ")


def test_the_buttons_zoom_and_reset(exact: Timeline) -> None:
    home = exact.shown()
    exact.browser.find("button[aria-label='Zoom in']").click()
    assert exact.settled().span == pytest.approx(home.span * 0.6, rel=0.01)
    exact.browser.find("button[aria-label='Zoom out']").click()
    assert exact.settled().span == pytest.approx(home.span, rel=0.01)
    exact.browser.find("button[aria-label='Zoom in']").click()
    exact.browser.find("button[aria-label='Show the whole start-up']").click()
    assert exact.settled().end == home.end


def test_a_compile_hours_later_does_not_squeeze_the_start_up(chromium: Browser, tmp_path: Path) -> None:
    late = Event(kind="jit", name="late", at=20_000.0, seconds=2.0, library="triton", phase="serving")
    write_process(tmp_path / "run", "main", 1, 0.0, [step("imports", 0, 6), Event(kind="ready", name="server", at=10)])
    write_process(tmp_path / "run", "rank", 2, 0.0, [late], tp_rank="0")
    write_page([read_run(tmp_path / "run")], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    timeline = Timeline(chromium)
    assert timeline.shown().end < 11
    chromium.find("button[aria-label='Show everything, serving too']").click()
    assert timeline.settled().end > 20_000
    assert timeline.hover("TP0", 20_001.0).startswith("late\n")


# ---- The keyboard ----------------------------------------------------------------------------------------------------

LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"
HOME, END, ENTER, ESCAPE, TAB = "\ue011", "\ue010", "\ue007", "\ue00c", "\ue004"


def test_the_arrows_walk_from_event_to_event_and_from_lane_to_lane(exact: Timeline) -> None:
    exact.focus()
    walk = []
    for key in (RIGHT, RIGHT, RIGHT, LEFT, DOWN, DOWN, DOWN, HOME, END):
        exact.browser.keys(key)
        now = exact.settled()
        # Each one is told, and its details are shown.
        assert said(exact.browser).startswith(f"{now.selected}: what ")
        assert element(exact.browser, "#tip").startswith(f"{now.selected}\n")
        walk.append(now.selected)
    assert walk[:4] == ["imports", "launch", "server warm-up", "launch"]
    assert walk[4] == "imports"  # PP0 TP0's, at the time of main's launch
    assert walk[5:] == ["distributed", "dry forwards", "dry forwards", "fused_moe_kernel"]


def test_the_selected_event_has_a_ring(exact: Timeline) -> None:
    exact.focus()
    exact.browser.keys(RIGHT)
    exact.settled()
    ring = colour_of(exact.browser, "focus")
    assert exact.count(".lanes", ring) > 60
    exact.browser.keys(ESCAPE)
    assert exact.settled().selected == ""
    assert exact.count(".lanes", ring) == 0
    assert not exact.browser.find("#tip").is_displayed()


def test_keys_zoom_and_say_so(exact: Timeline) -> None:
    home = exact.shown()
    exact.focus()
    exact.browser.keys("+")
    assert exact.settled().span == pytest.approx(home.span * 0.6, rel=0.01)
    assert re.fullmatch(r"Zoomed in: \d+\.\d s in sight", said(exact.browser))
    exact.browser.keys("-")
    assert exact.settled().span == pytest.approx(home.span, rel=0.01)
    assert said(exact.browser).startswith("Zoomed out: ")
    exact.browser.keys(RIGHT, RIGHT, ENTER)
    near = exact.settled()
    assert said(exact.browser) == "Zoomed to launch"
    assert near.begin < 6.2 < 6.5 < near.end
    assert near.span < 2
    # From there one walks on, and what is walked to comes into sight.
    exact.browser.keys(RIGHT)
    far = exact.settled()
    assert far.begin > 60
    exact.browser.keys("0")
    assert exact.settled().end == home.end
    assert said(exact.browser) == "The whole start-up, 79.4 s"


def test_tab_reaches_everything_and_shows_where_it_is(exact: Timeline) -> None:
    exact.browser.run("document.body.focus(); scrollTo(0, 0)")
    reached, outlines = [], []
    for _ in range(30):
        exact.browser.keys(TAB)
        kind, name, outline = exact.browser.run(
            "const each = document.activeElement, style = getComputedStyle(each);"
            "return [each.getAttribute('role') || each.tagName.toLowerCase(), each.getAttribute('aria-label') ||"
            " each.textContent, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2]"
        )
        reached.append((kind, name))
        outlines.append(outline)
    assert all(outlines), reached
    found = {name for _, name in reached}
    assert {"Zoom out", "Zoom in", "Show the whole start-up", "_fwd_grouped_kernel_stage1", "kernel"} <= found
    assert ("application", "Timeline: 11 lanes, 79.4 s") in reached
    assert ("input", "Filter: Longest compiles") in reached


def test_the_timeline_says_how_it_is_used(exact: Timeline) -> None:
    assert exact.frame.get_attribute("role") == "application"
    described = exact.frame.get_attribute("aria-describedby")
    assert "next event" in element(exact.browser, f"#{described}")
    assert exact.browser.find("#live").get_attribute("aria-live") == "polite"


def test_what_moves_moves_only_for_those_who_like_it(chromium: Browser, pages: Path) -> None:
    frames = {}
    for calm in (True, False):
        chromium.open(pages / "exact.html", calm=calm)
        timeline = Timeline(chromium)
        timeline.settled()
        before = int(timeline.frame.get_attribute("data-frames"))
        chromium.find("button[aria-label='Zoom in']").click()
        chromium.until(lambda shown=timeline.shown: shown().span < 55)
        timeline.settled()
        frames[calm] = int(timeline.frame.get_attribute("data-frames")) - before
    assert frames[True] == 1
    assert frames[False] > 1


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_a_heading_sorts_and_says_how(exact: Timeline) -> None:
    heads = "[...document.querySelectorAll('#compiles th')].find((each) => each.textContent === arguments[0])"

    def head(title: str) -> str:
        direction: str = exact.browser.run(f"return {heads}.getAttribute('aria-sort')", title)
        return direction

    def press(title: str) -> list[str]:
        exact.browser.run(f"{heads}.querySelector('button').click()", title)
        place = ["kernel", "seconds", "began at"].index(title)
        return [row[place] for row in rows(exact.browser, "compiles")]

    seconds = [float(row[1].removesuffix(" s")) for row in rows(exact.browser, "compiles")]
    assert seconds == sorted(seconds, reverse=True)
    assert (head("seconds"), head("kernel")) == ("descending", "none")
    rising = [float(each.removesuffix(" s")) for each in press("seconds")]
    assert rising == sorted(rising)
    assert rising[0] < seconds[-1]
    assert head("seconds") == "ascending"
    names = press("kernel")
    assert names == sorted(names)
    assert (head("seconds"), head("kernel")) == ("none", "ascending")


def test_a_filter_keeps_what_fits_and_says_how_many(exact: Timeline) -> None:
    exact.browser.find("#compiles input").send_keys("N=2112")
    found = rows(exact.browser, "compiles")
    assert len(found) == 5
    assert all("n=2112" in row[-1] for row in found)
    assert "5 of 42" in element(exact.browser, "#compiles .above")
    exact.browser.find("#compiles input").send_keys(" no such thing")
    assert rows(exact.browser, "compiles") == []


def test_more_rows_are_there_when_they_are_asked_for(exact: Timeline) -> None:
    assert len(rows(exact.browser, "compiles")) == 12
    exact.browser.find("#compiles button.more-rows").click()
    assert len(rows(exact.browser, "compiles")) == 42
    assert not exact.browser.find("#compiles button.more-rows").is_displayed()


@pytest.mark.parametrize("by", ["click", "enter"])
@pytest.mark.parametrize("table", ["serving", "compiles", "targets", "kernels"])
def test_a_row_leads_to_its_event(exact: Timeline, table: str, by: str) -> None:
    home = exact.shown()
    button = exact.browser.find(f"#{table} tbody tr .go")
    if by == "click":
        exact.browser.run("arguments[0].closest('tr').lastElementChild.click()", button)
    else:
        exact.browser.run("arguments[0].focus()", button)
        exact.browser.keys(ENTER)
    near = exact.browser.until(lambda: now if (now := exact.settled()).span < home.span / 4 else None)
    selected = near.selected
    name, *_ = rows(exact.browser, table)[0]
    assert selected == name or name in said(exact.browser)
    box = exact.frame.rect
    top = exact.browser.run("return scrollY")
    assert box["y"] < top + 900
    assert box["y"] + box["height"] > top


# ---- Two runs --------------------------------------------------------------------------------------------------------


def test_two_runs_have_one_scale_and_a_difference(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "compare.html")
    stock, exact = Timeline(chromium, 0), Timeline(chromium, 1)
    assert element(chromium, ".compared") == ("B is ready 94.7 s earlier than A: after 79.4 s instead of 174.1 s.")
    assert [each.text for each in chromium.all(".timeline h3")] == ["A stock", "B exact"]
    assert stock.point("main", 50.0)[0] == exact.point("main", 50.0)[0]
    assert stock.hover("PP0 TP0", 60.0, row=2).startswith("sm90_fp8_gemm_1d2d_impl<")
    assert exact.hover("PP0 TP0", 60.0, row=2).startswith("wait for kernels")
    x, y = exact.point("main", 50.0)
    chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    chromium.until(lambda: exact.shown().span < 140)
    assert stock.settled().end == exact.settled().end
    parts = chromium.run(
        "return Object.fromEntries([...document.querySelectorAll('#parts tbody tr')]"
        ".map((row) => [row.dataset.category, [...row.querySelectorAll('td.number')].map((cell) => cell.textContent)]))"
    )
    assert parts["jit"] == ["129.2 s", "1.30 s", "\u2212127.9 s"]
    assert parts["compile"] == ["0 s", "38.4 s", "+38.4 s"]
    assert {row[0] for row in rows(chromium, "kernels")} == {"A"}  # those took the longest
    widths = [each.size["width"] for each in chromium.all(".stack span:last-child")]
    assert len(widths) == 2
    assert chromium.console() == []


def test_a_row_leads_to_the_timeline_of_its_run(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "compare.html")
    chromium.run("document.querySelector('#serving tbody tr .go').click()")
    assert Timeline(chromium, 1).settled().selected == "_fwd_grouped_kernel_stage1"
    assert Timeline(chromium, 0).settled().selected == ""


# ---- Very many events ------------------------------------------------------------------------------------------------


def test_ten_thousand_events_are_few_bars_and_a_small_page(chromium: Browser, pages: Path) -> None:
    size = (pages / "large.html").stat().st_size
    assert size < PAGE_LIMIT
    chromium.open(pages / "large.html")
    timeline = Timeline(chromium)
    whole = timeline.settled()
    assert whole.events > 10_000
    # 5,000 loads are narrower than a pixel: of those there are no more bars than pixels.
    assert whole.bars < 0.6 * whole.events
    timings = [whole.ms]
    x, y = timeline.point("worker 30", 100.0)
    before = whole
    for _ in range(8):
        chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
        after = timeline.settled()
        timings.append(after.ms)
        assert after.events <= before.events
        before = after
    # What is not in sight costs nothing.
    assert before.span < whole.span / 5
    assert before.bars <= before.events < whole.events / 4
    assert timeline.hover("worker 30", 100.0).startswith("sm90_m_grouped_fp8_gemm_nt_masked_1d2d.")
    print(f"{size} bytes; {whole.bars} bars; frames of {', '.join(f'{ms:.1f}' for ms in timings)} ms")


# ---- What comes from outside -----------------------------------------------------------------------------------------


def test_hostile_names_are_text(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "hostile.html")
    timeline = Timeline(chromium)
    assert chromium.run("return [...document.images].length + document.querySelectorAll('body script').length") == 2
    assert chromium.driver.title == "Start-up of hostile"
    assert rows(chromium, "serving")[0][0] == HOSTILE
    assert "</script><img src=x" in timeline.hover("main", 0.5)
    timeline.focus()
    chromium.keys(RIGHT, DOWN, RIGHT)
    timeline.settled()
    assert "<img src=x" in said(chromium)
    assert chromium.driver.title == "Start-up of hostile"
    assert chromium.console() == []
    assert chromium.requests() == []


def test_a_directory_with_a_hostile_name_is_text_too(chromium: Browser, tmp_path: Path) -> None:
    directory = write_exact(tmp_path / "<img src=x onerror=alert(1)>@@DATA@@")
    write_page([read_run(directory)], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    assert chromium.driver.title == "Start-up of <img src=x onerror=alert(1)>@@DATA@@"
    assert len(chromium.run("return [...document.images]")) == 0
    assert chromium.console() == []


def test_nothing_is_asked_of_the_network_and_nothing_could_be(exact: Timeline) -> None:
    exact.hover("main", 3.0)
    assert exact.browser.requests() == []
    refused = exact.browser.driver.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', (event) =>"
        " done(event.effectiveDirective)); fetch('http://127.0.0.1:9/').catch(() => undefined);"
    )
    assert refused == "connect-src"


def test_the_data_of_a_page_is_whole(pages: Path) -> None:
    page = (pages / "hostile.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert HOSTILE in json.loads(data)["texts"]
    assert not set("<>\u2028\u2029") & set(data)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["exact", "compare", "hostile"])
@pytest.mark.parametrize("width", [360, 800, 3840])
def test_no_width_makes_the_page_scroll_sideways(chromium: Browser, pages: Path, page: str, width: int) -> None:
    chromium.open(pages / f"{page}.html", width=width)
    Timeline(chromium).settled()
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    lanes = chromium.run("return document.querySelector('.lanes').clientWidth")
    assert lanes > 0.6 * width - 80


def test_on_a_telephone_a_table_is_read_without_scrolling_sideways(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "exact.html", width=360)
    widths = chromium.run(
        "return [...document.querySelectorAll('.scroll')].map((each) => [each.scrollWidth, each.clientWidth])"
    )
    assert len(widths) == 5
    assert all(inside <= outside for inside, outside in widths)
    shown = element(chromium, "#compiles tbody tr").splitlines()
    assert shown[0].startswith("sm90_fp8_gemm_1d2d.")
    labels = chromium.run(
        "return [...document.querySelectorAll('#compiles tbody tr:first-child td')]"
        ".map((each) => getComputedStyle(each, '::before').content)"
    )
    assert labels[:3] == ["none", '"seconds"', '"began at"']


def test_it_prints_in_light_colours_and_without_controls(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "exact.html", scheme="dark")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    try:
        assert sum(colour_of(chromium, "ground")) < 200
        chromium.run("dispatchEvent(new Event('beforeprint'))")
        assert sum(colour_of(chromium, "ground")) > 600
        assert not chromium.find(".tools").is_displayed()
        timeline = Timeline(chromium)
        assert timeline.pixel("main", 3.0)[:3] == colour_of(chromium, "process")
        chromium.run("dispatchEvent(new Event('afterprint'))")
        assert sum(colour_of(chromium, "ground")) < 200
    finally:
        chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
