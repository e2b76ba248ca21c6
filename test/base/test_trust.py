"""A directory that others can write is refused where what is in it is run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kit.bad_files import BadFiles
from kit.confined import run_python
from sglang_warmstart.base.runs import new_run, runs_of
from sglang_warmstart.base.trust import UntrustedError, check, check_caches

SWITCH = "SGLANG_WARMSTART_SHARED_CACHE"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache" / "warmstart" / "markers").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o2770])
def test_what_the_owner_and_the_group_can_write_is_trusted(cache: Path, mode: int) -> None:
    cache.chmod(mode)
    check_caches([cache], {})


@pytest.mark.parametrize("part", ["", "warmstart", "warmstart/markers"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o703])
def test_what_everybody_can_write_is_refused_in_one_line_that_says_what_to_do(
    cache: Path, part: str, mode: int
) -> None:
    (cache / part).chmod(mode)
    with pytest.raises(UntrustedError) as refusal:
        check_caches([cache], {})
    assert str(refusal.value) == (
        f"{cache / part} can be written by every user (mode {mode:04o}), and kernels are code: chmod o-w it, "
        f"or set {SWITCH}=1"
    )
    check_caches([cache], {SWITCH: "1"})
    (cache / part).chmod(0o755)
    check_caches([cache], {})


@needs_root
def test_what_another_user_owns_is_refused(cache: Path) -> None:
    os.chown(cache / "warmstart", 12345, -1)
    with pytest.raises(UntrustedError, match="warmstart belongs to user 12345, this is user 0"):
        check_caches([cache], {})
    check_caches([cache], {SWITCH: "1"})


SQUASHED = """
import ctypes, sys
from pathlib import Path
from sglang_warmstart.base.trust import check_caches
ctypes.CDLL(None).setfsuid(12345)  # for file systems, this process is another user from here on
check_caches([Path(sys.argv[1])], {})
"""


@needs_root
def test_where_a_file_system_takes_us_for_the_owner_it_is_ours_as_under_root_squash() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        os.chown(directory, 12345, -1)
        run_python(SQUASHED, directory)
        with pytest.raises(UntrustedError, match="belongs to user 12345, this is user 0"):
            check_caches([Path(directory)], {})
        assert not list(Path(directory).iterdir())


@needs_root
def test_what_root_owns_is_trusted_by_every_user_and_what_a_third_one_owns_is_not() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        os.seteuid(12345)
        try:
            check([Path(directory)], {})
            os.seteuid(0)
            os.chown(directory, 23456, -1)
            os.seteuid(12345)
            with pytest.raises(UntrustedError, match="belongs to user 23456, this is user 12345"):
                check([Path(directory)], {})
        finally:
            os.seteuid(0)


def test_what_is_not_there_is_trusted_and_a_name_that_is_no_path_is_not_looked_at(tmp_path: Path) -> None:
    check_caches([tmp_path / "new", Path("a\0b"), tmp_path / ("x" * 5000)], {})


def test_a_link_counts_by_where_it_leads(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    cache.chmod(0o777)
    with pytest.raises(UntrustedError):
        check_caches([tmp_path / "link"], {})


def test_the_directory_of_nvrtcs_cache_can_be_replaced_by_whoever_writes_the_one_above(cache: Path) -> None:
    cache.chmod(0o777)
    with pytest.raises(UntrustedError):
        check_caches([cache / "nvrtc"], {})


def test_the_events_of_a_run_go_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.chmod(0o777)
    directory, problem = new_run(cache)
    assert problem is not None
    assert problem.startswith(f"{cache} can be written by every user (mode 0777)")
    assert directory.is_dir()
    assert cache not in directory.parents
    assert not runs_of(cache).exists()
    monkeypatch.setenv(SWITCH, "1")
    assert new_run(cache)[0].parent == runs_of(cache)


def test_whose_a_cache_is_is_found_out_also_where_files_without_a_name_are_not_had(cache: Path, tmp_path: Path) -> None:
    bad = BadFiles(tmp_path)
    rule = bad.refuse(("tmpfile",), cache, errno.EOPNOTSUPP)
    code = (
        "import os; from pathlib import Path; from sglang_warmstart.base.trust import _is_ours; "
        f"print(_is_ours(Path({str(cache)!r}), os.geteuid()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **bad.environment}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert rule.fired
    assert list(cache.iterdir()) == [cache / "warmstart"], "nothing is left"
