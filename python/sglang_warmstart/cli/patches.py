"""``sglang-warmstart patches``: the features as patches on SGLang's source, applied by ``git apply``."""

from __future__ import annotations

import email
import email.policy
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.cli import git_apply
from sglang_warmstart.cli import sglang_tree as trees
from sglang_warmstart.cli.patch_errors import NO_TREE, PatchesError
from sglang_warmstart.cli.patch_layout import layout_of
from sglang_warmstart.cli.sglang_tree import Tree

SHIPPED = Path(__file__).parent / "patches_data"
_INDEX, _NOTICE = "series", "NOTICE"
_DIRECTORY = re.compile(r"sglang-(\d\S*)")
_Parameters = ParamSpec("_Parameters")

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
    typer.Option(
        "--version", help="Treat TREE as this version of SGLang: for a fork that has its own version numbers."
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, but change nothing.")]

app = typer.Typer(help="The features as patches on SGLang's source, for forks and for review.", no_args_is_help=True)


@dataclass(frozen=True)
class Examined:
    """What holds for a tree.

    Args:
        tree: that tree.
        version: of SGLang that the patches are for.
        patches: all of them, in their order.
        applied: how many of the first ones the tree has.
        refusal: why the others do not apply, in a line. None if they do.
    """

    tree: Tree
    version: str
    patches: list[Path]
    applied: int
    refusal: str | None


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
        typer.Option(
            metavar="DIR", help="Take the patches from here (DIR/sglang-VERSION/series), not the shipped ones."
        ),
    ] = None,
) -> None:
    """The features as patches on SGLang's source, for forks and for review."""
    context.obj = series or SHIPPED


@app.command("list")
@_command
def show_list(
    context: typer.Context,
    version: Annotated[str | None, typer.Option(help="Only the patches for this version of SGLang.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Show the patches of each version of SGLang."""
    found = directories(context.obj)
    chosen = {each: patches_in(_directory(found, each)) for each in (found if version is None else [version])}
    if as_json:
        listed = [
            {"version": each, "patches": [{"name": path.name, "subject": subject(path)} for path in patches]}
            for each, patches in chosen.items()
        ]
        typer.echo(json.dumps(listed, indent=2))
        return
    for each, patches in chosen.items():
        typer.echo(f"SGLang {each}: {len(patches)} patches")
        for number, path in enumerate(patches, 1):
            typer.echo(f"{number:3}  {subject(path)}")


@app.command()
@_command
def check(context: typer.Context, place: _Place = None, version: _AsVersion = None, as_json: _AsJson = False) -> None:
    """Say whether the patches apply to TREE, are applied already, or what is in their way.

    Exit status 0 when they apply or are applied, 1 when one does not, 2 when TREE is not an SGLang that there are
    patches for.
    """
    state = _examine(place, context.obj, version)
    if as_json:
        other = "applies" if state.refusal is None else "does not apply"
        patches = [
            {"name": path.name, "subject": subject(path), "state": "applied" if at < state.applied else other}
            for at, path in enumerate(state.patches)
        ]
        told = {"package": str(state.tree.package), "version": state.tree.version, "refusal": state.refusal}
        typer.echo(json.dumps({**told, "patches": patches}, indent=2))
        raise typer.Exit(0 if state.refusal is None else 1)
    _stop_if_refused(state)
    left = len(state.patches) - state.applied
    typer.echo(f"{state.tree.description}: {left} patches apply, {state.applied} are applied already.")


@app.command()
@_command
def apply(context: typer.Context, place: _Place = None, version: _AsVersion = None, dry_run: _DryRun = False) -> None:
    """Apply all patches that TREE does not have yet. If one does not apply, none is."""
    state = _examine(place, context.obj, version)
    _stop_if_refused(state)
    missing = state.patches[state.applied :]
    if not missing:
        typer.echo(f"{state.tree.description}: all patches are applied already, nothing to do.")
        return
    if not dry_run:
        git_apply.change(state.tree.package, missing)
    typer.echo(f"{state.tree.description}: {len(missing)} patches {'would be ' if dry_run else ''}applied.")


@app.command()
@_command
def revert(context: typer.Context, place: _Place = None, version: _AsVersion = None, dry_run: _DryRun = False) -> None:
    """Take back all patches that are applied to TREE. If the lines of one were changed since, none is."""
    state = _examine(place, context.obj, version)
    _stop_if_refused(state)
    applied = state.patches[: state.applied]
    if not applied:
        typer.echo(f"{state.tree.description}: no patch is applied, nothing to do.")
        return
    if not dry_run:
        git_apply.change(state.tree.package, applied, reverse=True)
    typer.echo(f"{state.tree.description}: {len(applied)} patches {'would be ' if dry_run else ''}reverted.")


@app.command()
@_command
def export(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory to write to. It is created if it does not exist.")
    ],
    version: Annotated[
        str | None, typer.Option(help="The version of SGLang. Default: the newest that has patches.")
    ] = None,
) -> None:
    """Write the patches to a directory, for `git am`."""
    found = directories(context.obj)
    chosen = next(iter(found)) if version is None else version
    directory = _directory(found, chosen)
    sources = [directory / _INDEX, *patches_in(directory)]
    notice = directory.parent / _NOTICE
    sources += [notice] if notice.is_file() else []
    try:
        files = {out / source.name: source.read_bytes() for source in sources}
        for path, data in files.items():
            if path.exists() and (not path.is_file() or path.read_bytes() != data):
                raise PatchesError(f"{path} is there with other content, nothing was written: name an empty directory")
        for path, data in files.items():
            if not path.exists():
                write_atomically(path, data)
    except OSError as error:
        raise PatchesError(f"{out} cannot be written ({error.strerror or error})") from error
    layout = layout_of(b"".join(files.values()))
    patches = f"{shlex.quote(str(out.resolve()))}/*.patch"  # the shell fills in the names
    typer.echo(f"{len(files)} files for SGLang {chosen} are in {out}.")
    typer.echo(f"In an unpacked wheel:    {shlex.join(['git', 'am', *layout.am_in_wheel])} {patches}")
    typer.echo(f"In SGLang's repository:  {shlex.join(['git', 'am', *layout.am_in_repository])} {patches}")


def directories(root: Path) -> Mapping[str, Path]:
    """Where the patches for each version lie, the newest version first.

    Raises:
        PatchesError: there are none.
    """
    entries = root.iterdir() if root.is_dir() else ()
    found = {
        named[1]: path for path in entries if (named := _DIRECTORY.fullmatch(path.name)) and (path / _INDEX).is_file()
    }
    if not found:
        raise PatchesError(f"{root} holds no patches: a directory `sglang-VERSION` with a file `{_INDEX}` is expected")
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])], reverse=True))


