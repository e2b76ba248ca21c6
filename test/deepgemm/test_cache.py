"""A kernel in the cache is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.confined import in_mount_namespace, run_python, why_no_mounts
from kit.recorded import real_cubin
from kit.toolchain import toolchain
from sglang_warmstart.base.files import write_atomically
from sglang_warmstart.deepgemm import stub
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache
from sglang_warmstart.deepgemm.compiler import CompileJob, compile_kernel

KERNEL = "kernel.transpose_fp32.315df4091059256d9fcfa19e68621196"
SOURCE = "// a kernel\n"

needs_mounts = pytest.mark.skipif(bool(why_no_mounts()), reason=why_no_mounts())


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    """A cache whose root is not there yet."""
    return KernelCache(tmp_path / "root")


def _content(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_a_kernel_lies_where_deep_gemm_looks_for_it(cache: KernelCache) -> None:
    assert not cache.has(KERNEL)
    cache.publish(KERNEL, "// Ä\r\n", real_cubin())
    assert cache.has(KERNEL)
    assert (cache.root / "cache" / KERNEL / "kernel.cu").read_bytes() == "// Ä\r\n".encode()
    assert (cache.root / "cache" / KERNEL / "kernel.cubin").read_bytes() == real_cubin()
    # and nothing else is left
    files = {f"cache/{KERNEL}/kernel.cu", f"cache/{KERNEL}/kernel.cubin"}
    assert _content(cache.root) == {"cache", "tmp", f"cache/{KERNEL}"} | files


def test_a_kernel_is_described_by_size_and_checksum(cache: KernelCache) -> None:
    cache.publish(KERNEL, SOURCE, real_cubin())
    described = cache.describe(KERNEL)
    assert (described.directory, described.size) == (KERNEL, len(real_cubin()))
    assert described.sha256 == hashlib.sha256(real_cubin()).hexdigest()
    with pytest.raises(FileNotFoundError):
        cache.describe("kernel.b." + "0" * 32)


def test_the_kernel_that_is_there_first_stays(cache: KernelCache) -> None:
    # nvcc is not deterministic to the byte, and another process may have loaded the first one.
    cache.publish(KERNEL, SOURCE, real_cubin())
    cache.publish(KERNEL, SOURCE, real_cubin() + b"another run")
    assert (cache.path(KERNEL) / "kernel.cubin").read_bytes() == real_cubin()
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_stub_is_refused(cache: KernelCache) -> None:
    job = CompileJob(stub.SOURCE, " ".join(stub.flags_for((9, 0))), toolchain().compiler(), 60)
    with pytest.raises(CacheError, match=rf"{KERNEL}: the cubin is not published: a recorder's stub"):
        cache.publish(KERNEL, SOURCE, compile_kernel(job))
    assert not cache.root.exists()


@settings(max_examples=20)
@given(st.data())
def test_a_truncated_cubin_is_refused(data: st.DataObject) -> None:
    cache = KernelCache(Path("/nowhere"))
    length = data.draw(st.integers(0, len(real_cubin()) - 1))
    with pytest.raises(CacheError, match=r"the cubin is not published: (empty|not a 64-bit ELF file|truncated)"):
        cache.publish(KERNEL, SOURCE, real_cubin()[:length])


def test_nobody_ever_sees_half_a_kernel(cache: KernelCache) -> None:
    """Somebody looks all the time while kernels come in."""
    data = real_cubin() * 50
    kernels = [f"kernel.k.{number:032x}" for number in range(40)]

    def publish() -> None:
        for directory in kernels:
            cache.publish(directory, SOURCE, data)

    writer = threading.Thread(target=publish)
    writer.start()
    looks = 0
    while writer.is_alive():
        looks += 1
        for directory in [path.name for path in (cache.root / "cache").glob("kernel.*")]:
            assert cache.has(directory)
            assert cache.describe(directory).size == len(data)
    writer.join()
    assert looks > 1
    assert all(map(cache.has, kernels))


def test_half_a_kernel_is_completed_where_it_is(cache: KernelCache) -> None:
    cache.path(KERNEL).mkdir(parents=True)
    (cache.path(KERNEL) / "kernel.cu").write_text("half")
    cache.publish(KERNEL, SOURCE, real_cubin())
    assert cache.has(KERNEL)
    assert cache.describe(KERNEL).size == len(real_cubin())


def test_what_is_not_there_cannot_be_set_aside(cache: KernelCache) -> None:
    with pytest.raises(CacheError, match="No such file or directory"):
        cache.set_aside(KERNEL)


# A disk that is full, or cannot be written

_PUBLISH = """
import resource, sys
from pathlib import Path
from sglang_warmstart.deepgemm.cache import CacheError, KernelCache
root, kernel, cubin, limit = sys.argv[1:]
data = Path(cubin).read_bytes()
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    KernelCache(Path(root)).publish(kernel, "// a kernel", data)
    print("published")
