"""One browser, and one set of pages, for all tests of the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.browser import Browser, browser
from kit.report_page import Page
from kit.sample_runs import write_exact, write_hostile, write_large, write_stock
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import read_run


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser."""
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as window:
        yield window


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with exact.html, compare.html, large.html and hostile.html."""
    place = tmp_path_factory.mktemp("pages")
    exact = read_run(write_exact(place / "exact", serving=True))
    stock = read_run(write_stock(place / "stock"))
    write_page([exact], place / "exact.html")
    write_page([stock, exact], place / "compare.html")
    write_page([read_run(write_large(place / "large"))], place / "large.html")
    write_page([read_run(write_hostile(place / "hostile"))], place / "hostile.html")
    return place


@pytest.fixture
def exact(chromium: Browser, pages: Path) -> Page:
    """The page of one start, just opened."""
    chromium.open(pages / "exact.html")
    return Page(chromium)
