"""``sglang-warmstart patches``: the command line of the series."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from sglang_warmstart.series import report as reports
from sglang_warmstart.series import series as all_series
from sglang_warmstart.series import transaction, view
from sglang_warmstart.series import tree as trees
from sglang_warmstart.series.errors import NO_TREE, PatchesError
from sglang_warmstart.series.export import export
from sglang_warmstart.series.series import Series
from sglang_warmstart.series.tree import Tree
from sglang_warmstart.series.view import Change, Report, Status

_Parameters = ParamSpec("_Parameters")
# After a number, for one and for more.
_VERBS = {
    Status.APPLIES: ("applies", "apply"),
    Status.APPLIED: ("is applied already", "are applied already"),
    Status.FAILS: ("does not apply", "do not apply"),
}

_TREE = typer.Argument(
    metavar="TREE",
    help="A checkout or source tree of SGLang, an unpacked wheel, a site-packages directory, or the package directory "
    "`sglang`. Default: the SGLang that is installed here.",
    show_default=False,
)
_Place = Annotated[Path | None, _TREE]
_AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_AsVersion = Annotated[
    str | None,
    typer.Option("--version", help="Take TREE for this version of SGLang: for a fork that has versions of its own."),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

app = typer.Typer(
    help="SGLang's own source with the features as patches, for forks and for review.", no_args_is_help=True
)


def _command(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Ends a command whose error is known with one line and its exit status."""

    @wraps(command)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PatchesError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(error.status) from error

    return run


@app.callback()
def options(
    context: typer.Context,
    series: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take the patches from here (DIR/sglang-VERSION/series), not those shipped."),
    ] = None,
) -> None:
    """SGLang's own source with the features as patches, for forks and for review."""
    context.obj = series or all_series.SHIPPED


