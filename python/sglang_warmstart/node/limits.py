"""How many compilers may run at once: at most the cores of the container, and what its free memory allows."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

# The largest of DeepGEMM's kernels takes nvcc 455 MiB, and a process of NVRTC 451 MiB; the rest is for the server,
# which loads its weights at the same time.
MEMORY_PER_COMPILE = 1 << 30

_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")

# Those of version 1 that set limits; a line of version 2 names none.
_CONTROLLERS = {"", "cpu", "memory"}

# The files that say the same in versions 2 and 1: the quota and its period; the limit of memory, what is used of it,
# and the lines of the statistics for files, and for those that are in memory alone.
_QUOTA = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
_MEMORY = (
    ("memory.max", "memory.current", "file", "shmem"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
)
# For memory version 1 has a number in its place, more than any machine has.
_UNLIMITED = ("max", "-1")


def own_groups(membership: Path = Path("/proc/self/cgroup"), mounts: Path = _CGROUPS) -> list[Path]:
    """The directories of this process's control groups that may limit it, of version 2 and of version 1.

    Args:
        membership: the kernel's account of the groups of this process.
        mounts: where control groups are mounted.
    """
    groups = [mounts]
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        for controller in _CONTROLLERS.intersection(controllers.split(",")):
            # Controllers that share a mount have links to it of their own; its name may have them in another order.
            groups += [mounts / name / path.strip("/") for name in (controllers, controller)]
    return list(dict.fromkeys(groups))


def compile_workers(wish: int | None, groups: Sequence[Path] = (), meminfo: Path = _MEMINFO) -> int:
    """Parallel compiles of the node.

    Args:
        wish: the user's own bound, which takes the place of the number of cores.
        groups: the control groups whose limits count; without them, this process's own.
        meminfo: the kernel's account of the machine's memory.

    Returns:
        1 at least, and never more than the free memory carries.
    """
    groups = groups or own_groups()
    wanted = wish if wish is not None and wish >= 1 else container_cores(groups)
    return max(1, min(wanted, free_memory(groups, meminfo) // MEMORY_PER_COMPILE))


def container_cores(groups: Sequence[Path]) -> int:
    """The cores that this process may use: its affinity, and the quotas of its control groups, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group, files in itertools.product(_with_parents(groups), _QUOTA):
        quota = _words(group, *files)
        if len(quota) == 2 and quota[0] not in _UNLIMITED:
            cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def free_memory(groups: Sequence[Path], meminfo: Path = _MEMINFO) -> int:
    """Bytes that can still be taken: what the machine has left, and what the control groups allow."""
    available = _value(meminfo, "MemAvailable:")
    free = 1 << 62 if available is None else available * 1024
    for group, (limit, used, file, shared) in itertools.product(_with_parents(groups), _MEMORY):
        memory = _words(group, limit, used)
        if len(memory) == 2 and memory[0] not in _UNLIMITED:
            # What the group holds of files is given back when it is needed; but not of files that are in memory alone.
            statistics = group / "memory.stat"
            files = (_value(statistics, file) or 0) - (_value(statistics, shared) or 0)
            free = min(free, max(0, int(memory[0]) - int(memory[1]) + files))
    return free


def _with_parents(groups: Sequence[Path]) -> list[Path]:
    # A batch system sets its limits on the group of a job, and runs the job in groups below that one. And where a
    # container does not see its group by the path that it has outside, it sees it as the root of the mount.
    return list(dict.fromkeys(place for group in groups for place in (group, *group.parents)))


def _value(path: Path, name: str) -> int | None:
    words = next((line.split() for line in _lines(path) if line.split()[:1] == [name]), None)
    return int(words[1]) if words else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _words(group: Path, *names: str) -> list[str]:
    return [word for name in names for line in _lines(group / name) for word in line.split()]
