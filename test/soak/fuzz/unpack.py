"""Unpack very many archives that are not quite what they should be, and see that each is refused or whole.

    python test/soak/fuzz/unpack.py [--inputs 100000] [--seed N] [--json OUT]
    python test/soak/fuzz/unpack.py --only SEED

Each input comes from a seed of its own: a small bundle, changed in the bytes of the archive, in those of the tar file
inside it, or in what both say. It ends with status 1 if one of them ended in anything but a BundleError, wrote outside
the directory that it was unpacked into, or left there what its manifest does not say.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec
import zstandard
from kit.bundles import LAUNCH, Bundle, Member, bomb, bundle_of, compressed, cubin, identity, member, sha256, tar_of
from kit.other_bytes import other_bytes
from kit.outside import TooSlow, Watch
from rich.console import Console
from rich.progress import track
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.restore import Place, restore
from sglang_warmstart.deepgemm.cache import CUBIN, KernelCache
from sglang_warmstart.deepgemm.plan import Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.libraries.library import Library

LIMIT_S = 60.0  # for one input
TYPES = [bytes([kind]) for kind in b"01234567SLKxgVDMZ\0"]
SIZES = [-1, 0, 1, 511, 512, 513, 1 << 20, (64 << 20) + 1, (8 << 30) - 1, 8 << 30, (1 << 63) - 1, 1 << 64, 1 << 87]
# Of files, libraries and kernels: each may be in a manifest, or looks as if it might.
NAMES = [
    "...",
    "..a",
    "~",
    "a\\..",
    "C:",
    "-rf",
    "%2e%2e",
    "$HOME",
    "*",
    "ä",
    "a b",
    "\u2215",
    "\u0130",
    "x" * 255,
    "con",
]
NAMES += ["cache", "kernel.cubin", "kernel.cu", "tmp", "warmstart", "locks", "markers", ".lock", "triton", "flashinfer"]
BAD_NAMES = [
    "",
    ".",
    "..",
    "/",
    "a\0b",
    "a\n",
    "\x1b[31m",
    "\u202e",
    "x" * 256,
    "../../etc/passwd",
    "/etc/passwd",
    "a//b",
]


# Inputs


def input_of(seed: int) -> tuple[str, bytes]:
    """At which level an input was changed, and the archive."""
    rng = random.Random(seed)
    bundle = _bundle(rng)
    level = rng.choice(list(LEVELS))
    return level, LEVELS[level](rng, bundle)


def _bundle(rng: random.Random) -> Bundle:
    """A whole one, of names that nobody would choose."""
    kernels = [
        RecordedKernel(f"kernel.{rng.choice(['a', 'b_1', '-', 'x' * 215])}.{'0' * 32}", f"// {m}", "-I{include}", m)
        for m in range(1, rng.randint(1, 4))
    ]
    target = Target(kernel_type=rng.choice(NAMES), n=1, k=1, num_groups=1, num_sms=1, m_max=9)
    planner = Planner(identity(), "", "0")
    planner.add(identity(), LAUNCH, [(target, kernels)] if kernels else [])
    contents = [rng.randbytes(rng.choice([0, 1, 64, 511, 512, 513, 2000])) for _ in range(3)]
    # Most of them are whole cubins, so that kernels are published too.
    contents = [cubin(content) if rng.random() < 0.8 else content for content in contents]
    cached = {"/".join(rng.choices(NAMES, k=rng.randint(1, 3))): rng.choice(contents) for _ in range(rng.randint(0, 3))}
    bundle = bundle_of(planner.plan(), contents[: rng.randint(0, 3)], cached)
    others = tuple(LibraryCache(library, {}, ()) for library in set(rng.choices(NAMES, k=rng.randint(0, 2))))
    manifest = msgspec.structs.replace(bundle.manifest, caches=(*bundle.manifest.caches, *others))
    return Bundle(manifest, bundle.contents)


def _in_the_archive(rng: random.Random, bundle: Bundle) -> bytes:
    tar = tar_of(bundle.members(rng.choice([None, rng.randbytes(64)])))
    # What is stored as it is lets changes through to the tar file.
    return _other_bytes(rng, rng.choice([compressed(tar), zstandard.compress(tar, 1), bomb(tar, 0)]))


def _in_the_tar_file(rng: random.Random, bundle: Bundle) -> bytes:
    members = bundle.members(rng.choice([None, rng.randbytes(64)]))
    tar = bytearray(_other_bytes(rng, tar_of(members)))
    if rng.random() < 0.7:
        _sum_headers(tar, [info.size for info, _ in members])
    return compressed(bytes(tar))


def _in_the_headers(rng: random.Random, bundle: Bundle) -> bytes:
    members = bundle.members(rng.choice([None, None, rng.randbytes(64), rng.randbytes(63)]))
    for _ in range(rng.randint(1, 2)):
        _change_members(rng, members)
    return compressed(_tar_of_any(rng, members))


def _in_the_manifest(rng: random.Random, bundle: Bundle) -> bytes:
    value = json.loads(manifests.encode(bundle.manifest))
    for _ in range(rng.randint(1, 2)):
        _change_value(rng, value)
    contents = dict(bundle.contents)
    if rng.random() < 0.5:
        # What belongs together stays so, as far as it can: what is wrong with the rest has to be found.
        _settle(value, contents)
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    members = [member("manifest.json", data), *Bundle(bundle.manifest, contents).members()[1:]]
    if rng.random() < 0.1:
        _change_members(rng, members)
    return compressed(_tar_of_any(rng, members))


LEVELS: dict[str, Callable[[random.Random, Bundle], bytes]] = {
    "archive": _in_the_archive,
    "tar file": _in_the_tar_file,
    "headers": _in_the_headers,
    "manifest": _in_the_manifest,
}


def _other_bytes(rng: random.Random, whole: bytes) -> bytes:
    # Formats say what they are in their first bytes.
    return other_bytes(rng, whole, (0, 1, 0x7F, 0x80, 0xFF, *b'/."9'), head=40)


def _sum_headers(tar: bytearray, sizes: Iterable[int]) -> None:
    at = 0
    for size in sizes:
        header = tar[at : at + 512]
        if len(header) == 512:
            tar[at + 148 : at + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        at += 512 + size + -size % 512


def _change_members(rng: random.Random, members: list[Member]) -> None:
    at = rng.randrange(len(members)) if members else 0
    info, data = members[at] if members else member("manifest.json", b"{}")
    names = [each.name for each, _ in members] + NAMES + BAD_NAMES
    name = rng.choice(names)
    fields: dict[str, object] = {}
    match rng.randrange(9):
        case 0:
            fields["type"] = rng.choice(TYPES)
        case 1:
            fields = {"type": rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "linkname": name}
        case 2:
            info.name = rng.choice(["", "/", "../", "./", "files/"]) + name
        case 3:
            fields["size"] = rng.choice([*SIZES, len(data) + 1, len(data) - 1])
        case 4:
            data = rng.randbytes(rng.choice([0, len(data), 100]))
        case 5:
            data = b"%d path=%s\n" % (len(name.encode()) + 9, name.encode())
            fields["type"] = rng.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
        case 6:
            data = name.encode() + b"\0"
            fields["type"] = rng.choice([tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
        case 7:
            fields = {"mode": rng.choice([0o4755, 0, -1]), "uid": rng.choice([-1, 1 << 40]), "mtime": rng.choice(SIZES)}
        case 8:
            rng.shuffle(members)
            return
    new = member(info.name, data, **fields)
    members[at : at + rng.randrange(2)] = rng.choice([[], [new], [new], [new], [new, new]])


def _tar_of_any(rng: random.Random, members: Iterable[Member]) -> bytes:
    # USTAR has no room for what some of the fields are.
    return tar_of(members, tar_format=rng.choice([tarfile.GNU_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))


def _change_value(rng: random.Random, value: Any) -> None:
    """Change something in the manifest, more often where it is about files."""
    inside = value.get(rng.choice(["caches", "caches", "files", "cubins", "plan", "failed"]))
    if not isinstance(inside, dict | list) or rng.random() < 0.1:
        inside = value
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.1:
            break
        inside = inside[key]
    old = inside[key]
    new = rng.choice([old, None, True, 1.5, [], {}, *SIZES, *NAMES, *BAD_NAMES, "0" * 64, "\ud800"])
    if isinstance(old, str) and rng.random() < 0.7:
        new = rng.choice([*NAMES, *BAD_NAMES, f"{old}/{rng.choice(NAMES)}", f"../{old}", old.upper(), sha256(b"")])
    elif isinstance(old, int) and rng.random() < 0.7:
        new = rng.choice([*SIZES, old + 1, old - 1])
    match rng.randrange(6):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[rng.choice([*NAMES, *BAD_NAMES, "0" * 64])] = inside.pop(key)
        case 2 if isinstance(inside, list):
            inside.append(old)
        case _:
            inside[key] = new


def _settle(value: dict[str, Any], contents: dict[str, bytes]) -> None:
    try:
        named = {*value["cubins"].values(), *(file["sha256"] for cache in value["caches"] for file in cache["files"])}
        contents |= {sha256(b""): b""} if sha256(b"") in named else {}
        for name in contents.keys() - named:
            del contents[name]
        value["files"] = {name: len(contents[name]) for name in named & contents.keys()}
    except (TypeError, KeyError, AttributeError):
        return


# Watching


def unpack(data: bytes, directory: Path) -> str | None:
    """Check an archive, unpack it, and restore it as a server would.

    Args:
        directory: an empty one, of this input.

    Returns:
        Why it was not restored, though the archive is what it should be; None if it was.

    Raises:
        BundleError: it is refused.
    """
    stream = io.BytesIO(data)
    manifest = archive.read(stream)
    files = directory / "files"
    files.mkdir()
    archive.extract(stream, manifest, files)
    found = {path.name: path.read_bytes() for path in files.iterdir()}
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != name:
            raise AssertionError(f"{name} is there and is not what it should be")
    if {name: len(content) for name, content in found.items()} != manifest.files:
        raise AssertionError("what is there is not what the manifest says")
    return _restored(stream, manifest, found, directory / "server")


def _restored(
    stream: io.BytesIO, manifest: manifests.Manifest, contents: dict[str, bytes], directory: Path
) -> str | None:
    place = Place(
        directory / "cache", Path("/nonexistent/deep_gemm"), {"CUDA_HOME": "/none", "HOME": str(directory / "home")}
    )
    refusal = None
    try:
        restore(stream, place)
    except BundleError as error:
        if not str(error).isprintable():
            raise AssertionError(f"not a printable line: {str(error)!r}") from error
        refusal = str(error)
    for cache in (KernelCache(place.cache), KernelCache(place.cache / "nvrtc")):
        half = [path.name for path in (cache.root / "cache").glob("kernel.*") if not cache.has(path.name)]
        if half:
            raise AssertionError(f"half a kernel: {half}")
        for name, directory_name in manifest.plan.directories(place.deep_gemm / "include").items():
            path = cache.path(directory_name) / CUBIN
            if path.exists() and path.read_bytes() != contents[manifest.cubins[name]]:
                raise AssertionError(f"{name} is not the bundle's")
    if any((place.cache / "tmp").glob("*")):
        raise AssertionError("something of the staging is left")
    return refusal


@dataclass
class Result:
    """What became of all inputs.

    Args:
        refused, accepted, not_restored: by level; those that were not restored were accepted.
        reasons: what was said of those that were refused.
        failed: what went wrong, by seed.
        slowest: seconds, and whose.
    """

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    not_restored: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    crashes: dict[int, str] = field(default_factory=dict)
    outside: dict[int, list[str]] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)

    def add(self, seed: int, watch: Watch, root: Path) -> None:
        """Run one input."""
        level, data = input_of(seed)
        directory = root / str(seed)
        directory.mkdir()
        watch.outside.clear()
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        start = time.perf_counter()
        try:
            with watch.over(directory):
                refusal = unpack(data, directory)
            self.accepted[level] += 1
            if refusal is not None:
                self.not_restored[level] += 1
                self.reasons[f"not restored: {_kind_of(refusal)}"] += 1
        except BundleError as error:
            self.refused[level] += 1
            self.reasons[_kind_of(str(error))] += 1
            if not str(error).isprintable():
                self.crashes[seed] = f"not a printable line: {str(error)!r}"
            if any(directory.iterdir()):
                self.crashes[seed] = f"refused, and something was written: {error}"
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.crashes[seed] = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, (time.perf_counter() - start, seed))
        if watch.outside or os.listdir():  # noqa: PTH208
            self.outside[seed] = [*watch.outside, *os.listdir()]  # noqa: PTH208
        shutil.rmtree(directory)

    def as_json(self) -> dict[str, object]:
        """All of it, and the memory that this process took."""
        return {
            "inputs": self.refused.total() + self.accepted.total() + len(self.crashes),
            "refused": dict(sorted(self.refused.items())),
            "accepted": dict(sorted(self.accepted.items())),
            "of them not restored": dict(sorted(self.not_restored.items())),
            "crashes": self.crashes,
            "writes outside": self.outside,
            "slowest input in s": round(self.slowest[0], 4),
            "its seed": self.slowest[1],
            "peak RSS in MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "reasons": dict(self.reasons.most_common()),
        }


def _kind_of(message: str) -> str:
    return re.sub(r"b?'[^']*'|\"[^\"]*\"|kernel\.\S+|[0-9a-f]{64}|-?\d+", "#", message)[:80]


def main() -> int:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="that of the first; the others follow it")
    parser.add_argument("--only", type=int, help="the one input of this seed")
    parser.add_argument("--json", type=lambda name: Path(name).absolute(), help="where to write what was found")
    arguments = parser.parse_args()

    signal.signal(signal.SIGALRM, _too_slow)
    # No key of an input is that of this machine, and what comes after the key is to be seen too.
    Library.mismatch = lambda *_: None  # type: ignore[method-assign,assignment]
    console = Console(stderr=True)
    result, watch = Result(), Watch()
    seeds = range(arguments.seed, arguments.seed + arguments.inputs)
    if arguments.only is not None:
        seeds = range(arguments.only, arguments.only + 1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        for seed in track(seeds, "unpacking", console=console, disable=not console.is_terminal):
            result.add(seed, watch, Path(root))
    report = {"seed": seeds.start, **result.as_json(), "wall clock in s": round(time.monotonic() - start, 1)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    for seed, found in (*result.crashes.items(), *result.outside.items()):
        print(f"seed {seed}: {found}\nagain: {sys.executable} {' '.join(sys.argv[:1])} --only {seed}", file=sys.stderr)
    print(
        f"{report['inputs']} inputs: {result.refused.total()} refused for {len(result.reasons)} kinds of reasons, "
        f"{result.accepted.total()} accepted ({result.not_restored.total()} of them not restored), "
        f"{len(result.crashes)} crashes, {len(result.outside)} writes outside; "
        f"slowest {result.slowest[0]:.3f} s (seed {result.slowest[1]}), peak RSS {report['peak RSS in MiB']} MiB, "
        f"{report['wall clock in s']} s"
    )
    return 1 if result.crashes or result.outside else 0


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow(f"it took more than {LIMIT_S} s")


if __name__ == "__main__":
    sys.exit(main())
