"""The page of a report in a browser, as a user has it: lanes, bars, tables, what is shown and what is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run

from kit.browser import Browser

_ROWS = """
const [run, lane] = arguments, part = document.querySelectorAll(".run")[run];
const rows = [...part.querySelectorAll(".row")].filter((row) => row.dataset.lane === lane);
"""
_POINT = f"""{_ROWS}
const [, , row, second] = arguments, end = Number(document.querySelector(".frame").dataset.end);
rows[row].scrollIntoView({{ block: "center" }});
const box = rows[row].getBoundingClientRect();
return [box.left + (second / end) * box.width, box.top + box.height / 2];
"""
_STYLE = """
const [x, y, wanted] = arguments, found = document.elementFromPoint(x, y).closest(".bar");
return found && getComputedStyle(found)[wanted];
"""


@dataclass(frozen=True)
class Page:
    """A page that a browser shows."""

    browser: Browser

    def point(self, lane: str, second: float, row: int = 0, run: int = 0) -> tuple[float, float]:
        """Where in the window a moment of a lane is. Scrolls there."""
        x, y = self.browser.run(_POINT, run, lane, row, second)
        return x, y

    def hover(self, lane: str, second: float, row: int = 0, run: int = 0) -> str:
        """What the tooltip says there; nothing if there is none."""
        x, y = self.point(lane, second, row, run)
        self.browser.mouse("mouseMoved", x, y)
        return self.tip()

    def tip(self) -> str:
        """What the tooltip says now; nothing if there is none."""
        tip = self.browser.find("#tip")
        return str(tip.text) if tip.is_displayed() else ""

    def style(self, lane: str, second: float, wanted: str, row: int = 0) -> str | None:
        """A computed style of the bar there; nothing if there is none."""
        x, y = self.point(lane, second, row)
        found: str | None = self.browser.run(_STYLE, x, y, wanted)
        return found

    def text(self, selector: str) -> str:
        """What the first such element shows."""
        return str(self.browser.find(selector).text)

    def count(self, selector: str) -> int:
        """How many such elements there are."""
        found: int = self.browser.run("return document.querySelectorAll(arguments[0]).length", selector)
        return found

    def said(self) -> str:
        """What a screen reader is told last."""
        found: str = self.browser.run("return document.getElementById('live').textContent")
        return found

    def press(self, *keys: str) -> None:
        """Press keys with the focus on the picture."""
        self.browser.run("document.querySelector('.frame').focus()")
        self.browser.keys(*keys)

    def rows(self, table: str) -> list[list[str]]:
        """The cells of a table, by the id of its section."""
        found: list[list[Any]] = self.browser.run(
            "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))",
            table,
        )
        return found

    def colour(self, name: str) -> str:
        """A colour of the stylesheet in the scheme that is shown, as computed styles have it."""
        found: str = self.browser.run(
            "const each = document.body.appendChild(document.createElement('i'));"
            "each.style.color = `var(--${arguments[0]})`;"
            "const found = getComputedStyle(each).color; each.remove(); return found",
            name,
        )
        return found


def opened(browser: Browser, *runs: Path, **view: Any) -> Page:
    """The page of runs, shown.

    Args:
        runs: their directories.
        view: of :meth:`Browser.open`.
    """
    path = runs[0].with_suffix(".html")
    write_page([read_run(run) for run in runs], path)
    browser.open(path, **view)
    return Page(browser)