def patches_in(directory: Path) -> list[Path]:
    """The patches of one version, in their order.

    Raises:
        PatchesError: the list cannot be read, or a patch that it names is not there.
    """
    index = directory / _INDEX
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PatchesError(f"{index} cannot be read ({error})") from error
    patches = [directory / name for line in lines if (name := line.partition("#")[0].strip())]
    for patch in patches:
        if not patch.is_file():
            raise PatchesError(f"{index} names {patch.name}, which is not there")
    return patches


def subject(patch: Path) -> str:
    """The first line of a patch's message, without its number."""
    message = email.message_from_bytes(patch.read_bytes(), policy=email.policy.default)
    return re.sub(r"^\[PATCH[^]]*\]\s*", "", str(message["Subject"] or patch.name))


def _directory(found: Mapping[str, Path], version: str) -> Path:
    if version not in found:
        raise PatchesError(f"there are no patches for SGLang {version}; there are for {', '.join(found)}")
    return found[version]


def _examine(place: Path | None, root: Path, version: str | None) -> Examined:
    tree, found = trees.find(place), directories(root)
    if version is None and tree.version is not None:
        version = next((each for each in found if tree.is_version(each)), None)
        if version is None:
            raise PatchesError(
                f"{tree.description}: there are patches for {', '.join(found)} only. Nothing was changed. "
                "If it is a fork of one of these, name that with --version",
                NO_TREE,
            )
    if version is not None:
        return _examine_as(tree, version, patches_in(_directory(found, version)))
    # Of a tree whose version cannot be told, git says which patches fit.
    states = [_examine_as(tree, each, patches_in(directory)) for each, directory in found.items()]
    return next((state for state in states if state.refusal is None), states[0])


def _examine_as(tree: Tree, version: str, patches: list[Path]) -> Examined:
    for applied in range(len(patches), -1, -1):
        if git_apply.refusal(tree.package, patches[:applied], reverse=True) is None:
            return Examined(tree, version, patches, applied, git_apply.refusal(tree.package, patches[applied:]))
    raise AssertionError("no patches can always be taken back")


def _stop_if_refused(state: Examined) -> None:
    if state.refusal is not None:
        raise PatchesError(
            f"{state.tree.description}: the patches for {state.version} do not apply ({state.refusal}). "
            "Nothing was changed"
        )
