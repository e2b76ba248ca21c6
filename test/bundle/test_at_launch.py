"""A bundle is restored beside a server that starts; whatever is wrong with it, that is one line and no more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from kit.bad_files import CHANGES, LOST, WRITES, BadFiles
from kit.bundles import Bundle, bundle_of, cubin
from kit.environment import python_path
from kit.installed import install
from kit.node import wait_until
from kit.plans import LAUNCH, identity_in, real_plan
from kit.toolchain import toolchain
from sglang_warmstart.bundle.start import start
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.marker import Markers

BUNDLE = "SGLANG_WARMSTART_BUNDLE"


def bundle() -> Bundle:
    plan = real_plan()
    return bundle_of(plan, (cubin(name.encode()) for name in plan.kernels))


class Server:
    """What of a server matters here: its Python path, its environment and its cache.

    Args:
        directory: of its own.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = KernelCache(directory / "cache")
        self.deep_gemm = install(directory / "site-packages")
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        monkeypatch.syspath_prepend(self.deep_gemm.parent)
        monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
        monkeypatch.setenv("TMPDIR", str(self.temporary))
        monkeypatch.setattr("tempfile.tempdir", None)
        importlib.invalidate_caches()

    def restore(self, place: object, key: Path | None = None) -> Path:
        """Begin to; returns the lock."""
        return start(str(place), str(key) if key else None, self.cache.root, {})

    @property
    def is_marked(self) -> bool:
        """Whether a server that starts now finds all that it needs."""
        return Markers(self.cache, identity_in(self.deep_gemm)).load(LAUNCH) is not None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def is_over(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def line_of(capfd: pytest.CaptureFixture[str]) -> str:
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_kernels_and_marker_are_there_when_the_lock_is_free(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle().archive())
    lock = server.restore(path)
    assert wait_until(lambda: is_over(lock), 30)
    assert server.is_marked
    assert f"warmstart bundle: {path}: 2 kernels restored: 1 targets of 1 ranks in " in line_of(capfd)
    assert wait_until(lambda: list(server.temporary.iterdir()) == [])


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one, as openssl makes them."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def test_with_a_key_one_that_it_has_signed_is_restored_and_no_other(
    server: Server, tmp_path: Path, keys: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from sglang_warmstart.bundle import manifest as manifests
    from sglang_warmstart.bundle.signature import PrivateKey

    path, whole = tmp_path / "bundle.tar.zst", bundle()
    path.write_bytes(whole.archive())
    lock = server.restore(path, keys[1])
    assert wait_until(lambda: is_over(lock), 30)
    assert "the bundle is not restored: " in line_of(capfd)
    assert not server.cache.root.exists()
    path.write_bytes(whole.archive(PrivateKey.load(keys[0]).sign(manifests.encode(whole.manifest))))
    lock = server.restore(path, keys[1])
    assert wait_until(lambda: is_over(lock), 30)
    assert server.is_marked


def test_a_cache_that_others_can_write_is_left_as_it_is(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle().archive())
    server.cache.root.mkdir()
    server.cache.root.chmod(0o777)
    lock = server.restore(path)
    assert wait_until(lambda: is_over(lock), 30)
    said = f"the bundle is not restored: {path}: {server.cache.root} can be written by every user (mode 0777), "
    assert said in line_of(capfd)
    assert list(server.cache.root.iterdir()) == []


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_another_deep_gemm(path: Path) -> None:
    plan = msgspec.structs.replace(real_plan(), build="0" * 64)
    path.write_bytes(bundle_of(plan, []).archive())


def no_bundle(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged, "cut off"),
        (of_another_deep_gemm, "for another DeepGEMM"),
        (no_bundle, "not a bundle"),
        (Path.unlink, "No such file"),
        (lambda path: path.chmod(0o644), ""),
    ],
    ids=["damaged", "another", "none", "gone", "good"],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    spoil: object, reason: str, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle().archive())
    spoil(path)  # type: ignore[operator]
    lock = server.restore(path)
    assert wait_until(lambda: is_over(lock), 30)
    line = line_of(capfd)
    assert server.is_marked == (not reason)
    if reason:
        assert "the bundle is not restored: " in line and reason in line and line.count(str(path)) == 1
        assert not server.cache.root.exists()


