"""``sglang-warmstart plan``: export the plan of a cache, and show what a plan needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from sglang_warmstart.bundle import packing, toolchain
from sglang_warmstart.cli.ending import cache_to_read, command, read_plans, write_plan
from sglang_warmstart.cli.plan_make import make
from sglang_warmstart.cli.plan_model import names_model, of_model
from sglang_warmstart.cli.show import show_plan
from sglang_warmstart.deepgemm import plan as plans


class _Group(TyperGroup):
    """``plan TARGETS ...`` is ``plan make TARGETS ...``, and ``plan --model-path M ...`` is ``plan model ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["model" if names_model(args) else "make", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    help="Plans: the DeepGEMM kernels that a server needs, as a file that any machine can compile.",
    no_args_is_help=True,
    cls=_Group,
)
app.command("make")(make)
app.command("model", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(of_model)

_Plans = Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plans, of `record` or `plan export`.")]


@app.command("export")
@command
def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The file to write (JSON).")],
    cache: Annotated[
        Path | None, typer.Option(help="DeepGEMM's cache. Default: SGLANG_DG_CACHE_DIR, else ~/.cache/deep_gemm.")
    ] = None,
    identity: Annotated[
        str, typer.Option(help="Only markers in directories of warmstart/markers whose name begins with this.")
    ] = "",
) -> None:
    """Write the plan of the finished warm-ups in a cache: what servers here have needed.

    Exit status 0 when it has all their targets, 1 when some are left out, 2 when there is nothing to export.
    """
    exported = packing.export(cache_to_read(cache), identity)
    write_plan(output, exported.plan, exported.notes)


@app.command("show")
@command
def show(
    paths: _Plans, as_json: Annotated[bool, typer.Option("--json", help="The merged plan itself.")] = False
) -> None:
    """Show targets and kernels of plans, and what compiles them."""
    plan = read_plans(paths)
    if as_json:
        typer.echo(plans.encode(plan).decode(), nl=False)
    else:
        show_plan(plan, Console())


@app.command("requirements")
@command
def requirements(paths: _Plans) -> None:
    """Print what pip has to install, with --no-deps, on a machine that compiles these plans."""
    for line in toolchain.requirements_of(read_plans(paths)):
        typer.echo(line)
