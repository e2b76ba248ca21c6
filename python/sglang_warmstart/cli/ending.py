"""What commands about plans and bundles share: exit statuses, Ctrl-C, and input files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import typer

from sglang_warmstart.base import trust
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.toolchain import ToolchainError
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.plan import Plan, PlanError
from sglang_warmstart.libraries.build_plan import BuildPlanError
from sglang_warmstart.sglang.caches import deep_gemm_cache

# Something was done, and something was not.
EXIT_FAILED = 1
# What was asked cannot be done as it was asked. Typer's own status for a wrong option.
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

_PLAN_LIMIT = 256 << 20

_Parameters = ParamSpec("_Parameters")


def command(function: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Ends a command whose error is known with one line and its exit status."""

    @wraps(function)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (BuildPlanError, BundleError, PlanError, ToolchainError, trust.UntrustedError) as error:
            # A compiler's words may be in it, and those have many lines.
            typer.echo(first_line(error), err=True)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run


def read_plans(paths: list[Path]) -> Plan:
    """One plan of those in files.

    Raises:
        PlanError: one of them is none, or they do not go together.
    """
    return plans.merged({str(path): _read_plan(path) for path in paths})


def _read_plan(path: Path) -> Plan:
    try:
        with path.open("rb") as file:
            data = file.read(_PLAN_LIMIT + 1)
        if len(data) > _PLAN_LIMIT:
            raise PlanError(f"not a plan: more than {_PLAN_LIMIT} bytes")
        return plans.decode(data)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise PlanError(f"{path}: not a plan: {error}") from error


def cache_to_read(named: Path | None) -> Path:
    """The root of DeepGEMM's cache that a command takes kernels from.

    Args:
        named: by the user; None for that of a server with this environment.

    Raises:
        UntrustedError: others can write it. What is packed, and maybe signed, would be theirs.
    """
    root = named or deep_gemm_cache(os.environ)
    trust.check_caches((root, root / "nvrtc"), os.environ)
    return root


def write_plan(output: Path, plan: Plan, notes: tuple[str, ...] = ()) -> None:
    """Write a plan, say what it has, and end with the exit status that fits.

    Raises:
        PlanError: it cannot be written.
    """
    try:
        write_atomically(output, plans.encode(plan))
    except OSError as error:
        raise PlanError(f"{output} cannot be written ({error.strerror or error}): name another place") from error
    for note in notes:
        typer.echo(note, err=True)
    for each in plan.left_out:
        typer.echo(f"not in the plan: {each.target}: {each.reason}", err=True)
    targets = sum(len(launch.targets) for launch in plan.launches)
    # Ranks that are alike share a launch, which then names them.
    ranks = sum(len(launch.launch.get("ranks", "0").split()) for launch in plan.launches)
    typer.echo(f"{output}: {len(plan.kernels)} kernels, {targets} targets of {ranks} ranks")
    if plan.left_out:
        raise typer.Exit(EXIT_FAILED)
