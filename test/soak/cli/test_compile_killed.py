"""`sglang-warmstart compile`, killed at every change that it makes to a file; and with the real compilers.

Everything else about it: test/cli/test_compile_command.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest
from kit.compile_runs import OFTEN, Machine, end, numbers, read, see_whole, wait_for
from kit.confined import run_python
from kit.plans import FEW, real_plan, write_plan
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.node.pool import size_of


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


# Killed at any time. The audit hook sees each change of a file, and the patch each sync, also of data.
_KILL = """
import os, signal, sys
out, left = os.environ["OUT"], [int(os.environ["CHANGES"])]
def change():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(out):
        if event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            change()
sync = os.fsync
def fsync(descriptor):
    change(); sync(descriptor); change()
os.fsync = fsync
sys.addaudithook(hook)
"""


def test_killed_at_any_time_it_leaves_a_whole_bundle_or_none(machine: Machine) -> None:
    plan, found, bundle = machine.plan(2), [], machine.bundle
    for changes in range(1, 100):
        machine.bundle = bundle.parent / f"{changes}.tar.zst"
        ended = machine.run(plan, "--jobs", "1", before=OFTEN + _KILL, OUT=str(machine.bundle), CHANGES=str(changes))
        found.append(numbers(read(machine.bundle)) if machine.bundle.exists() else [])
        if ended.status != -signal.SIGKILL:
            break
    assert ended.status == 0
    # Larger ones first. Each of the writes had several moments to be killed in.
    assert found == sorted(found, key=len)
    assert found.count([]) >= 3 and found.count([2]) >= 5 and found.count([1, 2]) >= 3
    # The next run goes on with what was left.
    compiled = machine.compiled().count(2)
    machine.bundle = bundle.parent / f"{found.index([2]) + 1}.tar.zst"
    report = machine.run(plan, "--json").json
    assert (report["resumed"], report["compiled"], machine.compiled().count(2)) == (1, 1, compiled)
    see_whole(machine, plan, [1, 2])


def test_nvcc_compiles_a_plan_from_another_machine(machine: Machine) -> None:
    plan = write_plan(machine.directory / "real.json", _smallest(real_plan(deep_gemm=Path("/else/deep_gemm"))))
    report = machine.run(plan, "--json", "--nvcc", toolchain().nvcc, "--deep-gemm", toolchain().deep_gemm).json
    (kernel,) = report["each"]
    assert (report["compiled"], report["failed"], report["nvcc"]) == (1, {}, "13.0.88")
    assert list(read(machine.bundle).cubins) == [kernel["name"]]
    assert kernel["bytes"] > 1000 and kernel["seconds"] > 0.1


def _smallest(plan: plans.Plan) -> plans.Plan:
    name = list(plan.kernels)[-1]
    return msgspec.structs.replace(plan, kernels={name: plan.kernels[name]}, launches=())


@pytest.mark.skipif(not toolchain().fits_this_python, reason="NVRTC's bindings are for another Python")
def test_nvrtc_compiles_in_processes_of_its_own_and_ctrl_c_ends_them(machine: Machine) -> None:
    plan = real_plan((*FEW, ("TF32_HC_PRENORM_GEMM", 24, 28672)), deep_gemm=Path("/else/deep_gemm"))
    kernels = sorted(plan.kernels.items(), key=lambda item: size_of(item[1].source))
    compiler = f"{toolchain().compiler().version}{_nvrtc_version()}\n"
    plan = msgspec.structs.replace(
        plan, kind="nvrtc", compiler=compiler, kernels=dict((kernels[0], kernels[-1])), launches=()
    )
    path = write_plan(machine.directory / "real.json", plan)
    arguments = (path, "--json", "--jobs", "2", "--nvcc", toolchain().nvcc, "--deep-gemm", toolchain().deep_gemm)
    process = machine.start(*arguments, **toolchain().nvrtc_environment)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    # By now one of the processes compiles, and the other one waits for more to do.
    assert lines[1].startswith("1/2  "), lines
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    ended = end(process)
    assert time.monotonic() - begun < 5
    assert (ended.status, ended.json["compiled"], ended.json["failed"]) == (130, 1, {})
    assert "Traceback" not in ended.err, ended.err
    wait_for(lambda: not _in_group(process.pid))
    (kernel,) = ended.json["each"]
    assert kernel["worker"] != f"{os.uname().nodename}:{process.pid}"
    assert len(read(machine.bundle).cubins) == 1


_POOL = """
import pathlib, signal, sys
from sglang_warmstart.bundle.cluster import of_this_machine
from sglang_warmstart.deepgemm import plan
with of_this_machine(plan.decode(pathlib.Path(sys.argv[1]).read_bytes()), 1, *sys.argv[2:]) as workers:
    print(workers.executor.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN)
"""


@pytest.mark.skipif(not toolchain().fits_this_python, reason="NVRTC's bindings are for another Python")
def test_ctrl_c_is_not_for_nvrtcs_processes_to_deal_with(machine: Machine) -> None:
    compiler = f"{toolchain().compiler().version}{_nvrtc_version()}\n"
    plan = msgspec.structs.replace(real_plan(), kind="nvrtc", compiler=compiler)
    path = write_plan(machine.directory / "real.json", plan)
    found = toolchain()
    arguments = (str(path), str(found.nvcc), str(found.deep_gemm))
    assert run_python(_POOL, *arguments, environment=found.nvrtc_environment) == "True\n"


def _in_group(group: int) -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(each.pid) == group and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _nvrtc_version() -> str:
    code = "from sglang_warmstart.deepgemm import nvrtc; print(nvrtc.version())"
    environment = {**os.environ, **toolchain().nvrtc_environment}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()
