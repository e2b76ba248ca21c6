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
from sglang_warmstart.node import limits

GIB = 1 << 30
CORES = len(os.sched_getaffinity(0))


class Machine:
    """Files like those of the kernel: the machine's memory, and a control group inside another one."""

    def __init__(self, root: Path) -> None:
        self.meminfo = root / "meminfo"
        self.job = root / "cgroup" / "job"
        self.cgroup = self.job / "step"
        self.cgroup.mkdir(parents=True)
        self.groups = [self.cgroup]
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
        return limits.compile_workers(wish, self.groups, self.meminfo)

    def free(self) -> int:
        return limits.free_memory(self.groups, self.meminfo)


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
from sglang_warmstart.node import limits
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(limits.container_cores([Path(sys.argv[1])]))
"""
    assert run_python(code, str(tmp_path)) == "1\n"


@given(quota=st.integers(1, 10_000_000), period=st.integers(1000, 1_000_000))
def test_cores_are_the_quota_rounded_up_and_at_most_those_there_are(
    tmp_path_factory: pytest.TempPathFactory, quota: int, period: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "quota"
    directory.mkdir(exist_ok=True)
    (directory / "cpu.max").write_text(f"{quota} {period}\n")
    assert limits.container_cores([directory]) == min(CORES, math.ceil(quota / period))


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
    assert limits.free_memory([tmp_path], tmp_path / "none") > 1 << 50
    assert limits.compile_workers(None, [tmp_path], tmp_path / "none") == CORES


# Which groups


def own_groups(tmp_path: Path, *lines: str) -> list[str]:
    membership = tmp_path / "membership"
    membership.write_text("".join(f"{line}\n" for line in lines))
    return [str(path) for path in limits.own_groups(membership, Path("/mounts"))]


def test_the_group_of_a_process_is_the_one_of_the_second_version(tmp_path: Path) -> None:
    assert own_groups(tmp_path, "9:name=systemd:/old", "0::/job/step") == ["/mounts", "/mounts/job/step"]
    assert own_groups(tmp_path, "0::/") == own_groups(tmp_path) == ["/mounts"]
    assert limits.own_groups(tmp_path / "none") == [Path("/sys/fs/cgroup")]


def test_of_the_first_version_those_that_limit_cores_and_memory_count(tmp_path: Path) -> None:
    lines = ("12:pids:/other", "4:cpu,cpuacct:/job/a:b", "3:cpuset:/other", "2:memory:/job", "1:name=systemd:/other")
    assert own_groups(tmp_path, *lines, "0::/unified") == [
        "/mounts",
        "/mounts/cpu,cpuacct/job/a:b",
        "/mounts/cpu/job/a:b",
        "/mounts/memory/job",
        "/mounts/unified",
    ]


# The first version


class FirstVersion(Machine):
    """The same machine with its limits in a mount for each controller, and a process in the groups of a step."""

    def __init__(self, root: Path, path: str = "job/step") -> None:
        super().__init__(root)
        self.mounts = root / "mounts"
        membership = root / "membership"
        membership.write_text(f"4:cpu,cpuacct:/{path}\n2:memory:/{path}\n1:name=systemd:/\n0::/\n")
        self.groups = limits.own_groups(membership, self.mounts)
        # What the kernel says where nothing is limited.
        self.limit_cores("job/step")
        self.limit_memory("job/step", used=1)

    def limit_cores(self, path: str, quota: int = -1) -> None:
        group = self.mounts / "cpu,cpuacct" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")

    def limit_memory(
        self, path: str, limit: int = 9223372036854771712, *, used: int, files: int = 0, shared: int = 0
    ) -> None:
        group = self.mounts / "memory" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
        # A group's own share of it is less than what it has together with the groups inside it.
        (group / "memory.stat").write_text(f"cache 7\nshmem 5\ntotal_cache {files}\ntotal_shmem {shared}\n")


def test_the_first_version_without_limits(tmp_path: Path) -> None:
    machine = FirstVersion(tmp_path)
    assert machine.workers() == CORES
    assert machine.free() == 1000 * GIB


@pytest.mark.parametrize("path", ["job/step", "job", "."])
def test_the_limits_of_the_first_version_count_of_the_group_and_of_those_around_it(tmp_path: Path, path: str) -> None:
    machine = FirstVersion(tmp_path)
    machine.limit_cores(path, 50000)
    assert machine.workers() == 1
    machine.limit_memory(path, 10 * GIB, used=9 * GIB, files=6 * GIB, shared=4 * GIB)
    assert machine.free() == 3 * GIB
    assert machine.workers(wish=40) == 3 * GIB // limits.MEMORY_PER_COMPILE


def test_where_a_container_does_not_see_its_path_the_root_of_the_mount_is_its_group(tmp_path: Path) -> None:
    machine = FirstVersion(tmp_path, path="docker/0123abc")
    machine.limit_cores(".", 100000)
    machine.limit_memory(".", 2 * GIB, used=GIB)
    assert machine.workers() == 1
    assert machine.free() == GIB


def test_a_mount_whose_name_has_its_controllers_in_another_order_is_found_by_its_link(tmp_path: Path) -> None:
    machine = FirstVersion(tmp_path)
    machine.limit_cores("job", 100000)
    (machine.mounts / "cpu,cpuacct").rename(machine.mounts / "cpuacct,cpu")
    assert machine.workers() == CORES
    (machine.mounts / "cpu").symlink_to("cpuacct,cpu")
    assert machine.workers() == 1


def test_limits_of_both_versions_count(tmp_path: Path) -> None:
    machine = FirstVersion(tmp_path)
    machine.groups.append(machine.cgroup)
    machine.limit(machine.cgroup, memory=str(4 * GIB), used=GIB)
    machine.limit_cores("job", 100000)
    assert machine.workers() == 1
    assert machine.free() == 3 * GIB


def test_this_machine_has_at_least_one_place(tmp_path: Path) -> None:
    said = json.loads(
        run_python("import json; from sglang_warmstart.node.limits import *; print(json.dumps(compile_workers(None)))")
    )
    assert 1 <= said <= CORES