@pytest.mark.parametrize("first", [1, 12, 25])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE], ids=errno.errorcode.get)
def test_a_cache_that_fails_in_the_middle_is_one_line(
    number: int, first: int, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, bad = tmp_path / "bundle.tar.zst", BadFiles(tmp_path)
    path.write_bytes(bundle().archive())
    rule = bad.refuse(
        {errno.ENOSPC: WRITES, errno.EROFS: CHANGES, errno.ESTALE: LOST}[number], server.cache.root, number, first=first
    )
    lock = start(str(path), None, server.cache.root, bad.environment)
    assert wait_until(lambda: is_over(lock), 30)
    assert rule.fired
    line = line_of(capfd)
    assert "the bundle is not restored: " in line and os.strerror(number) in line
    assert all(cubin_path.read_bytes() for cubin_path in server.cache.root.glob("cache/*/*.cubin"))
    bad.lift_all()
    # What could not be removed stays, and harms nobody.
    lock = server.restore(path)
    assert wait_until(lambda: is_over(lock), 30)
    assert server.is_marked


def test_a_key_that_is_empty_is_no_leave_to_do_without(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle().archive())
    lock = start(str(path), "", server.cache.root, {})
    assert wait_until(lambda: is_over(lock), 30)
    assert "the bundle is not restored: " in line_of(capfd)
    assert not server.cache.root.exists()


def test_what_is_secret_in_a_url_is_neither_logged_nor_among_the_arguments(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp")
    secret = uuid.uuid4().hex
    lock = server.restore(f"http://user:{secret}@127.0.0.1:1/bundle.tar.zst?token={secret}")
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any(secret in command for command in commands)
    assert wait_until(lambda: is_over(lock), 30)
    line = line_of(capfd)
    assert "http://127.0.0.1:1/bundle.tar.zst: cannot be fetched: " in line
    assert secret not in line


def test_a_key_that_is_not_there_is_one_line(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = server.restore(tmp_path / "bundle.tar.zst", tmp_path / "no key")
    assert wait_until(lambda: is_over(lock), 30)
    assert "no key cannot be read" in line_of(capfd)


# Stores that do not answer


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes a connection and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        held: list[socket.socket] = []

        def run() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/bundle.tar.zst"
        listener.shutdown(socket.SHUT_RDWR)
        for each in held:
            each.close()


_PARENT = """
import sys
from pathlib import Path
from sglang_warmstart.bundle.start import start
print(start(sys.argv[1], None, Path(sys.argv[2]), {}), flush=True)
sys.stdin.read()
"""


def restorers(url: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "--directory" in (process.info["cmdline"] or []) and process.environ().get(BUNDLE) == url:
                found.append(process)
    return found


def test_one_whose_server_is_killed_ends_with_it(server: Server, silent: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, silent, str(server.cache.root)],
        env={"PYTHONPATH": python_path(server.deep_gemm.parent), "TMPDIR": str(server.temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        lock = Path(parent.stdout.readline().rstrip())
        assert not is_over(lock)
        assert wait_until(lambda: restorers(silent))
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not restorers(silent))
    assert not lock.parent.exists()


def test_one_that_takes_too_long_gives_up(server: Server, silent: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    code = """
import sys
from sglang_warmstart.bundle import at_launch
at_launch.LIMIT_S = 1.0
at_launch.main(sys.argv[1:])
"""
    (tmp_path / "own").mkdir()
    start = time.monotonic()
    arguments = {"cache": server.cache.root, "directory": tmp_path / "own", "parent": os.getpid()}
    done = subprocess.run(
        [sys.executable, "-c", code, *(f"--{name}={value}" for name, value in arguments.items())],
        env={"PYTHONPATH": python_path(server.deep_gemm.parent), BUNDLE: silent},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - start < 20
    assert f"the bundle is not restored: {silent}: it takes more than 1 s" in done.stderr
    assert not (tmp_path / "own").exists()
