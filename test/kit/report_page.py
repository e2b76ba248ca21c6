"""The page of a report in a browser, as a user has it: lanes, events, what is shown and what is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.browser import Browser

# Seconds of the start-up that are in sight, and what the last frame has drawn.
_SHOWN = """
const { from, to, bars, events, selected, ms } = arguments[0].dataset;
return [Number(from), Number(to), Number(bars), Number(events), selected || "", Number(ms)];
"""
# A lane has its label beside its first row; a row is as high as the label's line.
_PLACE = """
const [frame, lane, row] = arguments;
const label = [...frame.querySelectorAll(".label")].find((each) => each.textContent === lane);
label.scrollIntoView({ block: "center" });
const canvas = frame.querySelector(".lanes").getBoundingClientRect();
const height = parseFloat(getComputedStyle(label).lineHeight);
return [canvas.left, canvas.width, label.getBoundingClientRect().top + 1 + (row + 0.5) * height];
"""
_PIXEL = """
const [frame, x, y] = arguments;
const canvas = frame.querySelector(".lanes"), box = canvas.getBoundingClientRect();
const scale = canvas.width / box.width;
const at = (value, start) => Math.round((value - start) * scale);
return [...canvas.getContext("2d").getImageData(at(x, box.left), at(y, box.top), 1, 1).data];
"""
_COUNT = """
const [frame, selector, [red, green, blue]] = arguments;
const canvas = frame.querySelector(selector);
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let found = 0;
for (let i = 0; i < data.length; i += 4) found += data[i] === red && data[i + 1] === green && data[i + 2] === blue;
return found;
"""


@dataclass(frozen=True)
class Shown:
    """What a timeline shows.

    Args:
        begin: the first second in sight.
        end: the last one.
        bars: that were drawn.
        events: that are in those bars.
        selected: the name of the event that has the ring.
        ms: milliseconds that the last frame took.
    """

    begin: float
    end: float
    bars: int
    events: int
    selected: str
    ms: float

    @property
    def span(self) -> float:
        """Seconds in sight."""
        return self.end - self.begin


class Timeline:
    """One of the timelines of a page.

    Args:
        browser: that shows the page.
        number: of the run, from 0.
    """

    def __init__(self, browser: Browser, number: int = 0) -> None:
        self.browser = browser
        self.frame = browser.all(".frame")[number]

    def shown(self) -> Shown:
        """What it shows now."""
        return Shown(*self.browser.run(_SHOWN, self.frame))

    def settled(self) -> Shown:
        """What it shows when it has been drawn at least once more after what was asked of it."""
        self.browser.run_async("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return self.shown()

    def place(self, lane: str, row: int = 0) -> tuple[float, float, float]:
        """Where in the window a row of a lane is: its left end, its width, the height of its middle. Scrolls there."""
        left, width, y = self.browser.run(_PLACE, self.frame, lane, row)
        return left, width, y

    def point(self, lane: str, second: float, row: int = 0) -> tuple[float, float]:
        """Where in the window a moment of a lane is. Scrolls there."""
        left, width, y = self.place(lane, row)
        shown = self.shown()
        return left + (second - shown.begin) / shown.span * width, y

    def hover(self, lane: str, second: float, row: int = 0) -> str:
        """What the tooltip says there; nothing if there is none."""
        x, y = self.point(lane, second, row)
        self.browser.mouse("mouseMoved", x, y)
        tip = self.browser.find("#tip")
        return tip.text if tip.is_displayed() else ""

    def pixel(self, lane: str, second: float, row: int = 0) -> tuple[int, ...]:
        """The colour (RGBA) that is drawn there, above the text of a bar."""
        x, y = self.point(lane, second, row)
        return tuple(self.browser.run(_PIXEL, self.frame, x, y - 8))

    def count(self, canvas: str, colour: tuple[int, ...]) -> int:
        """How many pixels of one of its canvases have a colour (RGB)."""
        found: int = self.browser.run(_COUNT, self.frame, canvas, colour)
        return found

    def focus(self) -> None:
        """Give it the keyboard."""
        self.browser.run("arguments[0].focus()", self.frame)


def said(browser: Browser) -> str:
    """What a screen reader is told last."""
    text: str = browser.run("return document.getElementById('live').textContent")
    return text


def colour_of(browser: Browser, name: str) -> tuple[int, ...]:
    """A colour of the stylesheet, as it is in the scheme that is shown: RGB."""
    value: str = browser.run(
        "const each = document.body.appendChild(document.createElement('i'));"
        "each.style.color = `var(--${arguments[0]})`;"
        "const found = getComputedStyle(each).color; each.remove(); return found",
        name,
    )
    return tuple(int(part) for part in value.removeprefix("rgb(").removesuffix(")").split(","))


def rows(browser: Browser, table: str) -> list[list[str]]:
    """The cells of a table, by the id of its section."""
    found: list[list[Any]] = browser.run(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map((row) => [...row.children].map((cell) => cell.textContent))",
        table,
    )
    return found
