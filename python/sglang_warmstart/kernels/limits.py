"""How many compilers may run at once: the cores of the container, and what its memory carries."""

from __future__ import annotations

import math
import os
from pathlib import Path

# The largest of DeepGEMM's kernels takes nvcc about half of this (docs/benchmarks.md).
MEMORY_PER_COMPILE = 1 << 30

_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def own_cgroup(membership: Path = Path("/proc/self/cgroup")) -> Path:
    """The directory of this process's control group, version 2."""
    path = next((line.removeprefix("0::") for line in _lines(membership) if line.startswith("0::")), "/")
    return _CGROUPS / path.strip("/")


def compile_workers(wish: int | None, cgroup: Path | None = None, meminfo: Path = _MEMINFO) -> int:
    """Parallel compiles of the node.

    Args:
        wish: the user's own bound, which takes the place of the number of cores.
        cgroup: the control group whose limits count; without it, this process's own.
        meminfo: the kernel's account of the machine's memory.

    Returns:
        1 at least, and never more than the free memory carries.
    """
    cgroup = cgroup or own_cgroup()
    wanted = wish if wish is not None and wish >= 1 else container_cores(cgroup)
    return max(1, min(wanted, free_memory(cgroup, meminfo) // MEMORY_PER_COMPILE))


def container_cores(cgroup: Path) -> int:
    """The cores that this process may use: its affinity, and the quotas of its control group, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group in _with_parents(cgroup):
        quota = _words(group / "cpu.max")
        if len(quota) == 2 and quota[0] != "max":
            cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def free_memory(cgroup: Path, meminfo: Path = _MEMINFO) -> int:
    """Bytes that can still be taken: what the machine has left, and what the control group allows."""
    available = _value(meminfo, "MemAvailable:")
    free = 1 << 62 if available is None else available * 1024
    for group in _with_parents(cgroup):
        limit, used = _words(group / "memory.max"), _words(group / "memory.current")
        if limit and used and limit[0] != "max":
            # What the group holds of files is given back when it is needed; but not of files that are in memory alone.
            statistics = group / "memory.stat"
            files = (_value(statistics, "file") or 0) - (_value(statistics, "shmem") or 0)
            free = min(free, max(0, int(limit[0]) - int(used[0]) + files))
    return free


def _with_parents(cgroup: Path) -> list[Path]:
    # A batch system sets its limits on the group of a job, and runs the job in groups below that one.
    return [cgroup, *cgroup.parents]


def _value(path: Path, name: str) -> int | None:
    words = next((line.split() for line in _lines(path) if line.split()[:1] == [name]), None)
    return int(words[1]) if words else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
