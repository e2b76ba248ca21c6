"""The report as text: tables and bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sglang_warmstart.report.breakdown import CATEGORIES
from sglang_warmstart.report.summary import Compile, Summary, compared, in_words, letter, verdict

_LONGEST = 10  # compiles and targets that are shown
_BAR = 30  # columns of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STYLES = {"compile": "yellow", "find": "yellow", "load": "cyan", "jit": "bold red", "other": "dim"}


def show(summaries: Sequence[Summary], console: Console) -> None:
    """Print one run, or several that are compared with the first."""
    for number, summary in enumerate(summaries):
        name = f"{letter(number)}: " if len(summaries) > 1 else ""
        _line(console, plain(f"{name}{summary.run.name}, {', '.join(summary.hosts)}, {summary.when}"), "dim")
        _line(console, verdict(summary), "bold")
        for each in summary.serving:
            _line(console, f"JIT while serving: {_told(each, summary)}", "bold red")
            if each.event.remedy:
                _line(console, plain(f"  instead: {each.event.remedy}"))
    if len(summaries) > 1:
        _line(console, compared(*summaries), "bold")
    _show_parts(summaries, console)
    for summary in summaries:
        _show_compiles(summary, console)
        _show_targets(summary, console)


def plain(text: str) -> str:
    """Text from outside in one line, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def bar(part: float, most: float, width: int = _BAR) -> str:
    """A bar whose length is a part of the longest one's, to an eighth of a column."""
    eighths = round(part / most * width * 8) if most > 0 else 0
    # What took any time is seen.
    eighths = max(eighths, 1) if part > 0 else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _has_room(console: Console, columns: int) -> bool:
    """Whether it is a terminal that is wide enough for a table; others get plain lines."""
    return console.is_terminal and console.width >= columns


def _show_parts(summaries: Sequence[Summary], console: Console) -> None:
    breakdowns = [summary.breakdown for summary in summaries]
    shown = [category for category in CATEGORIES if any(each.parts[category.key] > 0 for each in breakdowns)]
    others = [letter(number) for number in range(1, len(summaries))]
    heads = ["A", *(head for name in others for head in (name, f"{name} - A"))] if others else ["seconds", "share"]
    # A title, a number below each head, and at least some of a bar.
    room = console.width - 36 - 11 * len(heads)
    if not _has_room(console, console.width - room + 8):
        for category in shown:
            parts = _columns([each.parts[category.key] for each in breakdowns], breakdowns[0].seconds)
            _line(console, f"  {category.title}: {', '.join(parts)}")
        return
    most = max((each.parts[category.key] for each in breakdowns for category in shown), default=0.0)
    table = Table(
        Column("where the seconds went", no_wrap=True, overflow="ellipsis"),
        *(Column(head, justify="right", no_wrap=True) for head in heads),
        Column("", no_wrap=True, overflow="crop"),
        box=box.SIMPLE_HEAD,
    )
    for category in shown:
        style = _STYLES.get(category.key, "")
        seconds = [each.parts[category.key] for each in breakdowns]
        bars = "\n".join(bar(each, most, min(room, _BAR)) for each in seconds)
        columns = _columns(seconds, breakdowns[0].seconds)
        table.add_row(Text(category.title, style), *columns, Text(bars, style or "blue"))
    table.add_section()
    table.add_row("all", *_columns([each.seconds for each in breakdowns], breakdowns[0].seconds), style="bold")
    console.print(table)


def _columns(seconds: Sequence[float], whole: float) -> list[str]:
    """Seconds of the first run, then of each other one with its difference; of a single run with its share."""
    first, *others = seconds
    if not others:
        return [in_words(first), f"{100 * first / whole:.1f} %" if whole else ""]
    return [in_words(first), *(text for each in others for text in (in_words(each), _signed(each - first)))]


def _signed(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '-' if seconds < 0 else ''}{in_words(abs(seconds))}"


def _show_compiles(summary: Summary, console: Console) -> None:
    longest = summary.compiles[:_LONGEST]
    if not longest:
        return
    if not _has_room(console, 100):
        _line(console, f"longest compiles of {len(summary.compiles)} in {plain(summary.run.name)}:")
        for each in longest:
            _line(console, f"  {_told(each, summary)}")
        return
    table = Table(
        Column(_title(f"longest compiles of {plain(summary.run.name)}"), overflow="fold", ratio=3),
        Column("seconds", justify="right", no_wrap=True),
        Column("began at", justify="right", no_wrap=True),
        Column("how", no_wrap=True),
        Column("where", no_wrap=True),
        Column("target or shape", overflow="ellipsis", no_wrap=True, ratio=3),
        box=box.SIMPLE_HEAD,
        expand=True,
    )
    for each in longest:
        event = each.event
        began = in_words(event.at - summary.run.start)
        what = event.error or event.target or event.shape
        cells = (plain(event.name), in_words(event.seconds), began, _how(each), plain(each.track), plain(what))
        table.add_row(*map(Text, cells))
    console.print(table)


def _show_targets(summary: Summary, console: Console) -> None:
    targets = summary.targets[:_LONGEST]
    if not targets:
        return
    if not _has_room(console, 72):
        _line(console, f"targets of {plain(summary.run.name)}:")
        for each in targets:
            _line(console, f"  {plain(each.name)}: {each.kernels} kernels in {in_words(each.seconds)}")
        return
    right = [
        Column(title, justify="right", no_wrap=True) for title in ("compiled", "in the cache", "failed", "seconds")
    ]
    table = Table(Column(_title(f"targets of {plain(summary.run.name)}"), overflow="fold"), *right, box=box.SIMPLE_HEAD)
    for each in targets:
        numbers = (each.kernels, each.cached, each.failed)
        table.add_row(
            Text(plain(each.name)), *(str(number) if number else "" for number in numbers), in_words(each.seconds)
        )
    console.print(table)


def _told(each: Compile, summary: Summary) -> str:
    event = each.event
    parts: Iterator[str] = filter(
        None,
        (
            f"{event.library} {event.name}".strip(),
            f"for {event.target or event.shape}" if event.target or event.shape else "",
        ),
    )
    began = in_words(event.at - summary.run.start)
    return plain(f"{' '.join(parts)}: {in_words(event.seconds)}, {_how(each)}, {each.track}, at {began}") + (
        f": {plain(event.error)}" if event.error else ""
    )


def _how(each: Compile) -> str:
    if each.event.error:
        return "failed"
    if each.event.kind == "compile":
        return "ahead"
    return "on call, serving" if each.event.phase == "serving" else "on call"


def _title(text: str) -> Text:
    # A name in brackets would be markup in a bare title.
    return Text(text)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
