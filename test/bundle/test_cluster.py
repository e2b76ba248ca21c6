"""`compile --cluster` with a real dask cluster: a scheduler and workers that are processes of this machine.

What ends in the middle, and real compilers: test/soak/cluster.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cluster import Cluster, with_other_compiler, without_tools
from kit.compile_runs import Ended, Machine, numbers, read
from kit.ports import free_ports

pytest.importorskip("distributed", reason="dask's distributed is not installed: pip install distributed")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Where the command runs: without a compiler and without DeepGEMM."""
    return without_tools(Machine(tmp_path / "here"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("dask") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workers(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Where two workers run: with both."""
    machine = Machine(tmp_path_factory.mktemp("site") / "there")
    for _ in range(2):
        cluster.worker(machine)
    return machine


@pytest.fixture
def site(workers: Machine) -> Machine:
    """The same, with a compiler that just compiles."""
    workers.nvcc.on_each_kernel(":")
    workers.forget()
    return workers


def _refused(ended: Ended) -> str:
    assert (ended.status, ended.out) == (2, ""), ended
    (line,) = ended.err.splitlines()
    return line


# A cluster that is not there. First: the workers come with the other tests.


def test_a_cluster_without_workers_is_said(machine: Machine, cluster: Cluster) -> None:
    line = _refused(machine.run(machine.plan_for_others(2), "--cluster", cluster.address))
    assert line == f"{cluster.address}: the cluster has no workers: start some"


def test_where_nobody_listens_it_is_said_at_once(machine: Machine) -> None:
    (port,) = free_ports(1)
    begun = time.monotonic()
    line = _refused(machine.run(machine.plan_for_others(2), "--cluster", f"dask://127.0.0.1:{port}"))
    assert line == f"dask://127.0.0.1:{port}: no dask scheduler: Connection refused"
    assert time.monotonic() - begun < 8


_NO_ADDRESSES = ("", "host", ":1", "host:port", "host:99999")


@pytest.mark.parametrize(
    ("address", "blocked", "reason"),
    [
        *(
            (f"dask://{each}", "", f"dask://{each}: expected dask://HOST:PORT")
            for each in ("", "host", ":1", "host:99999")
        ),
        ("ray://127.0.0.1:1", "", "ray://127.0.0.1:1: expected dask://HOST:PORT"),
        ("dask://127.0.0.1:1", "distributed", "--cluster needs dask: pip install 'sglang-warmstart[dask]'"),
    ],
)
def test_what_is_no_cluster_is_refused(address: str, blocked: str, reason: str, machine: Machine) -> None:
    before = f"import sys; sys.modules[{blocked!r}] = None"
    ended = machine.run(machine.plan_for_others(2), "--cluster", address, before=before)
    assert (ended.status, ended.out) == (2, "")
    assert reason in " ".join(ended.err.split())


# What it is for


def test_the_workers_share_the_kernels_and_the_bundle_is_the_one_that_is_made_on_one_machine(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    order = site.directory / "order"
    site.nvcc.on_each_kernel(f'head -n 1 "$source" >> {shlex.quote(str(order))}; sleep 0.3')
    plan = site.plan(6)
    ended = machine.run(plan, "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["compiled"], ended.json["failed"]) == (0, 6, {}), ended
    node = os.uname().nodename
    assert {each["worker"] for each in ended.json["each"]} == {f"{node}:{worker}" for worker in cluster.workers}
    assert f"6 kernels to compile: nvcc 13.0.88, 2 at once, 2 workers of {cluster.address}\n" in ended.err
    assert site.most_at_once() == 2
    assert site.compiled() == list(range(1, 7))
    assert {*order.read_text().splitlines()[:2]} == {"// 6", "// 5"}, "the largest are the first there too"

    site.nvcc.on_each_kernel(":")
    assert site.run(plan).status == 0
    assert read(site.bundle) == read(machine.bundle)
    assert site.bundle.read_bytes() == machine.bundle.read_bytes()


def test_a_kernel_that_fails_is_said_with_the_compilers_words(
    machine: Machine, site: Machine, cluster: Cluster
) -> None:
    site.nvcc.on_each_kernel('if grep -q "^// 2$" "$source"; then echo no luck today >&2; exit 3; fi')
    ended = machine.run(site.plan(3), "--cluster", cluster.address, "--json")
    assert (ended.status, ended.json["compiled"]) == (1, 2)
    (reason,) = ended.json["failed"].values()
    assert reason == f"{site.nvcc.path}: exit status 3: no luck today"
    assert numbers(read(machine.bundle)) == [1, 3]
    # It is no accident of a worker's: it is not tried again and again.
    assert site.compiled() == [1, 2, 3]


# Workers that are not as they should be. Last: they stay so.


@pytest.mark.long
def test_a_worker_that_is_not_as_the_plan_asks_is_refused_by_name_before_anything_is_compiled(
    machine: Machine, site: Machine, cluster: Cluster, tmp_path: Path
) -> None:
    plan, header = site.plan(2), site.deep_gemm / "include" / "deep_gemm" / "some.cuh"

    def line() -> str:
        worker, _, rest = _refused(machine.run(plan, "--cluster", cluster.address)).partition(": ")
        assert re.fullmatch(r"worker tcp://127\.0\.0\.1:\d+", worker)
        return rest

    header.write_text("// 2\n")
    assert re.match(r"the plan is for sgl-deep-gemm 0\.1\.0 \(headers .* has a DeepGEMM of unknown version", line())
    # A worker is asked again each time.
    header.write_text("// 1\n")
    hidden = site.deep_gemm.rename(site.directory / "no_deep_gemm")
    assert "DeepGEMM is not installed here: install sgl-deep-gemm, or name it with --deep-gemm" in line()
    hidden.rename(site.deep_gemm)
    nvcc = site.nvcc.path.rename(site.directory / "no_nvcc")
    assert re.match(r"CUDA_HOME=.* has no bin/nvcc: install nvidia-cuda-nvcc", line())
    nvcc.rename(site.nvcc.path)
    other = with_other_compiler(tmp_path / "other")
    cluster.worker(other)
    assert f"the plan is for nvcc 13.0.88, {other.nvcc.path} is nvcc 13.0.99: install what `plan req" in line()
    assert not site.starts() and not other.starts()
    assert not machine.bundle.exists()
