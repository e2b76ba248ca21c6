"""``sglang-warmstart report``: where the seconds of a start-up went."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from sglang_warmstart.base.runs import runs_of
from sglang_warmstart.cli.ending import EXIT_REFUSED
from sglang_warmstart.report.page import write_page
from sglang_warmstart.report.reading import NoEventsError, Run, find_run, read_run
from sglang_warmstart.report.summary import as_json, compared, summarise
from sglang_warmstart.report.text import plain, show
from sglang_warmstart.report.trace import write_trace
from sglang_warmstart.sglang.caches import deep_gemm_cache

PAGE = Path("startup.html")


def report(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="A run's directory, or one with runs in it, of which the newest is taken. Default: the runs in "
            "DeepGEMM's cache (SGLANG_DG_CACHE_DIR, else ~/.cache/deep_gemm).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PAGE",
            help=f"The page to write (HTML). Default: {PAGE}, unless you ask only for --text, --json or --trace.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Another run, shown on one time axis with the first one. You can repeat this option.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Write a trace for Perfetto (ui.perfetto.dev), JSON.", show_default=False),
    ] = None,
    as_text: Annotated[bool, typer.Option("--text", help="Print the report.")] = False,
    as_data: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show what a start-up went to: a page with a timeline, a text, numbers or a trace.

    Exit status 0 when it is written, 2 when there are no events, or a file cannot be written.
    """
    try:
        runs = [_read(place) for place in (directory or runs_of(deep_gemm_cache(os.environ)), *(compare or ()))]
    except NoEventsError as error:
        _refuse(str(error))
    for run in runs:
        for line in run.unreadable:
            typer.echo(plain(f"{run.name}: {line}: the report goes without that"), err=True)
    if output is None and not (as_text or as_data or trace):
        output = PAGE
    if output is not None:
        _write(output, lambda path: write_page(runs, path), "page")
    if trace is not None:
        _write(trace, lambda path: write_trace(runs, path), "trace")
    summaries = [summarise(run) for run in runs]
    if as_data:
        numbers = [as_json(summary) for summary in summaries]
        told = {"runs": numbers, "compared": compared(*summaries)} if compare else numbers[0]
        typer.echo(json.dumps(told, indent=2))
    if as_text:
        show(summaries, Console())


def _read(directory: Path) -> Run:
    try:
        return read_run(find_run(directory))
    except OSError as error:
        _refuse(f"{directory} cannot be read ({error.strerror or error}): name a directory with the events of a run")


def _write(path: Path, write: Callable[[Path], None], what: str) -> None:
    if path.is_dir():
        _refuse(f"{path} is a directory: name a file for the {what}")
    try:
        write(path)
    except OSError as error:
        _refuse(f"{path} cannot be written ({error.strerror or error}): name another place for the {what}")
    typer.echo(f"{what}: {path}", err=True)


def _refuse(message: str) -> NoReturn:
    typer.echo(plain(message), err=True)
    raise typer.Exit(EXIT_REFUSED)
