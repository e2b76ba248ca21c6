"""``sglang-warmstart bundle``: inspect, verify, pack and unpack bundles."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sglang_warmstart.bundle import archive, packing, source
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.places import place_of
from sglang_warmstart.bundle.restore import defects_of, restore
from sglang_warmstart.bundle.signature import PrivateKey, PublicKey
from sglang_warmstart.cli.compile_view import size
from sglang_warmstart.cli.ending import EXIT_FAILED, cache_to_read, command
from sglang_warmstart.cli.show import bundle_as_json, show_bundle
from sglang_warmstart.deepgemm.plan import Plan
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.libraries.collect import collect
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.table import parse_include
from sglang_warmstart.sglang.caches import deep_gemm_cache, server_environment

app = typer.Typer(
    help="Bundles: compiled kernels in one file. A bundle is native code: use only bundles from people you trust.",
    no_args_is_help=True,
)

_Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A path or URL: file, http, https, s3, gs, hf.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Signer = Annotated[
    Path | None,
    typer.Option(
        "--require-signature", metavar="PUBKEY", help="Refuse the bundle unless this Ed25519 key (PEM) has signed it."
    ),
]
_CACHE_HELP = "DeepGEMM's cache. Default: where a server with this environment has it."
_Cache = Annotated[Path | None, typer.Option(help=_CACHE_HELP)]


@app.command()
@command
def inspect(bundle: _Bundle, signer: _Signer = None, as_json: _AsJson = False) -> None:
    """Show what is in a bundle: versions, GPU, targets and kernels, and other libraries' caches."""
    key = _key(signer)
    with source.opened(bundle) as stream:
        manifest = archive.read(stream, is_signed_by=key)
        packed_bytes = stream.seek(0, os.SEEK_END)
    if as_json:
        typer.echo(json.dumps(bundle_as_json(manifest, packed_bytes), indent=2))
    else:
        show_bundle(manifest, packed_bytes, Console())


@app.command()
@command
def verify(bundle: _Bundle, signer: _Signer = None, as_json: _AsJson = False) -> None:
    """Check a bundle: its form, every checksum, its signature if one is required, that each kernel is a whole cubin.

    Exit status 0 when all is well, 1 when a kernel is none, 2 when it is damaged, hostile or not signed by that key.
    """
    key = _key(signer)
    with source.opened(bundle) as stream, tempfile.TemporaryDirectory(prefix="warmstart-verify-") as directory:
        manifest = archive.read(stream, is_signed_by=key)
        archive.extract(stream, manifest, Path(directory), set(manifest.cubins.values()))
        defects = defects_of(manifest, manifest.cubins, Path(directory))
    missing = len(manifest.plan.kernels) - len(manifest.cubins)
    if as_json:
        report = {"ok": not defects, "kernels": len(manifest.cubins), "missing": missing, "defects": defects}
        typer.echo(json.dumps(report, indent=2))
    else:
        for defect in defects:
            typer.echo(defect, err=True)
        lacking = f", {missing} of its plan are not compiled" if missing else ""
        files, total = len(manifest.files), size(sum(manifest.files.values()))
        signed = ", signed by the required key" if signer else ""
        kernels = f"{len(manifest.cubins)} kernels{lacking}{signed}"
        typer.echo(f"{source.shown(bundle)}: {files} files ({total}) as they should be, {kernels}")
    raise typer.Exit(EXIT_FAILED if defects else 0)


@app.command()
@command
def unpack(
    bundle: _Bundle,
    cache: _Cache = None,
    deep_gemm: Annotated[
        Path | None,
        typer.Option(help="The directory that the server imports deep_gemm from. Default: the one installed here."),
    ] = None,
    signer: _Signer = None,
    as_json: _AsJson = False,
) -> None:
    """Restore a bundle into the caches here, under the names that its kernels have for this installation.

    What is there and good is kept. A server may be using the cache. Exit status 0 when it was restored, 2 when it is
    damaged, hostile, not signed by that key, or for another DeepGEMM or compiler: then nothing has been written.
    """
    place = place_of(_environment(), cache or deep_gemm_cache(os.environ), deep_gemm)
    key = _key(signer)
    with source.opened(bundle) as stream:
        restored = restore(stream, place, key)
    if as_json:
        typer.echo(json.dumps(asdict(restored), indent=2))
        return
    for note in restored.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{place.cache}: {restored.in_words()}")


