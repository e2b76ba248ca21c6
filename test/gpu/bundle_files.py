"""What a bundle costs on disk: pack, verify and unpack beside tar and zstd alone on the same files. Needs no GPU.

    python test/gpu/bundle_files.py --host NAME [--out FILE] BUNDLE...

Results of another host in FILE stay. Seconds are of the work alone, without Python's start: medians of several rounds,
in each of which all take turns.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from sglang_warmstart.bundle import archive, entries, packing
from sglang_warmstart.bundle.manifest import Manifest
from sglang_warmstart.bundle.restore import Place, restore
from sglang_warmstart.deepgemm.plan import Plan

RESULT = Path(__file__).parent / "results" / "bundle_files.json"
ROUNDS = 7
LEVEL = 10  # of zstd, as bundles have it


class Files:
    """A bundle, its files in a directory, and what is done with them.

    Args:
        path: of the bundle.
        directory: of this alone.
    """

    def __init__(self, path: Path, directory: Path) -> None:
        self.path, self.directory = path, directory
        self.plain = directory / "plain"
        self.plain.mkdir()
        with path.open("rb") as stream:
            self.manifest: Manifest = archive.read(stream)
            archive.extract(stream, self.manifest, self.plain)

    def pack(self, number: int) -> None:
        cubins = {name: self.plain / sha256 for name, sha256 in self.manifest.cubins.items()}
        caches = [
            (each, {file.sha256: self.plain / file.sha256 for file in each.files}) for each in self.manifest.caches
        ]
        contents = packing.contents_of(self.manifest.plan, cubins, caches=caches)
        archive.write(self.directory / f"packed-{number}", contents.manifest, contents.open)

    def verify(self, _: int) -> None:
        with self.path.open("rb") as stream:
            archive.read(stream)

    def unpack(self, number: int) -> None:
        """All of it: the kernels as on a server, and other libraries' caches under a root of their own."""
        root = self.directory / f"unpacked-{number}"
        with self.path.open("rb") as stream:
            # Whose DeepGEMM it is, is not asked: the hash of its build would be most of the time.
            restore(stream, Place(root / "deep_gemm", self.directory / "deep_gemm", {"PATH": "", "HOME": str(root)}))
            for cache in self.manifest.caches:
                (root / cache.library).mkdir(parents=True)
                staging = root / f"{cache.library}-staging"
                staging.mkdir()
                archive.extract(stream, self.manifest, staging, {file.sha256 for file in cache.files})
                entries.publish(root / cache.library, cache.files, staging)

    def tar_pack(self, number: int) -> None:
        target = self.directory / f"tar-{number}.tar.zst"
        if shutil.which("zstd"):
            self._shell(f"tar -c plain | zstd -q -{LEVEL} -o {target}")
        else:
            with (
                target.open("wb") as file,
                zstandard.ZstdCompressor(LEVEL).stream_writer(file) as packed,
                tarfile.open(fileobj=packed, mode="w|") as tar,
            ):
                tar.add(self.plain, "plain")

    def tar_test(self, _: int) -> None:
        target = self.directory / "tar-0.tar.zst"
        if shutil.which("zstd"):
            self._shell(f"zstd -q -t {target}")
        else:
            with target.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
                while unpacked.read(1 << 20):
                    pass

    def tar_unpack(self, number: int) -> None:
        target, root = self.directory / "tar-0.tar.zst", self.directory / f"tar-{number}"
        root.mkdir()
        if shutil.which("zstd"):
            self._shell(f"zstd -q -dc {target} | tar -x -C {root}")
        else:
            with (
                target.open("rb") as file,
                zstandard.ZstdDecompressor().stream_reader(file) as unpacked,
                tarfile.open(fileobj=unpacked, mode="r|") as tar,
            ):
                tar.extractall(root, filter="data")

    def _shell(self, line: str) -> None:
        subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], check=True, cwd=self.directory)


def measured(path: Path) -> dict[str, Any]:
    """The seconds of one bundle."""
    with tempfile.TemporaryDirectory() as directory:
        files = Files(path, Path(directory))
        works: dict[str, Callable[[int], None]] = {
            "pack": files.pack,
            "tar_pack": files.tar_pack,
            "verify": files.verify,
            "tar_test": files.tar_test,
            "unpack": files.unpack,
            "tar_unpack": files.tar_unpack,
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for number in range(ROUNDS):
            for name, work in works.items():
                os.sync()
                start = time.perf_counter()
                work(number)
                taken[name].append(round(time.perf_counter() - start, 4))
        return {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
            "unpacked_bytes": sum(files.manifest.files.values()),
            "files": len(files.manifest.files),
            "kernels": len(files.manifest.cubins),
            "plan_bytes": len(json.dumps(json.loads(_encoded(files.manifest.plan)))),
            "tar_bytes": (Path(directory) / "tar-0.tar.zst").stat().st_size,
            "median_s": {name: statistics.median(each) for name, each in taken.items()},
            "rounds_s": taken,
        }


def _encoded(plan: Plan) -> bytes:
    from sglang_warmstart.deepgemm import plan as plans

    return plans.encode(plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="what this machine is called in the result")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = results[options.host] = {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "tar_and_zstd": "commands" if shutil.which("zstd") else "Python's tarfile and zstandard",
        "bundles": {},
    }
    for path in options.bundles:
        result["bundles"][path.name.removesuffix(".tar.zst")] = each = measured(path)
        print(path.name, each["bytes"], each["median_s"], flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
