"""The page in a browser: what it draws, what it says, and how it is used."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from kit.browser import Browser
from kit.report_page import Page, opened
from kit.sample_runs import HOSTILE, step, write_exact, write_process, write_stock
from sglang_warmstart.base.events import Event
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

pytestmark = pytest.mark.timeout(300)

# Of 10,000 events with their names; a page is mailed around and kept with a build.
PAGE_LIMIT = 1_500_000

LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"
HOME, END, ENTER, ESCAPE, TAB = "\ue011", "\ue010", "\ue007", "\ue00c", "\ue004"


# ---- What it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["exact", "compare"])
def test_the_first_screen_is_the_verdict_and_the_picture(chromium: Browser, pages: Path, page: str) -> None:
    chromium.open(pages / f"{page}.html", width=1280, height=800)
    ends = chromium.run(
        "return ['h1', '.warning', '.legend', '.frame'].map((each) =>"
        " document.querySelector(each).getBoundingClientRect().bottom)"
    )
    assert ends == sorted(ends)
    assert ends[-1] < 800
    ids = chromium.run("return [...document.querySelectorAll('section')].map((each) => each.id)")
    assert ids == ["picture", "serving", "parts", "compiles", "targets", "kernels"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_the_colours_of_the_scheme(chromium: Browser, pages: Path, scheme: str) -> None:
    # It may change while the page is open.
    chromium.open(pages / "exact.html", scheme="dark" if scheme == "light" else "light")
    chromium.prefer(scheme)
    page = Page(chromium)
    ground = sum(map(int, re.findall(r"\d+", page.colour("ground"))))
    assert (ground > 600) == (scheme == "light")
    for lane, second, row, category in (
        ("start-up", 10.0, 0, "process"),
        ("main", 3.0, 0, "process"),
        ("PP0 TP0", 25.0, 1, "weights"),
        ("PP0 TP0", 50.0, 2, "compile"),
        ("worker 3", 40.0, 0, "compile"),
    ):
        assert page.style(lane, second, "backgroundColor", row) == page.colour(category), lane
    # Where nothing is under way nothing is drawn.
    assert page.style("restore", 43.0, "backgroundColor") is None
    assert chromium.console() == []


def test_it_prints_in_light_colours_and_without_controls(exact: Page) -> None:
    exact.browser.prefer("dark")
    dark = exact.colour("ground")
    exact.browser.prefer("dark", media="print")
    assert exact.colour("ground") != dark
    assert exact.style("main", 3.0, "backgroundColor") == exact.colour("process")
    assert not exact.browser.find(".tools").is_displayed()
    exact.browser.prefer("light")


def test_the_head_and_the_parts_say_what_it_comes_to(exact: Page) -> None:
    assert exact.text("h1") == "Ready after 79.4 s; 39 kernels compiled by 4 workers, 2 on call, 1 while serving."
    assert exact.text(".overline") == "exact · gpu-node-7 · 2026-09-10 12:26:40 UTC · 5 processes"
    assert "Compile kernels ahead 38.4 s" in exact.text(".legend").splitlines()
    found = exact.browser.run(
        "return [...document.querySelectorAll('#parts tbody tr, #parts tfoot tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert ["Compile kernels ahead", "38.4 s", "48.4 %"] in found
    *parts, whole = ([name, float(seconds.removesuffix(" s"))] for name, seconds, _ in found)
    assert whole == ["start to ready", 79.4]
    assert sum(seconds for _, seconds in parts) == pytest.approx(79.4, abs=0.05 * len(parts))


def test_a_compile_while_serving_cannot_be_missed(chromium: Browser, exact: Page, tmp_path: Path) -> None:
    assert exact.text(".warning") == "1 kernel was compiled while serving: a request waited for it."
    assert exact.style("PP1 TP0", 84.0, "outlineColor") == exact.colour("alarm")
    chromium.find(".warning a").click()
    assert 0 <= chromium.run("return document.getElementById('serving').getBoundingClientRect().top") < 450
    ((kernel, seconds, began, library, where, shape, instead),) = exact.rows("serving")
    assert (kernel, seconds, library, where) == ("_fwd_grouped_kernel_stage1", "0.84 s", "triton", "PP1 TP0")
    assert began == "83.6 s"
    assert shape.startswith("x: *bf16")
    assert "a forward of this shape before the server is ready would have" in instead
    page = opened(chromium, write_exact(tmp_path / "clean"))
    assert page.count(".warning, #serving, .bar.alarm") == 0
    assert page.text("h1").endswith("none after ready.")


def test_a_compile_hours_later_is_marked_and_does_not_squeeze_the_start_up(chromium: Browser, tmp_path: Path) -> None:
    late = [
        Event(kind="jit", name="late", at=20_000.0, seconds=2.0, library="triton", phase="serving"),
        Event(kind="load", name="a load", at=20_001.0, library="triton"),
    ]
    write_process(tmp_path / "run", "main", 1, 0.0, [step("imports", 0, 6), Event(kind="ready", name="server", at=10)])
    write_process(tmp_path / "run", "rank", 2, 0.0, late, tp_rank="0")
    page = opened(chromium, tmp_path / "run")
    assert float(page.browser.find(".frame").get_attribute("data-end")) < 11
    assert page.count(".bar.alarm") == 1
    assert page.text("#beyond") == "2 events later than 10.2 s are beyond this picture."
    page.browser.find("#serving .go").click()
    assert page.tip().startswith("late\n")
    assert "20000.0 s after the start" in page.tip()


def test_bars_differ_without_colour_too(chromium: Browser, tmp_path: Path) -> None:
    events = [
        Event(kind="load", name="l", at=1.0, seconds=1.0, library="triton"),
        Event(kind="load", name="c", at=3.0, seconds=1.0, library="triton", cached=True),
        Event(kind="jit", name="j", at=5.0, seconds=1.0, library="triton"),
    ]
    write_process(tmp_path / "run", "rank", 1, 0.0, [*events, Event(kind="ready", name="server", at=8.0)], tp_rank="0")
    page = opened(chromium, tmp_path / "run")
    images = [page.style("TP0", begin + 0.5, "backgroundImage") for begin in (1.0, 3.0, 5.0)]
    assert images[:2] == ["none", "none"]
    assert "repeating-linear-gradient" in str(images[2])  # on call: hatched
    assert page.style("TP0", 1.5, "backgroundColor") == page.colour("load") != page.style("TP0", 3.5, "backgroundColor")
    for second, outlined in ((1.5, False), (3.5, True), (7.0, True)):  # the last is not accounted for
        lane = "start-up" if second == 7.0 else "TP0"
        assert (page.style(lane, second, "boxShadow") != "none") == outlined
    box, line = chromium.run(
        "return ['.row', '.ready'].map((each) => document.querySelector(each).getBoundingClientRect().toJSON())"
    )
    end = float(chromium.find(".frame").get_attribute("data-end"))
    assert line["left"] + 1 == pytest.approx(box["left"] + box["width"] * 8.0 / end, abs=1)


def test_what_could_not_be_read_is_said(chromium: Browser, tmp_path: Path) -> None:
    write_exact(tmp_path / "run")
    (tmp_path / "run" / "rank-4101.jsonl").write_text("<b>no header</b>\n")
    assert "rank-4101.jsonl: JSON is malformed" in opened(chromium, tmp_path / "run").text(".note")


def test_a_run_that_has_said_nothing_yet_is_a_page_all_the_same(chromium: Browser, tmp_path: Path) -> None:
    write_process(tmp_path / "run", "main", 1, 0.0, [])
    page = opened(chromium, tmp_path / "run")
    page.press(RIGHT, DOWN, HOME, ESCAPE)
    assert page.text("h1").startswith("Not ready")
    assert chromium.console() == []


# ---- Mouse and keyboard ----------------------------------------------------------------------------------------------


def test_the_tooltip_is_that_of_the_event_under_the_mouse(exact: Page) -> None:
    main = exact.hover("main", 3.0)
    assert main.splitlines()[0] == "imports"
    assert "6.20 s" in main
    for row, name in enumerate(("scheduler", "kernel warm-up", "wait for kernels")):
        assert exact.hover("PP1 TP0", 50.0, row).splitlines()[0] == name
    worker = exact.hover("worker 2", 33.0)
    for said in ("sm90_fp8_gemm_1d2d.", "compiled ahead", "worker 2", "deep-gemm", "n=24576 k=1536"):
        assert said in worker
    assert "compiled on call, while serving" in exact.hover("PP1 TP0", 84.0)
    assert exact.hover("main", 40.0) == ""
    # 240 loads within a second are drawn together.
    assert re.search(r"\d\d events, of which this is the longest", exact.hover("PP0 TP0", 70.9, row=2))


def test_the_tooltip_stays_in_the_window(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "exact.html", width=700, height=500)
    assert Page(chromium).hover("PP1 TP0", 84.0)
    box = chromium.run("return document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert min(box["left"], box["top"]) >= 0
    assert box["right"] <= 700
    assert box["bottom"] <= 500


def test_a_click_selects_and_says_what_it_is(exact: Page) -> None:
    x, y = exact.point("worker 2", 33.0)
    for kind in ("mousePressed", "mouseReleased"):
        exact.browser.mouse(kind, x, y, button="left", buttons=1, clickCount=1)
    assert re.match(r"sm90_fp8_gemm_1d2d\.\w+: what compiled ahead, took ", exact.said())
    assert exact.style("worker 2", 33.0, "outlineColor") == exact.colour("focus")


def test_the_arrows_walk_from_event_to_event_and_from_lane_to_lane(exact: Page) -> None:
    walk = []
    for key in (RIGHT, RIGHT, RIGHT, LEFT, DOWN, DOWN, UP, HOME, END):
        exact.press(key)
        name, _, rest = exact.said().partition(": ")
        # Each one is told, its details are shown, and it alone has the ring.
        assert rest.startswith("what ")
        assert exact.tip().startswith(f"{name}\n")
        assert exact.count(".selected") == 1
        walk.append(name)
    assert walk[:4] == ["imports", "launch", "server warm-up", "launch"]
    # PP0 TP0's imports at the time of main's launch; its set-up began later.
    assert walk[4:] == ["imports", "distributed", "scheduler", "imports", "scheduler"]
    exact.browser.run("document.querySelector('.frame').blur()")
    assert exact.tip() == ""
    exact.press(RIGHT, ESCAPE)
    assert exact.count(".selected") == 0
    assert exact.tip() == ""


def test_tab_reaches_everything_and_shows_where_it_is(exact: Page) -> None:
    exact.browser.run("document.body.focus(); scrollTo(0, 0)")
    reached, outlines = [], []
    for _ in range(14):
        exact.browser.keys(TAB)
        kind, name, outline = exact.browser.run(
            "const each = document.activeElement, style = getComputedStyle(each);"
            "return [each.getAttribute('role') || each.tagName.toLowerCase(), each.getAttribute('aria-label') ||"
            " each.textContent, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2]"
        )
        reached.append((kind, name))
        outlines.append(outline)
    assert all(outlines), reached
    assert reached[0][0] == "a"
    assert reached[1] == ("application", "Timeline: 11 lanes, 79.4 s")
    assert {"kernel", "_fwd_grouped_kernel_stage1", "JIT while serving"} <= {name for _, name in reached}
    frame = exact.browser.find(".frame")
    assert "arrow keys" in exact.text(f"#{frame.get_attribute('aria-describedby')}")
    assert exact.browser.find("#live").get_attribute("aria-live") == "polite"


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_sorted_filtered_and_continued(exact: Page) -> None:
    heads = "[...document.querySelectorAll('#compiles th')].find((each) => each.textContent === arguments[0])"

    def press(title: str) -> tuple[str, list[str]]:
        direction = exact.browser.run(
            f"{heads}.querySelector('button').click(); return {heads}.getAttribute('aria-sort')", title
        )
        place = ["kernel", "seconds"].index(title)
        return direction, [row[place] for row in exact.rows("compiles")]

    assert len(exact.rows("compiles")) == 10
    exact.browser.run("document.querySelector('#compiles button.more-rows').click()")
    assert not exact.browser.find("#compiles button.more-rows").is_displayed()
    first = [row[1] for row in exact.rows("compiles")]
    assert len(first) == 42
    assert first == sorted(first, key=lambda each: -float(each.removesuffix(" s")))
    assert press("seconds") == ("ascending", first[::-1])
    direction, names = press("kernel")
    assert (direction, names[:2]) == ("ascending", ["_fwd_grouped_kernel_stage1", "fused_moe_kernel"])
    assert press("kernel") == ("descending", names[::-1])
    field = exact.browser.find("#compiles input")
    field.send_keys("N=2112")
    found = exact.rows("compiles")
    assert len(found) == 5
    assert all("n=2112" in row[-1] for row in found)
    assert "5 of 42" in exact.text("#compiles .above")
    field.send_keys(" no such thing")
    assert exact.rows("compiles") == []


def test_a_row_leads_to_its_event_by_mouse_and_keyboard(exact: Page) -> None:
    for table in ("serving", "compiles", "targets", "kernels"):
        for by in ("click", "enter"):
            exact.browser.run("document.querySelector(`#${arguments[0]} .go`).focus()", table)
            if by == "enter":
                exact.browser.keys(ENTER)
            else:
                exact.browser.run("document.activeElement.click()")
            name, *_ = exact.rows(table)[0]
            assert name in exact.said()
            assert exact.tip()
            box = exact.browser.run("return document.querySelector('.selected').getBoundingClientRect().toJSON()")
            assert 0 <= box["top"] < 900
            exact.press(ESCAPE)


def test_a_long_shape_is_folded(chromium: Browser, tmp_path: Path) -> None:
    shape = "x: *bf16, " * 200
    event = Event(kind="jit", name="k" * 500, at=1.0, seconds=1.0, library="triton", shape=shape)
    write_process(tmp_path / "run", "rank", 1, 0.0, [event], tp_rank="0")
    page = opened(chromium, tmp_path / "run", width=800)
    height = "return document.querySelector('#compiles tbody tr').offsetHeight"
    assert chromium.run(height) < 120
    chromium.find("#compiles summary").click()
    assert chromium.run(height) > 300
    assert shape.strip() in page.text("#compiles details")


# ---- Several runs ----------------------------------------------------------------------------------------------------


def test_two_runs_have_one_axis_and_a_difference(chromium: Browser, pages: Path) -> None:
    chromium.open(pages / "compare.html")
    page = Page(chromium)
    assert page.text("h1") == "B is ready 94.7 s earlier than A: after 79.4 s instead of 174.1 s."
    assert page.text(".warning").endswith("(B 1)")
    assert [each.text.split()[:2] for each in chromium.all(".run h2")] == [["A", "stock"], ["B", "exact"]]
    assert page.count(".axis") == 1
    assert page.point("main", 50.0, run=0)[0] == page.point("main", 50.0, run=1)[0]
    assert page.hover("PP0 TP0", 60.0, row=2, run=0).startswith("sm90_fp8_gemm_1d2d_impl<")
    assert page.hover("PP0 TP0", 60.0, row=2, run=1).startswith("wait for kernels")
    parts = chromium.run(
        "return Object.fromEntries([...document.querySelectorAll('#parts tbody tr')]"
        ".map((row) => [row.dataset.category, [...row.querySelectorAll('td')].map((cell) => cell.textContent)]))"
    )
    assert parts["jit"] == ["129.2 s", "1.30 s", "\u2212127.9 s"]
    assert parts["compile"] == ["0 s", "38.4 s", "+38.4 s"]
    assert {row[0] for row in page.rows("kernels")} == {"A"}  # those took the longest
    chromium.run("document.querySelector('#serving .go').click()")
    assert page.said().startswith("Run B. _fwd_grouped_kernel_stage1: ")
    # From one run to the other with the arrows.
    page.press(ESCAPE, RIGHT, *[DOWN] * 8)
    assert page.said().startswith("Run B. ")
    assert chromium.console() == []


def test_three_runs_are_each_compared_with_the_first(chromium: Browser, tmp_path: Path) -> None:
    page = opened(chromium, write_stock(tmp_path / "a"), write_exact(tmp_path / "b"), write_exact(tmp_path / "c"))
    assert page.count(".run") == 3
    assert page.text("h1").count("earlier than A") == 2
    heads = chromium.run("return [...document.querySelectorAll('#parts thead th')].map((each) => each.textContent)")
    assert heads == ["category", "A", "B", "B \u2212 A", "C", "C \u2212 A"]


# ---- Very many events ------------------------------------------------------------------------------------------------


def test_ten_thousand_events_are_fewer_bars_and_a_small_page(chromium: Browser, pages: Path) -> None:
    assert (pages / "large.html").stat().st_size < PAGE_LIMIT
    begin = time.monotonic()
    chromium.open(pages / "large.html")
    page = Page(chromium)
    # 5,000 loads are narrower than a pixel, 64 workers compile as many kernels.
    assert 5_000 < page.count(".bar") < 5_500
    assert page.text("#picture .thin .label") == "64 workers"
    assert page.hover("worker 30", 100.0).startswith("sm90_m_grouped_fp8_gemm_nt_masked_1d2d.")
    assert time.monotonic() - begin < 10


def test_what_overlaps_more_than_there_are_rows_can_be_found(chromium: Browser, tmp_path: Path) -> None:
    # Ten threads that compile; the last but two outlasts all that shares its row.
    lengths = [90.0] * 7 + [80.0, 1.0, 1.0, *(0.5 for _ in range(20))]
    events = [Event(kind="jit", name=f"thread {n}", at=1.0 + n, seconds=s) for n, s in enumerate(lengths)]
    write_process(tmp_path / "run", "rank", 1, 0.0, events, tp_rank="0")
    page = opened(chromium, tmp_path / "run")
    assert page.hover("TP0", 60.0, row=7).startswith("thread 7\n")
    assert page.hover("TP0", 9.5, row=7).startswith("thread 8\n")


# ---- What comes from outside -----------------------------------------------------------------------------------------


def test_hostile_texts_stay_text_and_ask_no_network(chromium: Browser, pages: Path, tmp_path: Path) -> None:
    chromium.open(pages / "hostile.html")
    page = Page(chromium)
    assert page.count("img, body script") == 2
    assert chromium.driver.title == "Start-up of hostile"
    assert page.rows("serving")[0][0] == HOSTILE
    assert "</script><img src=x" in page.hover("main", 0.5)
    page.press(RIGHT, DOWN, RIGHT)
    assert "<img src=x" in page.said()
    assert chromium.driver.title == "Start-up of hostile"
    assert chromium.console() == []
    assert chromium.requests() == []
    text = (pages / "hostile.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert HOSTILE in json.loads(data)["texts"]
    assert not set("<>\u2028\u2029") & set(data)
    # A directory's name comes from outside too.
    directory = write_exact(tmp_path / "<img src=x onerror=alert(1)>@@DATA@@")
    write_page([read_run(directory)], tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    assert chromium.driver.title == "Start-up of <img src=x onerror=alert(1)>@@DATA@@"
    assert page.count("img") == 0
    assert chromium.console() == []


def test_the_network_could_not_be_asked(exact: Page) -> None:
    refused = exact.browser.driver.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', (event) =>"
        " done(event.effectiveDirective)); fetch('http://127.0.0.1:9/').catch(() => undefined);"
    )
    assert refused == "connect-src"


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "compare", "hostile"])
def test_no_width_makes_the_page_scroll_sideways(chromium: Browser, pages: Path, name: str) -> None:
    chromium.open(pages / f"{name}.html")
    for width in (360, 800, 3840):
        chromium.size(width, 900)
        found, rows, *scrolls = chromium.run(
            "return [document.documentElement.scrollWidth, document.querySelector('.rows').clientWidth,"
            " ...[...document.querySelectorAll('.scroll:has(.cards)')].map((e) => e.scrollWidth - e.clientWidth)]"
        )
        assert found <= width
        assert rows > 0.7 * width - 80
        if width == 360:
            # On a telephone a row is a card.
            assert set(scrolls) == {0}
            label = "return getComputedStyle(document.querySelector('#compiles td.number'), '::before').content"
            assert chromium.run(label) == '"seconds"'