@app.command()
@command
def pack(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write (.tar.zst).")],
    cache: _Cache = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="BUNDLE", help="Pack the kernels and caches of this bundle, not those of the cache."
        ),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(
            metavar="LIBRARIES",
            help="Also pack these caches, and how to build what is in them: names with commas, or all.",
        ),
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(
            "--require-signature", metavar="PUBKEY", help="Refuse that bundle unless this Ed25519 key has signed it."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign the bundle with this Ed25519 key (PEM).")
    ] = None,
    identity: Annotated[
        str, typer.Option(help="Only markers in directories of warmstart/markers whose name begins with this.")
    ] = "",
    as_json: _AsJson = False,
) -> None:
    """Make a bundle of what finished warm-ups have left in a cache, or another one of a bundle.

    Exit status 0 when it has all their kernels, 1 when some are left out, 2 when there is nothing to pack.
    """
    wanted = _wanted(include)
    private_key = PrivateKey.load(key) if key is not None else None
    with tempfile.TemporaryDirectory(prefix="warmstart-pack-") as directory:
        if base is None:
            sources = _of_cache(cache_to_read(cache), identity)
        else:
            sources = _of_bundle(base, _key(signer), Path(directory))
        plan, cubins, caches, notes = sources.plan, sources.cubins, sources.caches, sources.notes
        environment = _environment() if wanted else {}
        for library in wanted:
            collected = collect(library, environment)
            notes += collected.notes
            if collected.cache.files:
                caches[library.name] = (collected.cache, collected.contents)
            else:
                notes.append(f"{library.name}: nothing in {library.root(environment) or 'a cache of its own'}")
        builds = (
            {**sources.builds, **packing.builds_in(cache_to_read(cache), wanted, notes)} if wanted else sources.builds
        )
        contents = packing.contents_of(plan, cubins, failed=sources.failed, caches=caches.values(), builds=builds)
        archive.write(output, contents.manifest, contents.open, sign=private_key.sign if private_key else None)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(bundle_as_json(contents.manifest, output.stat().st_size), indent=2))
    else:
        others = "".join(f", {len(found.files)} files of {name}'s cache" for name, (found, _) in caches.items())
        others += f", {len(builds)} plans of builds" if builds else ""
        typer.echo(f"{output}: {size(output.stat().st_size)}: {len(cubins)} of {len(plan.kernels)} kernels{others}")
    raise typer.Exit(EXIT_FAILED if plan.left_out or len(cubins) < len(plan.kernels) else 0)


@dataclass
class _Sources:
    """What a bundle is made from."""

    plan: Plan
    cubins: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)
    caches: dict[str, tuple[LibraryCache, dict[str, Path]]] = field(default_factory=dict)
    builds: dict[str, BuildPlan] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _of_cache(root: Path, identity: str) -> _Sources:
    exported = packing.export(root, identity)
    return _Sources(exported.plan, packing.cubins_in(root, exported), notes=list(exported.notes))


def _of_bundle(place: str, signer: PublicKey | None, directory: Path) -> _Sources:
    with source.opened(place) as stream:
        manifest = archive.read(stream, is_signed_by=signer)
        archive.extract(stream, manifest, directory)
    return _Sources(
        manifest.plan,
        {name: directory / sha256 for name, sha256 in manifest.cubins.items()},
        manifest.failed,
        {
            cache.library: (cache, {file.sha256: directory / file.sha256 for file in cache.files})
            for cache in manifest.caches
        },
        {name: build_plan.load(directory / sha256) for name, sha256 in manifest.builds.items()},
    )


def _environment() -> dict[str, str]:
    """That of a server which is started here."""
    try:
        return server_environment(os.environ)
    except OSError as error:
        raise BundleError(str(error)) from error


def _wanted(include: str | None) -> tuple[Library, ...]:
    if include is None:
        return ()
    try:
        return parse_include(include)
    except ValueError as error:
        raise BundleError(f"--include: {error}") from error


def _key(path: Path | None) -> PublicKey | None:
    return PublicKey.load(path) if path is not None else None
