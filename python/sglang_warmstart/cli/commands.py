"""The commands of ``sglang-warmstart``."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from sglang_warmstart import __version__
from sglang_warmstart.base.errors import one_line
from sglang_warmstart.base.switches import DEBUG
from sglang_warmstart.cli import bundle as bundles
from sglang_warmstart.cli import doctor, patches
from sglang_warmstart.cli import plan as plans
from sglang_warmstart.cli.compile import compile_plan
from sglang_warmstart.cli.ending import EXIT_FAILED
from sglang_warmstart.cli.record import record
from sglang_warmstart.cli.report import report
from sglang_warmstart.cli.run import become

app = typer.Typer(
    help="Less waiting for JIT kernel compilation when SGLang starts and while it serves.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("record", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(record)
app.command("compile")(compile_plan)
app.command("report")(report)
app.add_typer(plans.app, name="plan")
app.add_typer(bundles.app, name="bundle")
app.add_typer(patches.app, name="patches")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sglang-warmstart {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Less waiting for JIT kernel compilation when SGLang starts and while it serves."""


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(context: typer.Context) -> None:
    """Start the node's service, then become a server: sglang-warmstart run -- python -m sglang.launch_server ...

    The service that compiles kernels is ready before the server has imported anything. It ends with the server. Exit
    status 2 without a command, 127 if the command cannot be run, and else that of the command.
    """
    raise typer.Exit(become(context.args))


@app.command("doctor")
def run_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what is installed here, the state of each feature, and the switches.

    Exit status 0 when the plugin can do its work here, 1 when it cannot.
    """
    findings = doctor.examine()
    if as_json:
        typer.echo(json.dumps(findings.as_json(), indent=2))
    else:
        doctor.show(findings, Console())
    raise typer.Exit(EXIT_FAILED if findings.problems else 0)


def main() -> None:
    """Entry point of the console script. An error that no command expects is one line too, and exit status 1."""
    try:
        app()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        typer.echo(f"sglang-warmstart: {one_line(error)} ({DEBUG}=1 shows where)", err=True)
        raise SystemExit(EXIT_FAILED) from None
