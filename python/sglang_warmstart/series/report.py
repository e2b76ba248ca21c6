"""Show patches, and how they stand to a tree: tables in a terminal, plain lines elsewhere, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sglang_warmstart.series.patchfile import Kind, Patch
from sglang_warmstart.series.series import Series
from sglang_warmstart.series.view import Change, Failure, Report, Status

_COLOURS = {Status.APPLIES: "cyan", Status.APPLIED: "green", Status.FAILS: "red"}
AS_THEY_ARE = {status: status.value for status in Status}


def show_states(report: Report, console: Console, words: Mapping[Status, str] = AS_THEY_ARE) -> None:
    """Print each patch with its state, and what is in the way of those that do not apply.

    Args:
        report: what to print.
        console: where to.
        words: what each state is called.
    """
    print_line(console, f"{report.tree.description}:")
    if report.tree.version is None:
        print_line(console, f"its content is compared with the patches for {report.series.version}")
    if console.is_terminal:
        table = Table(Column("", justify="right"), Column("State", no_wrap=True), Column("Patch", overflow="fold"))
        for state in report.states:
            word = Text(words[state.status], _COLOURS[state.status])
            table.add_row(str(state.patch.number), word, Text(state.patch.subject))
        console.print(table)
    width = max((len(words[state.status]) for state in report.states), default=0)
    for state in report.states:
        if not console.is_terminal:
            print_line(console, f"{state.patch.number:>3}  {words[state.status]:<{width}}  {state.patch.subject}")
        elif state.failures:
            print_line(console, f"{state.patch.number}: {state.patch.subject}", "red")
        for failure in state.failures:
            print_line(console, f"     {describe(failure)}")


def describe(failure: Failure) -> str:
    """A failure in one line."""
    where = failure.path if failure.hunk is None else f"{failure.path}: hunk {failure.hunk}, line {failure.line}"
    expected = "" if failure.expected is None else f"expected `{failure.expected}`, "
    return f"{where}: {expected}{failure.reason}"


def states_as_json(report: Report) -> dict[str, Any]:
    """The report for machines; ``ok`` says what the exit status says."""
    return {
        "ok": report.ok,
        "tree": str(report.tree.package),
        "version": report.tree.version,
        "told_by": report.tree.told_by,
        "series": report.series.version,
        "patches": [
            {
                "number": state.patch.number,
                "file": state.patch.source.name,
                "subject": state.patch.subject,
                "status": state.status.value,
                "failures": [
                    {
                        "file": failure.path,
                        "hunk": failure.hunk,
                        "line": failure.line,
                        "expected": failure.expected,
                        "reason": failure.reason,
                    }
                    for failure in state.failures
                ],
            }
            for state in report.states
        ],
    }


def show_series(series: Series, console: Console) -> None:
    """Print the patches of a version."""
    title = f"SGLang {series.version}: {count(len(series.patches), 'patch')}"
    if console.is_terminal:
        table = Table(
            Column("", justify="right"),
            Column("Patch", overflow="fold"),
            Column("Files", no_wrap=True),
            Column("Lines", no_wrap=True),
            Column("Upstream", overflow="fold"),
            title=title,
            title_justify="left",
        )
        for patch in series.patches:
            upstream = (patch.upstream or "").replace("https://github.com/", "")
            files = "\n".join(_files(patch))
            lines = f"+{patch.added} -{patch.removed}"
            table.add_row(str(patch.number), Text(patch.subject), files, lines, Text(upstream))
        console.print(table)
        return
    print_line(console, title)
    for patch in series.patches:
        print_line(console, f"{patch.number:>3}  {patch.subject}")
        upstream = f"; upstream: {patch.upstream}" if patch.upstream else ""
        print_line(console, f"     files: {', '.join(_files(patch))}; lines: +{patch.added} -{patch.removed}{upstream}")


def series_as_json(series: Series) -> dict[str, Any]:
    """The patches of a version for machines."""
    return {
        "version": series.version,
        "patches": [
            {
                "number": patch.number,
                "file": patch.source.name,
                "subject": patch.subject,
                "files": [{"file": change.path, "kind": change.kind.value} for change in patch.files],
                "lines_added": patch.added,
                "lines_removed": patch.removed,
                "upstream": patch.upstream,
            }
            for patch in series.patches
        ],
    }


def summary(changes: Sequence[Change]) -> str:
    """How many files change, are added and are removed."""
    added = sum(1 for change in changes if change.before is None)
    removed = sum(1 for change in changes if change.after is None)
    counts = {"changed": len(changes) - added - removed, "added": added, "removed": removed}
    return f"files: {', '.join(f'{number} {word}' for word, number in counts.items() if number)}"


def count(number: int, noun: str) -> str:
    """A number of things; ``patch`` is the noun with an odd plural here."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}es"


def _files(patch: Patch) -> list[str]:
    kinds = [change.kind for change in patch.files]
    return [f"{kinds.count(kind)} {kind.value}" for kind in Kind if kind in kinds]


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: no markup in it, and never folded, so that it can be searched and copied."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