@app.command("list")
@_command
def show_list(
    context: typer.Context,
    version: Annotated[str | None, typer.Option(help="Only the patches for this version of SGLang.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Show the patches of each version of SGLang."""
    versions = all_series.directories(context.obj) if version is None else [version]
    found = [all_series.read_version(context.obj, each) for each in versions]
    if as_json:
        typer.echo(json.dumps([reports.series_as_json(series) for series in found], indent=2))
    else:
        for series in found:
            reports.show_series(series, Console())


@app.command()
@_command
def check(context: typer.Context, place: _Place = None, version: _AsVersion = None, as_json: _AsJson = False) -> None:
    """Show for each patch whether it applies to TREE, is applied already, or what is in its way.

    Exit status 0 when each one applies or is applied, 1 when one does not, 2 when TREE is not an SGLang that there are
    patches for.
    """
    report = _examine(place, context.obj, version)
    if as_json:
        typer.echo(json.dumps(reports.states_as_json(report), indent=2))
    else:
        console = Console()
        reports.show_states(report, console)
        counts = {status: len(report.having(status)) for status in Status}
        said = ", ".join(f"{number} {_VERBS[status][number > 1]}" for status, number in counts.items() if number)
        reports.print_line(console, f"{reports.count(len(report.states), 'patch')}: {said}.", _verdict(report.ok))
    raise typer.Exit(0 if report.ok else 1)


@app.command()
@_command
def apply(context: typer.Context, place: _Place = None, version: _AsVersion = None, dry_run: _DryRun = False) -> None:
    """Apply all patches that TREE does not have yet. If one does not apply, none is."""
    _write("apply", place, context.obj, version, dry_run)


@app.command()
@_command
def revert(context: typer.Context, place: _Place = None, version: _AsVersion = None, dry_run: _DryRun = False) -> None:
    """Take back all patches that are applied to TREE. If the lines of one were changed since, none is."""
    _write("revert", place, context.obj, version, dry_run)


@app.command("export")
@_command
def run_export(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to; made if it is not there.")],
    version: Annotated[
        str | None, typer.Option(help="Of SGLang. Default: the newest one that there are patches for.")
    ] = None,
) -> None:
    """Write the patches to a directory, for `git am`."""
    series = all_series.read_version(context.obj, version)
    names = export(series, out)
    console = Console()
    reports.print_line(console, f"{len(names)} files for SGLang {series.version} are in {out}.")
    patches = f"{shlex.quote(str(out.resolve()))}/*.patch"
    reports.print_line(console, f"In an unpacked wheel:    git am {patches}")
    reports.print_line(console, f"In SGLang's repository:  git am --directory=python {patches}")


def _write(action: str, place: Path | None, root: Path, version: str | None, dry_run: bool) -> None:
    report = _examine(place, root, version)
    changes = _changes(action, report)
    if report.ok and changes and not dry_run:
        with transaction.locked(report.tree, action):
            # Another command may have been at work since.
            _say_what_was_undone(report.tree, transaction.roll_back(report.tree))
            report = view.examine(report.tree, report.series)
            changes = _changes(action, report)
            if report.ok and changes:
                transaction.commit(report.tree, action, changes)
    _show_outcome(action, report, changes, dry_run)
    raise typer.Exit(0 if report.ok else 1)


def _changes(action: str, report: Report) -> Sequence[Change]:
    return report.applying if action == "apply" else report.reverting


def _show_outcome(action: str, report: Report, changes: Sequence[Change], dry_run: bool) -> None:
    console = Console()
    applying = action == "apply"
    acted_on = report.having(Status.APPLIES if applying else Status.APPLIED)
    patches = reports.count(len(acted_on), "patch")
    if not report.ok:
        reports.show_states(report, console)
        reports.print_line(console, "Nothing was changed.", _verdict(report.ok))
        return
    if not changes:
        total = reports.count(len(report.states), "patch")
        nothing = f"all of the {total} are applied already" if applying else f"none of the {total} is applied"
        reports.print_line(console, f"{report.tree.description}: {nothing}, nothing to do.", _verdict(report.ok))
        return
    done = "applied" if applying else "reverted"
    if dry_run:
        done = f"would be {done}"
    words = {**reports.AS_THEY_ARE, Status.APPLIES: done}
    if not applying:
        words = {**reports.AS_THEY_ARE, Status.APPLIES: "not applied", Status.APPLIED: done}
    reports.show_states(report, console, words)
    reports.print_line(console, f"{patches} {done} ({reports.summary(changes)}).", _verdict(report.ok))


def _examine(place: Path | None, root: Path, version: str | None) -> Report:
    tree = trees.find(place)
    candidates = [all_series.read_version(root, version)] if version else _candidates(tree, root)
    if transaction.is_unfinished(tree):
        _roll_back_if_needed(tree)
    examined = [view.examine(tree, series) for series in candidates]
    return next((report for report in examined if report.ok), examined[0])


def _candidates(tree: Tree, root: Path) -> list[Series]:
    """The series for a tree. Of a tree whose version cannot be told, all of them: its content has to tell."""
    found = all_series.directories(root)
    versions = [version for version in found if tree.version is None or tree.is_version(version)]
    if not versions:
        known = ", ".join(found)
        raise PatchesError(
            f"{tree.description}: there are patches for {known} only. Nothing was changed. "
            "If it is a fork of one of these, name that with --version",
            NO_TREE,
        )
    return [all_series.read(version, found[version]) for version in versions]


def _roll_back_if_needed(tree: Tree) -> None:
    # As long as nothing is half done, a tree that is in use or cannot be written can still be looked at.
    half_done = transaction.is_half_done(tree)
    try:
        with transaction.locked(tree, "check", wait=transaction.WAIT if half_done else 0):
            _say_what_was_undone(tree, transaction.roll_back(tree))
    except PatchesError as error:
        if half_done:
            raise PatchesError(f"{tree.package} is half changed by another command: {error}") from error
        if transaction.is_half_done(tree):  # now it is: somebody is at work
            _roll_back_if_needed(tree)


def _say_what_was_undone(tree: Tree, journal: transaction.Journal | None) -> None:
    if journal is not None:
        typer.echo(
            f"note: `patches {journal.action}` (process {journal.process}) was cut off at work on {tree.package}; "
            "what it had changed was put back",
            err=True,
        )


def _verdict(ok: bool) -> str:
    return "bold green" if ok else "bold red"
