"""The compilers of a node take its cores and no more than its memory, as far as the container may use them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.confined import run_python
from sglang_warmstart.kernels import limits

GIB = 1 << 30
CORES = len(os.sched_getaffinity(0))


class Machine:
    """Files like those of the kernel: the machine's memory, and a control group inside another one."""

    def __init__(self, root: Path) -> None:
        self.meminfo = root / "meminfo"
        self.job = root / "cgroup" / "job"
        self.cgroup = self.job / "step"
        self.cgroup.mkdir(parents=True)
        self.has_free(1000 * GIB)

    def has_free(self, size: int) -> None:
        self.meminfo.write_text(f"MemTotal: 9999999999 kB\nMemFree: 1 kB\nMemAvailable: {size // 1024} kB\n")

    def limit(
        self, group: Path, *, cpu: str = "", memory: str = "", used: int = 0, files: int = 0, shared: int = 0
    ) -> None:
        if cpu:
            (group / "cpu.max").write_text(f"{cpu}\n")
        if memory:
            (group / "memory.max").write_text(f"{memory}\n")
            (group / "memory.current").write_text(f"{used}\n")
            (group / "memory.stat").write_text(f"anon 1\nfile {files}\nkernel 2\nshmem {shared}\nfile_mapped 3\n")

    def workers(self, wish: int | None = None) -> int:
        return limits.compile_workers(wish, self.cgroup, self.meminfo)

    def free(self) -> int:
        return limits.free_memory(self.cgroup, self.meminfo)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with memory for everything and without limits."""
    return Machine(tmp_path)


def test_without_limits_every_core_has_a_compiler(machine: Machine) -> None:
    assert machine.workers() == CORES
    machine.limit(machine.cgroup, cpu="max 100000", memory="max")
    assert machine.workers() == CORES


def test_the_quota_of_the_group_counts_and_a_part_of_a_core_is_one(machine: Machine) -> None:
    machine.limit(machine.cgroup, cpu="50000 100000")
    assert machine.workers() == 1
    machine.limit(machine.cgroup, cpu=f"{CORES * 100000 - 50000} 100000")
    assert machine.workers() == CORES
    machine.limit(machine.cgroup, cpu="99900000 100000")
    assert machine.workers() == CORES


def test_the_limits_of_the_group_around_it_count_too(machine: Machine) -> None:
    # As a batch system sets them: on the job, whose steps are groups below it.
    machine.limit(machine.cgroup, cpu="max 100000", memory="max")
    machine.limit(machine.job, cpu="100000 100000", memory=str(3 * GIB), used=2 * GIB)
    assert machine.workers() == 1
    assert machine.free() == GIB


def test_the_affinity_of_the_process_counts(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from sglang_warmstart.kernels import limits
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(limits.container_cores(Path(sys.argv[1])))
"""
    assert run_python(code, str(tmp_path)) == "1\n"


@given(quota=st.integers(1, 10_000_000), period=st.integers(1000, 1_000_000))
def test_cores_are_the_quota_rounded_up_and_at_most_those_there_are(
    tmp_path_factory: pytest.TempPathFactory, quota: int, period: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "quota"
    directory.mkdir(exist_ok=True)
    (directory / "cpu.max").write_text(f"{quota} {period}\n")
    assert limits.container_cores(directory) == min(CORES, math.ceil(quota / period))


def test_a_users_wish_takes_the_place_of_the_cores(machine: Machine) -> None:
    machine.limit(machine.cgroup, cpu="100000 100000")
    assert machine.workers(wish=40) == 40
    assert machine.workers(wish=1) == 1


@pytest.mark.parametrize("wish", [0, -3])
def test_a_wish_for_no_compiler_is_none(machine: Machine, wish: int) -> None:
    assert machine.workers(wish) == machine.workers()


def test_never_more_than_the_memory_carries_also_against_a_wish(machine: Machine) -> None:
    machine.limit(machine.cgroup, memory=str(10 * GIB), used=3 * GIB)
    assert machine.workers(wish=40) == 7 * GIB // limits.MEMORY_PER_COMPILE
    machine.has_free(4 * GIB)
    assert machine.workers(wish=40) == 4 * GIB // limits.MEMORY_PER_COMPILE


def test_however_little_memory_there_is_one_compiler_runs(machine: Machine) -> None:
    machine.limit(machine.cgroup, memory="1000", used=2000)
    assert machine.free() == 0
    assert machine.workers() == machine.workers(wish=8) == 1


def test_what_a_group_holds_of_files_is_free_but_not_what_it_shares_in_memory(machine: Machine) -> None:
    machine.limit(machine.cgroup, memory=str(10 * GIB), used=9 * GIB, files=6 * GIB, shared=4 * GIB)
    assert machine.free() == 3 * GIB


def test_limits_that_are_not_there_limit_nothing(tmp_path: Path) -> None:
    assert limits.free_memory(tmp_path, tmp_path / "none") > 1 << 50
    assert limits.compile_workers(None, tmp_path, tmp_path / "none") == CORES


def test_the_group_of_a_process_is_the_one_of_the_second_version(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("9:name=systemd:/old\n0::/job/step\n")
    assert limits.own_cgroup(membership) == Path("/sys/fs/cgroup/job/step")
    membership.write_text("0::/\n")
    assert limits.own_cgroup(membership) == Path("/sys/fs/cgroup")
    assert limits.own_cgroup(tmp_path / "none") == Path("/sys/fs/cgroup")


def test_this_machine_has_at_least_one_place(tmp_path: Path) -> None:
    said = json.loads(
        run_python(
            "import json; from sglang_warmstart.kernels.limits import *; print(json.dumps(compile_workers(None)))"
        )
    )
    assert 1 <= said <= CORES
