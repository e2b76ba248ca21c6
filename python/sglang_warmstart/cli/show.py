"""Show plans and bundles: tables in a terminal, plain lines elsewhere, and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sglang_warmstart.base.errors import first_line, printable
from sglang_warmstart.bundle.manifest import Manifest
from sglang_warmstart.cli.compile_view import size
from sglang_warmstart.deepgemm.compiler import Compiler
from sglang_warmstart.deepgemm.dialects import short_name
from sglang_warmstart.deepgemm.plan import Plan, PlannedLaunch


def show_plan(plan: Plan, console: Console, cubins: Iterable[str] | None = None) -> None:
    """Print what a plan is for and what it needs.

    Args:
        cubins: names of the kernels that are compiled, where it is a bundle's.
    """
    what = f"{plan.deep_gemm or 'DeepGEMM of unknown version'} (build {plan.build[:12]}), {_compiler(plan)}"
    _line(console, f"{what}; recorded {plan.made}")
    for launch in plan.launches:
        _show_launch(plan, launch, console, None if cubins is None else set(cubins))
    if further := {name for launch in plan.launches for name in launch.further}:
        names = ", ".join(map(short_name, sorted(further)))
        _line(console, f"{len(further)} further kernels, of calls that are no target: {names}")
    for each in plan.left_out:
        _line(console, f"left out: {each.target}: {each.reason}", "yellow")
    targets = sum(len(launch.targets) for launch in plan.launches)
    _line(console, f"{len(plan.kernels)} kernels for {targets} targets of {len(plan.launches)} ranks", "bold")


def _show_launch(plan: Plan, launch: PlannedLaunch, console: Console, cubins: set[str] | None) -> None:
    major, minor = launch.capability
    told = launch.launch
    sizes = ", ".join(f"{name[:2]} {told[name]}" for name in ("tp_size", "pp_size", "ep_size") if name in told)
    # A plan of targets has no rank, and one of a model has those that are alike.
    who = next((f"{name} {told[name]}" for name in ("rank", "ranks") if name in told), "any rank")
    of = " of ".join(filter(None, (who, told.get("model", "") if "ranks" in told else "")))
    _line(
        console,
        f"{of}{f' ({sizes})' if sizes else ''} on {launch.gpu}: {launch.num_sms} SMs, sm_{major}{minor}",
        "bold",
    )
    right = [Column(title, justify="right") for title in ("N", "K", "groups", "SMs", "largest M", "kernels")]
    table = Table("target", *right, box=box.SIMPLE_HEAD)
    for each in launch.targets:
        target = each.target
        numbers = (target.n, target.k, target.num_groups, target.num_sms, target.m_max)
        table.add_row(Text(printable(target.kernel_type)), *map(str, numbers), Text(_count(each.kernels, cubins)))
    # A narrow terminal would cut the columns off.
    if (
        console.is_terminal
        and console.measure(table, options=console.options.update_width(1000)).maximum <= console.width
    ):
        console.print(table)
        return
    for each in launch.targets:
        _line(console, f"  {each.target}: {_count(each.kernels, cubins)} kernels")


def _count(kernels: Iterable[Any], cubins: set[str] | None) -> str:
    names = {use.directory for use in kernels}
    if cubins is None or names <= cubins:
        return str(len(names))
    return f"{len(names & cubins)} of {len(names)}"


def _compiler(plan: Plan) -> str:
    return f"{'NVRTC beside ' if plan.kind == 'nvrtc' else ''}nvcc {Compiler('', plan.compiler).release}"


def show_bundle(manifest: Manifest, packed_bytes: int, console: Console) -> None:
    """Print what is in a bundle."""
    unpacked = sum(manifest.files.values())
    _line(console, f"made by {manifest.made_by}; {size(packed_bytes)}, {size(unpacked)} unpacked")
    show_plan(manifest.plan, console, manifest.cubins)
    missing = len(manifest.plan.kernels) - len(manifest.cubins)
    if missing:
        _line(console, f"{missing} of them are not compiled", "yellow")
    for name, reason in manifest.failed.items():
        _line(console, f"failed: {short_name(name)}: {first_line(reason)}", "red")
    for cache in manifest.caches:
        total = size(sum(manifest.files[file.sha256] for file in cache.files))
        key = ", ".join(f"{name} {value}" for name, value in cache.key.items())
        _line(console, f"cache of {cache.library}: {len(cache.files)} files, {total} ({key})")


def bundle_as_json(manifest: Manifest, packed_bytes: int) -> dict[str, Any]:
    """The same for machines."""
    plan = manifest.plan
    return {
        "made_by": manifest.made_by,
        "bytes": packed_bytes,
        "unpacked_bytes": sum(manifest.files.values()),
        "deep_gemm": plan.deep_gemm,
        "build": plan.build,
        "nvcc": Compiler("", plan.compiler).release,
        "kind": plan.kind,
        "gpus": sorted({launch.gpu for launch in plan.launches}),
        "archs": sorted({"sm_{}{}".format(*launch.capability) for launch in plan.launches}),
        "kernels": len(plan.kernels),
        "compiled": len(manifest.cubins),
        "failed": manifest.failed,
        "launches": [
            {
                "gpu": launch.gpu,
                "num_sms": launch.num_sms,
                "launch": launch.launch,
                "targets": [{"target": str(each.target), "kernels": len(each.kernels)} for each in launch.targets],
                "further": len(launch.further),
            }
            for launch in plan.launches
        ],
        "left_out": [{"target": each.target, "reason": each.reason} for each in plan.left_out],
        "caches": [
            {
                "library": cache.library,
                "key": cache.key,
                "files": len(cache.files),
                "bytes": sum(manifest.files[file.sha256] for file in cache.files),
            }
            for cache in manifest.caches
        ],
        "files": manifest.files,
    }


def _line(console: Console, text: str, style: str = "") -> None:
    # A plan or a bundle may come from anybody.
    console.print(Text(printable(text), style), soft_wrap=True)
