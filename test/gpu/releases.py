"""One release of DeepGEMM on a GPU, without SGLang: is what is recorded and compiled elsewhere what it would make here?

    releases.py VERSION OUT --targets TARGETS --plan PLAN --root ROOT [--gpu 0] [--cores 0-13] [--fast-cores 14]

DeepGEMM of that version, torch and the plugin are on PYTHONPATH. PLAN was made of TARGETS on a machine without a GPU
(``sglang-warmstart plan TARGETS --gpu h100``), and ROOT of it (``sglang-warmstart compile PLAN -o ROOT``). Writes
OUT/VERSION.json:

- recorded: on the GPU and without it, here; and whether that is what PLAN has.
- fast: what SGLang's FAST_WARMUP does, its list of Ms of each target one after another, on cores of its own meanwhile.
- exact: cold record, compile and load, by the service; several times.
- sweep: every M of every target with the kernels of ROOT, which is only read, and a compiler that refuses.
- compared: results with the kernels of ROOT and with those that DeepGEMM itself compiled for `fast`, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sglang_warmstart.deepgemm import plan as plans

HERE = Path(__file__).parent
ROUNDS = ("nogpu", "gpu", "nogpu", "nogpu")
LIBRARIES = {"nogpu": "sglang_warmstart.deepgemm.nogpu.library", "gpu": "sglang_warmstart.deepgemm.record.gpu"}


def tree(root: Path) -> dict[str, str]:
    """Each file below a directory, and a hash of it."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class Bench:
    """Runs the steps, each in a process of its own, and writes the result after each."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.result: dict[str, Any] = {"version": options.version, "cores": options.cores}
        self._lock = threading.Lock()

    def keep(self, name: str, value: Any) -> None:
        with self._lock:
            self.result[name] = value
            (self.options.out / f"{self.options.version}.json").write_text(json.dumps(self.result, indent=1) + "\n")
        shown = (
            {key: each for key, each in value.items() if not isinstance(each, list)} if isinstance(value, dict) else ""
        )
        print(f"{self.options.version} {name}: {shown}", flush=True)

    def run(self, script: str, *arguments: object, cores: str | None = None, **environment: str) -> dict[str, Any]:
        command = ["taskset", "--cpu-list", cores or self.options.cores, sys.executable, "-W", "ignore"]
        done = subprocess.run(
            [*command, str(HERE / script), *map(str, arguments)],
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": self.options.gpu,
                "WARMSTART_REAL_NVCC": str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")),
                "GPU": "h100",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return {
                "error": f"status {done.returncode}: {done.stdout[-1500:]} {done.stderr[:1500]} {done.stderr[-1500:]}"
            }
        found: dict[str, Any] = json.loads((done.stdout.splitlines() or ["{}"])[-1])
        return found

    def recorded(self) -> None:
        files = {way: self.scratch / f"{way}-{self.options.version}.json" for way in ("gpu", "nogpu")}
        for way, path in files.items():
            self.keep(f"record {way}", self.run("nogpu.py", way, self.options.targets, path))
        found = self.run("nogpu.py", "compare", self.scratch / "compared.json", *files.values())
        if "error" not in found:
            release = json.loads((self.scratch / "compared.json").read_text())["releases"][self.options.version]
            plan = plans.decode(self.options.plan.read_bytes())
            names = plan.directories(Path(release["include"]))
            uses = [use for launch in plan.launches for target in launch.targets for use in target.kernels]
            planned = {(use.m, names[use.directory]) for use in uses}
            here = {(m, directory) for uses in release["entries"].values() for m, directory in uses}
            release["same_as_plan"] = planned == here
            found = release
        self.keep("recorded", found)

    @property
    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.options.plan.read_text())
        return found

    def fast(self) -> None:
        targets = self.options.targets
        self.keep("fast", self.run("exact.py", "fast", targets, self.scratch / "fast", cores=self.options.fast_cores))

    def exact(self) -> None:
        rounds: list[dict[str, Any]] = []
        for number, library in enumerate(ROUNDS):
            found = self.run(
                "exact.py",
                "pipeline",
                self.uses,
                self.scratch / f"exact-{number}",
                "nvcc",
                WARMSTART_BENCH_LIBRARY=LIBRARIES[library],
            )
            rounds.append({"recorder": library, **found})
            self.keep("exact", rounds)

    @property
    def uses(self) -> Path:
        """The targets of the plan with their kernels."""
        path = self.scratch / "uses.json"
        if not path.exists():
            path.write_text(json.dumps([each for launch in self.plan["launches"] for each in launch["targets"]]))
        return path

    def read_only(self, name: str) -> tuple[str, dict[str, str]]:
        """A value of the cache's variable with ROOT below an empty root, or a copy of ROOT where there is only one."""
        if self.options.version.startswith("0.1."):
            copy = self.scratch / f"root-{name}"
            shutil.copytree(self.options.root, copy)
            return str(copy), tree(copy)
        above = self.scratch / f"above-{name}"
        above.mkdir()
        return f"{above}:{self.options.root}", tree(self.options.root)

    def sweep(self) -> None:
        value, before = self.read_only("sweep")
        found = self.run("exact.py", "sweep", value, self.uses, "")
        found["root_unchanged"] = tree(Path(value.split(":")[-1])) == before
        found["written_above"] = len(tree(Path(value.split(":")[0]))) if ":" in value else None
        self.keep("sweep", found)

    def compared(self) -> None:
        value, _ = self.read_only("outputs")
        ours = self.run("exact.py", "outputs", value, self.uses, WARMSTART_BENCH_TIMES="0")
        self.keep("outputs", {key: each for key, each in ours.items() if key == "error"})
        fast.join()
        # What the fast list did not meet, DeepGEMM compiles now.
        theirs = self.run("exact.py", "outputs", self.scratch / "fast", self.uses, WARMSTART_BENCH_TIMES="0")
        rows = [
            {"target": one["target"], "m": one["m"], "equal": one["sha256"] == two["sha256"], "finite": one["finite"]}
            for one, two in zip(ours.get("outputs", []), theirs.get("outputs", []), strict=False)
        ]
        summary = {
            "kernels": len(rows),
            "equal": sum(each["equal"] for each in rows),
            "finite": sum(each["finite"] for each in rows),
            "errors": [each["error"] for each in (ours, theirs) if "error" in each],
        }
        self.keep("compared", {**summary, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("out", type=Path)
    for option in ("--targets", "--plan", "--root"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--cores", default="0-13")
    parser.add_argument("--fast-cores", default="14")
    parser.add_argument("--steps", default="recorded,exact,sweep,compared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options, Path(directory))
        begin = time.time()
        bench.keep("about", bench.run("exact.py", "about"))
        fast = threading.Thread(target=bench.fast)
        fast.start()
        for step in options.steps.split(","):
            try:
                getattr(bench, step)()
            except Exception as error:  # the other steps are worth having
                bench.keep(f"{step} failed", {"error": repr(error)})
        fast.join()
        bench.keep("seconds", {"whole": round(time.time() - begin, 1)})
