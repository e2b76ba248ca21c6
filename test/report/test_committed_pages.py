"""The pages in the docs are what `report` makes of the events that a GPU host left."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_warmstart.cli import app
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import summarise
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "test" / "gpu" / "results" / "start_up"
PAGES = sorted((ROOT / "docs" / "start-up").glob("*.html"))
RUNS = sorted(path.name for path in EVENTS.iterdir())


def test_there_is_a_page_for_each_start() -> None:
    assert set(RUNS) <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_made_of_the_events(page: Path, tmp_path: Path) -> None:
    first, *second = [page.stem] if page.stem in RUNS else page.stem.split("-")
    made = tmp_path / "page.html"
    arguments = [EVENTS / first, "-o", made, *(word for name in second for word in ("--compare", EVENTS / name))]
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert made.read_bytes() == page.read_bytes(), (
        f"make it anew: sglang-warmstart report {' '.join(map(str, arguments)).replace(str(made), str(page))}"
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_committed_start_has_no_gaps(name: str) -> None:
    run = read_run(EVENTS / name)
    breakdown = summarise(run).breakdown
    assert run.ready is not None
    assert breakdown.parts["other"] < 0.01 * breakdown.seconds
