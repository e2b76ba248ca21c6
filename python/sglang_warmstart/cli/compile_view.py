"""Show the progress of a compile run: a live table in a terminal, one line per kernel elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.bundle.build import Cubin
from sglang_warmstart.bundle.cluster import Workers
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.dialects import short_name
from sglang_warmstart.deepgemm.plan import Plan

_LAST = 10  # rows of kernels that have just ended
_FAILURES = 20  # in words at the end; all of them are in the bundle


class View:
    """The progress of a compile run.

    Args:
        console: where to.
        plan: that is compiled.
        names: of the kernels that are wanted.
        resumed: kernels that were there before.
    """

    def __init__(self, console: Console, plan: Plan, names: list[str], resumed: int) -> None:
        self._console, self._plan, self._wanted, self._resumed = console, plan, len(names), resumed
        self._last: deque[tuple[Text | str, ...]] = deque(maxlen=_LAST)
        self._done = self._failed = 0
        self._seconds = 0.0
        self._bar = Progress(
            TextColumn("kernels"),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._task = self._bar.add_task("", total=self._wanted)
        self._live: Live | None = None

    @contextmanager
    def over(self, workers: Workers) -> Iterator[None]:
        """Show it while this lasts."""
        release = Compiler("", self._plan.compiler).release
        kept = f", {self._resumed} are there already" if self._resumed else ""
        self._console.print(
            f"{self._wanted} kernels to compile{kept}: nvcc {release}, {workers.count} at once, {workers.where}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if not self._console.is_terminal or not self._wanted:
            yield
            return
        with Live(console=self._console, get_renderable=self._table, refresh_per_second=8) as self._live:
            try:
                yield
            finally:
                self._live = None

    def compiled(self, name: str, kernel: Cubin) -> None:
        """A kernel is there."""
        self._done += 1
        self._seconds += kernel.seconds
        seconds, kib = f"{kernel.seconds:.1f}", f"{len(kernel.data) / 1024:.0f}"
        self._add(name, f"{seconds} s, {kib} KiB", Text("compiled", "green"), seconds, kib)

    def failed(self, name: str, reason: str) -> None:
        """A kernel could not be compiled."""
        self._failed += 1
        self._add(name, f"failed: {first_line(reason)}", Text("failed", "red"), "", "")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """What came of it all."""
        for number, (name, reason) in enumerate(summary["failed"].items() if self._console.is_terminal else ()):
            if number == _FAILURES:
                self._line(f"and {len(summary['failed']) - _FAILURES} more failed: see `bundle inspect --json`")
                break
            self._line(f"failed: {short_name(name)}: {first_line(reason)}", "red")
        there = summary["compiled"] + summary["resumed"]
        if summary["interrupted"]:
            where = f" are in {summary['bundle']}; the same command goes on from there" if there else ""
            self._line(f"interrupted: {there} of {summary['kernels']} kernels{where}", "yellow")
            return
        if summary["bundle"] is None:
            self._line("no kernel was compiled: no bundle is written", "red")
            return
        self._line(
            f"{there} of {summary['kernels']} kernels in {summary['bundle']} ({size(summary['bytes'])}): "
            f"{summary['seconds']:.1f} s, the compilers' own seconds add up to {summary['compile_seconds']:.1f}",
            "red" if summary["failed"] else "green",
        )

    def _add(self, name: str, told: str, *cells: Text | str) -> None:
        self._bar.advance(self._task)
        if self._live is not None:
            self._last.append((Text(short_name(name)), *cells))
            return
        self._line(f"{self._done + self._failed:>{len(str(self._wanted))}}/{self._wanted}  {short_name(name)}  {told}")

    def _table(self) -> Group:
        table = Table(
            Column("kernel", overflow="fold"),
            Column("", no_wrap=True),
            Column("seconds", justify="right", no_wrap=True),
            Column("KiB", justify="right", no_wrap=True),
            box=box.SIMPLE_HEAD,
        )
        for row in list(self._last):
            table.add_row(*row)
        counts = Text(f"{self._done} compiled in {self._seconds:.0f} s of compilers", "green")
        counts.append(f", {self._failed} failed", "red" if self._failed else "dim")
        return Group(table, self._bar, counts)

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(text, style or ""), soft_wrap=True)


def size(count: float) -> str:
    """Bytes for a reader."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
