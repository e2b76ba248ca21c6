"""A machine that compiles plans: small plans, a compiler that is a shell script, and the command as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.manifest import Manifest
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.identity import Identity, headers_hash
from sglang_warmstart.deepgemm.plan import Plan, Planner
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target

from kit.environment import python_path
from kit.fake_nvcc import FakeNvcc, cubin_of
from kit.plans import write_plan
from kit.recorded import recording

# Writes the bundle after each kernel.
OFTEN = """
from sglang_warmstart.cli import compile as compile_command
compile_command._WRITE_AGAIN_S, compile_command._WRITE_SHARE = -1, 1e9
"""
# As the console script does it, and some more where a test needs it.
_MAIN = "from sglang_warmstart.cli import main; main()"


def small_deep_gemm(directory: Path, header: str = "// 1\n") -> Path:
    """A DeepGEMM that is nothing but a header."""
    package = directory / "deep_gemm"
    (package / "include" / "deep_gemm").mkdir(parents=True)
    (package / "include" / "deep_gemm" / "some.cuh").write_text(header)
    (package / "__init__.py").write_text('raise ImportError("it needs a GPU")')
    return package


def small_plan(
    deep_gemm: Path,
    count: int,
    *,
    first: int = 1,
    compiler: str | None = None,
    kind: str = "nvcc",
    launch: str = "0",
) -> Plan:
    """A plan of kernels whose sources begin with ``// NUMBER``; the higher the number, the larger the kernel."""
    include = deep_gemm / "include"
    identity = Identity(
        gpu="NVIDIA H200",
        num_sms=132,
        capability=(9, 0),
        deep_gemm="build",
        installed_in=str(deep_gemm),
        compiler=recording().compiler if compiler is None else compiler,
        kind=kind,
        settings={},
    )
    kernels = [
        RecordedKernel(
            f"kernel.k{number}.{'0' * 32}",
            f"// {number}\n__instantiate_kernel<{number}, 1>",
            f"-O3 -I{include}",
            number,
        )
        for number in range(first, first + count)
    ]
    planner = Planner(identity, "sgl-deep-gemm 0.1.0", headers_hash(deep_gemm))
    target = Target(kernel_type="GEMM", n=1, k=1, num_groups=1, num_sms=1, m_max=64)
    planner.add(identity, {"rank": launch}, [(target, kernels)])
    return planner.plan()


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed for machines."""
        return json.loads(self.out)


class Machine:
    """A machine with a compiler and a DeepGEMM of its own.

    Args:
        directory: of all of it; a new one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nvcc = FakeNvcc(directory / "cuda" / "bin")
        self.deep_gemm = small_deep_gemm(directory)
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.bundle = directory / "out" / "bundle.tar.zst"
        self.bundle.parent.mkdir()

    def plan(self, count: int, name: str = "plan.json", **changed: Any) -> Path:
        """The file of a small plan."""
        return write_plan(self.directory / name, small_plan(self.deep_gemm, count, **changed))

    def plan_for_others(self, count: int) -> Path:
        """The file of a small plan for machines that have what this one may lack."""
        deep_gemm = small_deep_gemm(self.directory / "others")
        return write_plan(self.directory / "plan.json", small_plan(deep_gemm, count))

    def forget(self) -> None:
        """Forget what was compiled."""
        self.bundle.unlink(missing_ok=True)
        for name in ("runs", "log"):
            (self.nvcc.path.parent / name).unlink(missing_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """That of its processes."""
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        return {
            **kept,
            "CUDA_HOME": str(self.nvcc.path.parents[1]),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": python_path(self.directory),
        }

    def command(self, *arguments: str | Path, before: str = "") -> list[str]:
        """The command line.

        Args:
            before: Python that is run first.
        """
        return [sys.executable, "-c", f"{before}\n{_MAIN}", "compile", *map(str, arguments)]

    def start(self, *arguments: str | Path, before: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start it, writing to its bundle if no other one is named."""
        output = () if "-o" in arguments else ("-o", self.bundle)
        return subprocess.Popen(
            self.command(*arguments, *output, before=before),
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str | Path, before: str = "", **environment: str) -> Ended:
        """Run it to its end."""
        return end(self.start(*arguments, before=before, **environment))

    def starts(self) -> list[int]:
        """The processes of the compiler's runs."""
        log = self.nvcc.path.parent / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith("start")]

    def most_at_once(self) -> int:
        """How many compilers ran beside each other at the most."""
        running = most = 0
        for line in (self.nvcc.path.parent / "log").read_text().splitlines():
            running += 1 if line.startswith("start") else -1
            most = max(most, running)
        return most

    def compiled(self) -> list[int]:
        """The numbers of the kernels that were compiled, in no order, as often as they were."""
        return sorted(int(line.removeprefix("// ")) for line in self.nvcc.compiled.elements())


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for its end."""
    try:
        out, err = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, out, err)


def read(path: Path) -> Manifest:
    """A bundle's manifest. All of the bundle is checked."""
    with path.open("rb") as file:
        return archive.read(file)


def numbers(manifest: Manifest) -> list[int]:
    """The kernels that a bundle has."""
    return sorted(int(name.split(".")[1].removeprefix("k")) for name in manifest.cubins)


def wait_for(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    """Return as soon as something is so."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.01)


def on_some(numbers: str, command: str) -> str:
    """A line of shell that does something for some kernels: the numbers of those, as a shell matches them."""
    pattern = "|".join(f'"// {number}"' for number in numbers.split())
    return f'case $(head -n 1 "$source") in {pattern}) {command};; esac'


def see_whole(machine: Machine, plan: Path, expected: list[int]) -> None:
    """See that the bundle is whole, and that each kernel in it is the one that was compiled from its source."""
    manifest = read(machine.bundle)
    assert numbers(manifest) == expected
    assert manifest.plan == plans.decode(plan.read_bytes())
    directory = Path(str(machine.bundle) + ".extracted")
    directory.mkdir()
    with machine.bundle.open("rb") as file:
        archive.extract(file, manifest, directory)
    for name, sha256 in manifest.cubins.items():
        source, flags = manifest.plan.kernels[name].source, manifest.plan.flags_of(name, machine.deep_gemm / "include")
        assert (directory / sha256).read_bytes() == cubin_of(source, flags)
        (directory / sha256).unlink(missing_ok=True)
    directory.rmdir()


def left_by(machine: Machine) -> list[str]:
    """What is beside the bundle, or was left in the directory for temporary files."""
    return sorted(path.name for place in (machine.bundle.parent, machine.temporary) for path in place.iterdir())
