"""The report in a terminal: the same numbers as elsewhere, with bars, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.sample_runs import HOSTILE, write_exact, write_hostile, write_stock
from rich.console import Console
from sglang_warmstart.report.breakdown import CATEGORIES
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import Summary, in_words, summarise
from sglang_warmstart.report.text import bar, plain, show

# On a busy machine examples take their time.
ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def printed(*summaries: Summary, terminal: bool, width: int = 110) -> str:
    stream = io.StringIO()
    show(summaries, Console(file=stream, force_terminal=terminal, width=width, no_color=True, highlight=False))
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_each_category_has_its_seconds(tmp_path: Path, terminal: bool) -> None:
    summary = summarise(read_run(write_exact(tmp_path / "exact", serving=True)))
    lines = printed(summary, terminal=terminal).splitlines()
    (compiled,) = [line for line in lines if "Compile kernels ahead" in line]
    assert in_words(summary.breakdown.parts["compile"]) in compiled
    assert "48.4 %" in compiled
    assert ("█" * 30 in compiled) == terminal
    assert any(
        line.startswith(("JIT while serving: triton _fwd_grouped", "\x1b[1mJIT while serving: triton"))
        for line in lines
    )
    assert any("instead: a forward of this shape" in line for line in lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_two_runs_and_their_difference(tmp_path: Path, terminal: bool) -> None:
    runs = [summarise(read_run(write(tmp_path / write.__name__))) for write in (write_stock, write_exact)]
    text = printed(*runs, terminal=terminal)
    assert "B is ready 94.7 s earlier than A" in text
    (called,) = [line for line in text.splitlines() if "Compile kernels on call" in line]
    for number in ("129.2 s", "1.30 s", "-127.9 s"):
        assert number in called


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("runs", [1, 3])
def test_no_number_is_lost_in_a_narrow_terminal(tmp_path: Path, width: int, runs: int) -> None:
    summary = summarise(read_run(write_exact(tmp_path / "exact")))
    text = printed(*[summary] * runs, terminal=True, width=width)
    for category in CATEGORIES:
        if summary.breakdown.parts[category.key]:
            (line,) = [line for line in text.splitlines() if category.title in line]
            assert line.count(in_words(summary.breakdown.parts[category.key])) >= runs
    for each in summary.compiles[:10]:
        assert in_words(each.event.seconds) in text
    # Tables keep to the width. Bold, dim and red are switched by sequences that take no room.
    shown = [re.sub("\x1b[^m]*m", "", line).rstrip() for line in text.splitlines()]
    tables = [line for line in shown if "█" in line or "──" in line]
    assert bool(tables) == (width > 40)
    assert max(map(len, tables), default=0) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_obeys_nothing_that_comes_from_outside(tmp_path: Path, terminal: bool) -> None:
    text = printed(summarise(read_run(write_hostile(tmp_path / "hostile"))), terminal=terminal)
    assert "\x1b[31m" not in text
    assert "\u2028" not in text
    assert plain(HOSTILE)[:20] in text


@ANY_PACE
@given(part=st.floats(0, 100), most=st.floats(0, 100))
def test_a_bar_is_as_long_as_its_part(part: float, most: float) -> None:
    part = min(part, most)
    drawn = bar(part, most, 10)
    assert len(drawn) <= 10
    assert bool(drawn) == (part > 0)
    if most > 0:
        eighths = sum("▏▎▍▌▋▊▉█".index(each) + 1 for each in drawn)
        assert eighths == pytest.approx(80 * part / most, abs=1.0)


@ANY_PACE
@given(st.text())
def test_plain_text_is_one_line_that_prints(text: str) -> None:
    assert plain(text).isprintable()
    assert plain(text) == text or not text.isprintable()
