"""`compile --cluster` with real compilers, and with workers, schedulers and users that end in the middle.

Short cases are in test/bundle/test_cluster.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sglang_warmstart
from kit.cluster import Cluster, with_other_compiler, without_tools
from kit.compile_runs import Machine, end, numbers, read, wait_for
from kit.plans import real_plan, write_plan
from kit.scripted_compiler import wait_until_gone
from kit.toolchain import toolchain
from sglang_warmstart.bundle import archive
from sglang_warmstart.deepgemm import cubin, stub

pytest.importorskip("distributed", reason="dask's distributed is not installed: pip install distributed")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Where the command runs."""
    return without_tools(Machine(tmp_path / "here"))


@pytest.fixture
def site(tmp_path: Path) -> Machine:
    """Where workers run."""
    return Machine(tmp_path / "there")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as cluster:
        yield cluster


def test_real_compilers_in_workers_make_whole_kernels(
    machine: Machine, site: Machine, cluster: Cluster, tmp_path: Path
) -> None:
    found = toolchain()
    plan = real_plan(deep_gemm=Path("/else/deep_gemm"))
    workers = {cluster.worker(site) for _ in range(2)}
    arguments = ("--nvcc", found.nvcc, "--deep-gemm", found.deep_gemm, "--cluster", cluster.address, "--json")
    ended = machine.run(write_plan(tmp_path / "plan.json", plan), *arguments)
    assert (ended.status, ended.json["failed"]) == (0, {}), ended
    assert {int(each["worker"].rpartition(":")[2]) for each in ended.json["each"]} == workers
    manifest = read(machine.bundle)
    assert (manifest.plan, manifest.cubins.keys()) == (plan, plan.kernels.keys())
    with machine.bundle.open("rb") as file:
        archive.extract(file, manifest, machine.temporary)
    for sha256 in manifest.cubins.values():
        data = (machine.temporary / sha256).read_bytes()
        assert cubin.defect_of(data) is None and not stub.is_stub(data)
        assert b"sm90_fp8_gemm" in data


def test_a_worker_without_this_package_is_told_to_install_it(machine: Machine, site: Machine, cluster: Cluster) -> None:
    source = str(Path(sglang_warmstart.__file__).parents[1])
    hide = f"import sys; sys.path.remove({source!r})"
    if source in site.environment["PYTHONPATH"] or "site-packages" in source:
        pytest.skip("the package is where its dependencies are: it cannot be hidden alone")
    cluster.worker(site, before=hide)
    ended = machine.run(site.plan(2), "--cluster", cluster.address)
    assert (ended.status, ended.out) == (2, ""), ended
    assert re.fullmatch(
        r"worker tcp://127\.0\.0\.1:\d+: No module named 'sglang_warmstart': install sglang-warmstart there\n",
        ended.err,
    )


def test_a_worker_with_another_compiler_that_joins_later_compiles_nothing(
    machine: Machine, site: Machine, cluster: Cluster, tmp_path: Path
) -> None:
    other, go = with_other_compiler(tmp_path / "other"), site.directory / "go"
    site.nvcc.on_each_kernel(f"until [ -e {shlex.quote(str(go))} ]; do sleep 0.05; done")
    cluster.worker(site)
    process = machine.start(site.plan(8), "--cluster", cluster.address, "--json")
    wait_for(site.starts)
    late = cluster.worker(other)
    time.sleep(1)
    go.touch()
    ended = end(process)
    assert not other.starts()
    assert ended.json["compiled"] + len(ended.json["failed"]) == 8
    assert ended.status == (1 if ended.json["failed"] else 0)
    for reason in ended.json["failed"].values():
        assert f":{late}: the plan is for nvcc 13.0.88, {other.nvcc.path} is nvcc 13.0.99" in reason
    assert len(read(machine.bundle).cubins) == ended.json["compiled"] >= 1


def test_the_kernels_of_a_worker_that_is_killed_are_compiled_by_the_others(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    # The first compiler hangs, and the others take some time.
    first = shlex.quote(str(site.directory / "first"))
    site.nvcc.on_each_kernel(
        f"if mkdir {first} 2> /dev/null; then echo $$ > {first}/process; sleep 1000; fi; sleep 0.1"
    )
    workers = {cluster.worker(site) for _ in range(3)}
    process = machine.start(site.plan(9), "--cluster", cluster.address, "--json")
    note = site.directory / "first" / "process"
    wait_for(lambda: note.exists() and note.read_text().strip())
    hung = psutil.Process(int(note.read_text()))
    killed = hung.ppid()
    assert killed in workers
    os.kill(killed, signal.SIGKILL)
    try:
        ended = end(process)
    finally:
        os.killpg(hung.pid, signal.SIGKILL)
    assert (ended.status, ended.json["compiled"], ended.json["failed"]) == (0, 9, {}), ended
    assert sorted(set(site.compiled())) == numbers(read(machine.bundle)) == list(range(1, 10))
    by = {int(each["worker"].rpartition(":")[2]) for each in ended.json["each"]}
    assert by == workers - {killed}


def test_a_kernel_that_kills_each_worker_it_comes_to_fails_alone(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    site.nvcc.on_each_kernel('if grep -q "^// 5$" "$source"; then kill -KILL $PPID; fi')
    for _ in range(6):
        cluster.worker(site)
    ended = machine.run(site.plan(5), "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["compiled"]) == (1, 4), ended
    ((name, reason),) = ended.json["failed"].items()
    assert name.startswith("kernel.k5.")
    assert "worker" in reason
    assert numbers(read(machine.bundle)) == [1, 2, 3, 4]


def test_a_scheduler_that_is_killed_ends_the_run_and_keeps_what_is_done(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    site.nvcc.on_each_kernel('if grep -Eq "^// [12]$" "$source"; then sleep 1000; fi')
    cluster.worker(site)
    process = machine.start(site.plan(4), "--cluster", cluster.address, "--json")
    wait_for(lambda: len(site.starts()) == 3)
    time.sleep(0.5)
    cluster.scheduler.kill()
    ended = end(process)
    assert (ended.status, ended.json["compiled"], len(ended.json["failed"])) == (1, 2, 2), ended
    assert set(ended.json["failed"].values()) == {"the cluster has dropped it: see whether its scheduler still runs"}
    assert len(ended.err.splitlines()) == 1 + 4, ended.err
    assert numbers(read(machine.bundle)) == [3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    machine: Machine, site: Machine, cluster: Cluster, number: signal.Signals
) -> None:
    hang = site.directory / "hang"
    hang.touch()
    wait = f"while [ -e {shlex.quote(str(hang))} ]; do sleep 0.05; done"
    site.nvcc.on_each_kernel(f'if grep -Eq "^// [12]$" "$source"; then {wait}; fi')
    plan = site.plan(5)
    for _ in range(2):
        cluster.worker(site)
    process = machine.start(plan, "--cluster", cluster.address, "--json")
    wait_for(lambda: len(site.starts()) == 5)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(number)
    ended = end(process)
    assert time.monotonic() - begun < 5
    assert (ended.status, ended.json["compiled"], ended.json["failed"]) == (130, 3, {})
    assert "Traceback" not in ended.err
    assert numbers(read(machine.bundle)) == [3, 4, 5]
    hang.unlink()
    assert wait_until_gone(site.starts()) == []
    ended = machine.run(plan, "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["resumed"], ended.json["compiled"]) == (0, 3, 2)
    assert sorted(site.compiled()) == [1, 1, 2, 2, 3, 4, 5]
    assert numbers(read(machine.bundle)) == [1, 2, 3, 4, 5]
