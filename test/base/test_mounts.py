"""Which mount a path belongs to, by the kernel's own account."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from sglang_warmstart.base.mounts import mount_of


@pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())
def test_it_is_the_innermost_mount_and_the_last_one_there(tmp_path: Path) -> None:
    outer, inner = tmp_path / "a place", tmp_path / "a place" / "below"
    inner.mkdir(parents=True)
    setup = (
        f"mount -t tmpfs none '{outer}'; mkdir '{inner}'; mount -t ramfs none '{inner}'; mount -t tmpfs none '{inner}'"
    )
    code = "import sys; from pathlib import Path; from sglang_warmstart.base.mounts import mount_of\n"
    code += "for each in sys.argv[1:]: print(mount_of(Path(each)))"
    said = run_python(code, str(outer / "x" / "y"), str(inner), str(inner / "x"), prefix=in_mount_namespace(setup))
    assert said.splitlines() == [f"{outer}, tmpfs", f"{inner}, tmpfs", f"{inner}, tmpfs"]


def test_it_is_what_findmnt_says(tmp_path: Path) -> None:
    try:
        said = subprocess.run(["findmnt", "-n", "-o", "TARGET,FSTYPE", "-T", tmp_path], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("findmnt is not there")
    assert mount_of(tmp_path).split(", ") == said.stdout.split()


@pytest.mark.parametrize("content", ["", "nonsense\n", "1 2 3:4 / /tmp - \n", "1 2 3:4 / - nfs a b\n"])
def test_where_the_kernel_does_not_say_it_is_not_known(content: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(content)
    assert mount_of(tmp_path, mounts) == "a file system that is not known"
    assert mount_of(tmp_path, tmp_path / "missing") == "a file system that is not known"
