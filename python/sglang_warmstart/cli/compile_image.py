"""``sglang-warmstart compile PLAN -o DIR`` for plans of builds: the caches of all libraries, for an image."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_warmstart.base.private_directory import make_directory, remove_directory
from sglang_warmstart.base.switches import IMAGE
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.cli.ending import EXIT_FAILED
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.deep_gemm import DeepGemm
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE, caches_below

if TYPE_CHECKING:
    from sglang_warmstart.node.service import Service

# Enough to tell by; a plan of DeepGEMM's kernels begins in another way.
_BEGINNING = b'{"parts":'


def are_of_builds(paths: Sequence[Path]) -> bool:
    """Whether all files are plans of builds, and there is one."""
    return all(_begins(path) for path in paths)


def _begins(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False  # whoever reads it says so


def compile_image(paths: Sequence[Path], output: Path, as_json: bool) -> int:
    """Build what plans have into caches below a directory. Returns the exit status.

    Raises:
        BundleError: the directory cannot be made.
        BuildPlanError: a file is no plan.
    """
    directory = output.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plans = [build_plan.load(path) for path in paths]
    except OSError as error:
        raise BundleError(f"{error.filename}: {error.strerror}") from error
    # Here and not above: `compile` of DeepGEMM's plans needs no service.
    from sglang_warmstart.node.planned import missing_of

    caches = caches_below(directory)
    # Builders are processes of their own, which have the variables of this one.
    os.environ |= {**caches, IMAGE: "1"}
    wanted: dict[str, Recipe] = {}
    refused: list[str] = []
    for plan in plans:
        recipes, reasons = missing_of(plan, os.environ)
        wanted |= {recipe.key: recipe for recipe in recipes}
        refused += reasons
    start = time.monotonic()
    console = Console(stderr=as_json)
    failed = _built(list(wanted.values()), Path(caches[DEEP_GEMM_CACHE]), console)
    planned = Counter(recipe.library for plan in plans for part in plan.parts.values() for recipe in part.recipes)
    lacking = Counter(recipe.library for recipe, _ in failed)
    lacking |= {name: planned[name] for name in (reason.partition(":")[0] for reason in refused)}
    summary = {
        "directory": str(directory),
        "environment": caches,
        "planned": planned,
        "there": planned - lacking,
        "failed": {f"{recipe.library} {recipe.name}": reason for recipe, reason in failed},
        "refused": refused,
        "not_carried": [name for name, library in LIBRARIES.items() if not library.has_recipes],
        "seconds": round(time.monotonic() - start, 1),
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _show(console, summary)
    return EXIT_FAILED if failed or refused else 0


def _built(recipes: Sequence[Recipe], root: Path, console: Console) -> list[tuple[Recipe, str]]:
    """Build, with a bar. Returns what could not be built, and why."""
    failed: list[tuple[Recipe, str]] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("building", total=len(recipes))

        def built(recipe: Recipe, reason: str) -> None:
            bar.advance(task)
            if reason:
                failed.append((recipe, reason))
                bar.console.print(f"failed: {recipe.library} {reason}", markup=False, soft_wrap=True)

        asyncio.run(_build(recipes, root, built))
    return failed


async def _build(recipes: Sequence[Recipe], root: Path, built: Callable[[Recipe, str], None]) -> None:
    from sglang_warmstart.node.service import Service

    directory, alive = make_directory()
    with alive:
        service = Service(directory)
        try:
            await service.build(recipes, root, built)
            for recipe in recipes:
                if recipe.library == DeepGemm.name:
                    built(recipe, _outcome(service, recipe))
        finally:
            service.stop()
            await service.end(directory)
            remove_directory(directory)


def _outcome(service: Service, recipe: Recipe) -> str:
    from sglang_warmstart.node.planned_targets import wanted_by

    if (wanted := wanted_by(recipe)) is None:
        return f"{recipe.name}: it is neither a target of DeepGEMM nor a kernel"
    return service.outcomes.get(wanted, "it could not be warmed: DeepGEMM may not be installed here")


def _show(console: Console, summary: Mapping[str, Any]) -> None:
    table = Table("library", "planned", "there", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, count in summary["planned"].items():
        table.add_row(name, str(count), str(summary["there"][name]))
    console.print(table)
    for reason in summary["refused"]:
        console.print(f"refused: {reason}", markup=False, soft_wrap=True)
    console.print(f"not carried: kernels of {', '.join(summary['not_carried'])}", markup=False)
    console.print(f"Keep {summary['directory']} at this path in the image, and start the server with", markup=False)
    for name, value in summary["environment"].items():
        console.print(f"  export {name}={shlex.quote(value)}", markup=False, soft_wrap=True, highlight=False)