except CacheError as error:
    print(error)
cache = KernelCache(Path(root))
print("left", sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()))
"""


def _publish_elsewhere(tmp_path: Path, *, prefix: tuple[str, ...] = (), limit: int = 0) -> list[str]:
    (tmp_path / "cubin").write_bytes(real_cubin())
    (tmp_path / "root").mkdir()
    arguments = (str(tmp_path / "root"), KERNEL, str(tmp_path / "cubin"), str(limit))
    return run_python(_PUBLISH, *arguments, prefix=prefix).splitlines()


def test_a_file_that_may_not_grow_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    said, *left = _publish_elsewhere(tmp_path, limit=len(real_cubin()) // 2)
    assert said == (
        f"the kernel cache {tmp_path}/root cannot be written (File too large): make room, or set SGLANG_DG_CACHE_DIR"
    )
    assert left == ["left []"]


@needs_mounts
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    size = len(real_cubin()) // 2
    mount = f"mount -t tmpfs -o size={size} none {shlex.quote(str(tmp_path / 'root'))}"
    said, *left = _publish_elsewhere(tmp_path, prefix=in_mount_namespace(mount))
    assert "cannot be written (No space left on device): make room, or set SGLANG_DG_CACHE_DIR" in said
    assert left == ["left []"]


@needs_mounts
def test_a_read_only_cache_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o ro none {shlex.quote(str(tmp_path / 'root'))}"
    said, *_ = _publish_elsewhere(tmp_path, prefix=in_mount_namespace(mount))
    assert "cannot be written (Read-only file system): make it writable, or set SGLANG_DG_CACHE_DIR" in said


def test_a_cache_that_cannot_be_a_directory_is_an_error_wherever_it_is_written(cache: KernelCache) -> None:
    # Permissions do not bind everybody who runs the tests; a file in the way does.
    cache.root.write_text("a file")
    for write in (
        lambda: cache.publish(KERNEL, SOURCE, real_cubin()),
        lambda: cache.take_lock(KERNEL),
        lambda: cache.set_aside(KERNEL),
    ):
        with pytest.raises(CacheError, match=rf"the kernel cache {cache.root} cannot be written .*: make it writable"):
            write()
    assert not cache.has(KERNEL)


# Locks


def test_a_lock_holds_against_another_process_and_ends_with_its_holder(cache: KernelCache) -> None:
    code = """
import sys
from pathlib import Path
from sglang_warmstart.deepgemm.cache import KernelCache
held = KernelCache(Path(sys.argv[1])).take_lock(sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, str(cache.root), KERNEL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert cache.take_lock(KERNEL) is None
        assert cache.take_lock("kernel.another." + "0" * 32) is not None  # each kernel has its own
        holder.kill()
    assert cache.take_lock(KERNEL) is not None


@pytest.mark.parametrize("kind", ["refused", "hanging"])
def test_where_nothing_can_be_locked_work_goes_on_without(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def flock(*_: object) -> None:
        if kind == "hanging":
            threading.Event().wait()
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    cache.locks.answer_s = 0.2
    begun = time.monotonic()
    assert all(cache.take_lock(KERNEL) is not None for _ in range(20))
    assert time.monotonic() - begun < 2, "a lock manager that does not answer is asked once"


# Files of the plugin's own


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_nobody_ever_reads_half_a_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([i]) * (1 << 20) for i in range(2)]
    write_atomically(path, contents[0])

    def write() -> None:
        for i in range(40):
            write_atomically(path, contents[i % 2])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert path.read_bytes() in contents
    writer.join()


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from sglang_warmstart.base.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_atomically(Path(sys.argv[1]), b"x" * 1000)
except OSError as error:
    print(error.strerror)
"""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert run_python(code, str(path)) == "File too large\n"
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
