"""The service on a cache whose file system refuses locks, or never answers: NFS with a lock manager that is gone."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.node import Node, Place, wait_until
from kit.standin_library import definition
from sglang_warmstart.deepgemm.target import Target

# What the service's processes call in place of the C library's function, for the files of our locks.
FLOCK = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int flock(int fd, int operation) {
  char link[64], path[4096] = {0};
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, "warmstart/locks")) {
    if (!strcmp(getenv("FLOCK"), "hang")) for (;;) pause();
    errno = ENOLCK;
    return -1;
  }
  return syscall(SYS_flock, fd, operation);
}
"""
TARGET = Target(
    kernel_type="GEMM_NT_F8F8BF16", n=256, k=256, num_groups=1, num_sms=132, m_max=8, lhs_scale="k", rhs_scale="k"
)


@pytest.fixture(scope="module")
def flock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("flock")
    (directory / "flock.c").write_text(FLOCK)
    library = directory / "flock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, directory / "flock.c"], check=True)
    return library


@pytest.fixture(params=["refuse", "hang"])
def node(request: pytest.FixtureRequest, flock: Path, tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, LD_PRELOAD=str(flock), FLOCK=request.param) as node:
        yield node


def test_it_compiles_marks_and_hears_its_ranks_all_the_same(node: Node, tmp_path: Path) -> None:
    place = Place(tmp_path)
    rank = place.rank(node)
    rank.announce([TARGET], 1 << 40)
    assert wait_until(lambda: place.nvcc.runs)  # the stub's: the work has begun
    start = time.monotonic()
    place.rank(node)
    assert time.monotonic() - start < 2, "it answers while a lock hangs"
    (warmed,) = rank.warm([TARGET], 1 << 40, 60).targets
    assert not warmed.error and place.cache.has(definition(TARGET)[0].directory)
    assert list(place.cache.own.glob("markers/*/*.json"))
    assert "the same work twice" in node.log
