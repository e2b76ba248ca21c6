"""`compile --cluster` with a real dask cluster: a scheduler and workers that are processes of this machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import pytest
import sglang_warmstart
from kit.compile_runs import Ended, Machine, end, numbers, read, wait_for
from kit.plans import real_plan, write_plan
from kit.ports import free_ports
from kit.recorded import recording
from kit.scripted_compiler import wait_until_gone
from kit.toolchain import toolchain
from sglang_warmstart.bundle import archive
from sglang_warmstart.deepgemm import cubin, stub

pytest.importorskip("distributed", reason="dask's distributed is not installed: pip install distributed")

_WORKER = "from distributed.cli.dask_worker import main; main()"


class Cluster:
    """A scheduler and its workers, which end with the context.

    Args:
        directory: for their logs; a new one.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        (port,) = free_ports(1)
        self._at = f"127.0.0.1:{port}"
        self.address = f"dask://{self._at}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        host, _, port = self._at.rpartition(":")
        log = self._directory / "scheduler"
        arguments = ["--host", host, "--port", port, "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self._start(log, ["-m", "distributed.cli.dask_scheduler", *arguments], dict(os.environ))
        wait_for(lambda: "Scheduler at:" in log.read_text())
        return self

    def worker(self, machine: Machine, before: str = "") -> int:
        """Add a worker that runs on a machine.

        Args:
            before: Python that is run first.

        Returns:
            Its process.
        """
        log = self._directory / f"worker-{len(self._processes)}"
        arguments = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        arguments += ["--host", "127.0.0.1", "--local-directory", str(self._directory)]
        command = ["-c", f"{before}\n{_WORKER}", f"tcp://{self._at}", *arguments]
        process = self._start(log, command, machine.environment)
        wait_for(lambda: "Registered to:" in log.read_text())
        return process.pid

    def _start(self, log: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Those of compilers are groups of their own, but still their children.
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Where the command runs: without a compiler and without DeepGEMM."""
    return _bare(Machine(tmp_path / "here"))


@pytest.fixture
def site(tmp_path: Path) -> Machine:
    """Where workers run: with both."""
    return Machine(tmp_path / "there")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as cluster:
        yield cluster


def _bare(machine: Machine) -> Machine:
    machine.nvcc.path.unlink()
    machine.deep_gemm.rename(machine.directory / "no_deep_gemm")
    return machine


def _other_compiler(directory: Path) -> Machine:
    machine = Machine(directory)
    (machine.nvcc.path.parent / "version").write_text(recording().compiler.replace("V13.0.88", "V13.0.99"))
    return machine


def _refused(ended: Ended) -> str:
    assert (ended.status, ended.out) == (2, ""), ended
    (line,) = ended.err.splitlines()
    return line


# What it is for


def test_the_workers_share_the_kernels_and_the_bundle_is_the_one_that_is_made_on_one_machine(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    site.nvcc.on_each_kernel("sleep 0.3")
    plan = site.plan(9)
    workers = {cluster.worker(site) for _ in range(3)}
    ended = machine.run(plan, "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["compiled"], ended.json["failed"]) == (0, 9, {}), ended
    node = os.uname().nodename
    assert {each["worker"] for each in ended.json["each"]} == {f"{node}:{worker}" for worker in workers}
    assert f"9 kernels to compile: nvcc 13.0.88, 3 at once, 3 workers of {cluster.address}\n" in ended.err
    assert site.most_at_once() == 3
    assert site.compiled() == list(range(1, 10))
    assert ended.json["seconds"] < ended.json["compile_seconds"]

    site.nvcc.on_each_kernel(":")
    assert site.run(plan).status == 0
    assert read(site.bundle) == read(machine.bundle)
    assert site.bundle.read_bytes() == machine.bundle.read_bytes()


def test_the_largest_kernels_are_the_first_there_too(machine: Machine, site: Machine, cluster: Cluster) -> None:
    order = site.directory / "order"
    site.nvcc.on_each_kernel(f'head -n 1 "$source" >> {shlex.quote(str(order))}')
    cluster.worker(site)
    assert machine.run(site.plan(6), "--cluster", cluster.address).status == 0
    assert order.read_text().splitlines() == [f"// {number}" for number in (6, 5, 4, 3, 2, 1)]


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


def test_a_kernel_that_fails_is_said_with_the_compilers_words(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    site.nvcc.on_each_kernel('if grep -q "^// 2$" "$source"; then echo no luck today >&2; exit 3; fi')
    cluster.worker(site)
    ended = machine.run(site.plan(3), "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["compiled"]) == (1, 2)
    (reason,) = ended.json["failed"].values()
    assert reason == f"{site.nvcc.path}: exit status 3: no luck today"
    assert numbers(read(machine.bundle)) == [1, 3]
    # It is no accident of a worker's: it is not tried again and again.
    assert site.compiled() == [1, 2, 3]


# Workers that are not as they should be


def test_a_worker_with_another_compiler_is_refused_by_name_before_anything_is_compiled(
    machine: Machine, site: Machine, cluster: Cluster, tmp_path: Path
) -> None:
    other = _other_compiler(tmp_path / "other")
    cluster.worker(site)
    cluster.worker(other)
    line = _refused(machine.run(site.plan(2), "--cluster", cluster.address))
    assert re.match(r"worker tcp://127\.0\.0\.1:\d+: the plan is for nvcc 13\.0\.88, ", line)
    assert f"{other.nvcc.path} is nvcc 13.0.99: install what `plan requirements` says" in line
    assert not site.starts() and not other.starts()
    assert not machine.bundle.exists()


def test_a_worker_with_other_headers_of_deep_gemm_or_none_is_refused(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    plan = site.plan(2)
    cluster.worker(site)
    header = site.deep_gemm / "include" / "deep_gemm" / "some.cuh"
    header.write_text("// 2\n")
    line = _refused(machine.run(plan, "--cluster", cluster.address))
    assert re.match(r"worker tcp://127\.0\.0\.1:\d+: the plan is for sgl-deep-gemm 0\.1\.0 \(headers ", line)
    assert f"{site.deep_gemm} has a DeepGEMM of unknown version (headers " in line
    # A worker that was right once is asked again each time.
    header.write_text("// 1\n")
    assert machine.run(plan, "--cluster", cluster.address).status == 0
    machine.bundle.unlink()
    _bare(site)
    line = _refused(machine.run(plan, "--cluster", cluster.address))
    assert re.match(r"worker tcp://127\.0\.0\.1:\d+: CUDA_HOME=.* has no bin/nvcc: install nvidia-cuda-nvcc", line)


def test_a_worker_without_deep_gemm_is_refused(machine: Machine, site: Machine, cluster: Cluster) -> None:
    plan = site.plan(2)
    site.deep_gemm.rename(site.directory / "no_deep_gemm")
    cluster.worker(site)
    line = _refused(machine.run(plan, "--cluster", cluster.address))
    assert re.fullmatch(
        r"worker tcp://127\.0\.0\.1:\d+: DeepGEMM is not installed here: install sgl-deep-gemm, or name it with "
        r"--deep-gemm",
        line,
    )


def test_a_worker_without_this_package_is_told_to_install_it(machine: Machine, site: Machine, cluster: Cluster) -> None:
    source = str(Path(sglang_warmstart.__file__).parents[1])
    hide = f"import sys; sys.path.remove({source!r})"
    if source in site.environment["PYTHONPATH"] or "site-packages" in source:
        pytest.skip("the package is where its dependencies are: it cannot be hidden alone")
    cluster.worker(site, before=hide)
    line = _refused(machine.run(site.plan(2), "--cluster", cluster.address))
    assert re.fullmatch(
        r"worker tcp://127\.0\.0\.1:\d+: No module named 'sglang_warmstart': install sglang-warmstart there", line
    )


def test_a_worker_with_another_compiler_that_joins_later_compiles_nothing(
    machine: Machine, site: Machine, cluster: Cluster, tmp_path: Path
) -> None:
    other, go = _other_compiler(tmp_path / "other"), site.directory / "go"
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


# A cluster that is not there


def test_a_cluster_without_workers_is_said(machine: Machine, site: Machine, cluster: Cluster) -> None:
    line = _refused(machine.run(site.plan(2), "--cluster", cluster.address))
    assert line == f"{cluster.address}: the cluster has no workers: start some"


def test_where_nobody_listens_it_is_said_at_once(machine: Machine, site: Machine) -> None:
    (port,) = free_ports(1)
    begun = time.monotonic()
    line = _refused(machine.run(site.plan(2), "--cluster", f"dask://127.0.0.1:{port}"))
    assert line == f"dask://127.0.0.1:{port}: no dask scheduler: Connection refused"
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("address", ["dask://", "dask://host", "dask://:1", "dask://host:port", "dask://host:99999"])
def test_an_address_that_is_none_is_refused(machine: Machine, site: Machine, address: str) -> None:
    line = _refused(machine.run(site.plan(2), "--cluster", address))
    assert line == f"{address}: expected dask://HOST:PORT"


def test_another_kind_of_cluster_is_refused(machine: Machine, site: Machine) -> None:
    ended = machine.run(site.plan(2), "--cluster", "ray://127.0.0.1:1")
    assert (ended.status, ended.out) == (2, "")
    assert "ray://127.0.0.1:1: expected dask://HOST:PORT" in " ".join(ended.err.split())


def test_without_dask_it_is_said_what_to_install(machine: Machine, site: Machine) -> None:
    blocked = "import sys; sys.modules['distributed'] = None"
    line = _refused(machine.run(site.plan(2), "--cluster", "dask://127.0.0.1:1", before=blocked))
    assert line == "--cluster needs dask: pip install 'sglang-warmstart[dask]'"


# What ends in the middle


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
    assert len(ended.err.splitlines()) == 1 + 4 + 2, ended.err
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
