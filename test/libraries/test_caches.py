"""Caches of other libraries: what is taken along, and that the libraries find it again where it is restored."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from kit.confined import run_python
from kit.toolchain import toolchain
from sglang_warmstart.bundle.entries import Published, publish
from sglang_warmstart.libraries import caches as libraries
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.libraries.caches import LIBRARIES, Library, collect, mismatch, parse_include

HOME = {"HOME": "/home/somebody", "PATH": "/nowhere"}
THEN = 1_700_000_000_000_000_000

needs_ninja = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")), reason="ninja or a C++ compiler is not there"
)


def _installed(name: str, distribution: str) -> pytest.MarkDecorator:
    try:
        version(distribution)
        missing = find_spec(name) is None
    except PackageNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


def _write(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def _paths(cache: LibraryCache) -> list[str]:
    return [file.path for file in cache.files]


# Names


def test_libraries_are_asked_for_by_name() -> None:
    names = [library.name for library in parse_include(" tilelang,triton, triton ")]
    assert names == ["triton", "tilelang"]
    assert parse_include("all") == parse_include("triton,all") == tuple(LIBRARIES.values())
    assert list(LIBRARIES) == ["triton", "flashinfer", "tilelang", "tvm-ffi"]


def test_a_name_that_is_not_known_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ValueError) as raised:
        parse_include("triton,tritn")
    assert str(raised.value) == (
        "no library 'tritn': choose among triton, flashinfer, tilelang, tvm-ffi, with commas, or all"
    )


@pytest.mark.parametrize("text", ["", " ", ",", "triton,"])
def test_no_name_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no library ''"):
        parse_include(text)


def test_none_of_the_libraries_is_imported() -> None:
    code = """
import os, sys
from sglang_warmstart.libraries.caches import LIBRARIES, collect, mismatch
for library in LIBRARIES.values():
    collected = collect(library, os.environ)
    mismatch(library, collected.cache.key, os.environ)
print(sorted({"torch", "triton", "tilelang", "tvm", "tvm_ffi", "flashinfer", "sglang", "deep_gemm"} & set(sys.modules)))
"""
    assert run_python(code, environment={"HOME": "/nowhere"}) == "[]\n"


# Where they lie

_ROOTS: list[tuple[str, dict[str, str], str]] = [
    ("triton", {}, "/home/somebody/.triton/cache"),
    ("triton", {"TRITON_HOME": "/t"}, "/t/.triton/cache"),
    ("triton", {"TRITON_HOME": "/t", "TRITON_CACHE_DIR": "/c"}, "/c"),
    ("tilelang", {}, "/home/somebody/.tilelang/cache"),
    ("tilelang", {"TILELANG_CACHE_DIR": "/c"}, "/c"),
    ("tvm-ffi", {}, "/home/somebody/.cache/tvm-ffi"),
    ("tvm-ffi", {"TVM_FFI_CACHE_DIR": "~/c"}, "/home/somebody/c"),
    ("flashinfer", {}, "/home/somebody/.cache/flashinfer/0.6.11"),
    ("flashinfer", {"FLASHINFER_WORKSPACE_BASE": "/c"}, "/c/.cache/flashinfer/0.6.11"),
]


@pytest.mark.parametrize(("name", "variables", "root"), _ROOTS)
def test_a_cache_lies_where_the_library_has_it(
    name: str, variables: Mapping[str, str], root: str, flashinfer: Path
) -> None:
    assert LIBRARIES[name].root({**HOME, **variables}) == Path(root)


_ASK = {
    "triton": "from triton import knobs; print(knobs.cache.dir)",
    "tilelang": "from tilelang import env; print(env.TILELANG_CACHE_DIR)",
}


@pytest.mark.parametrize("name", _ASK)
@pytest.mark.parametrize("moved", [False, True])
def test_the_library_itself_says_so(name: str, moved: bool, tmp_path: Path) -> None:
    library = LIBRARIES[name]
    if not library.is_installed:
        pytest.skip("it is not installed")
    environment = {"HOME": str(tmp_path)} | ({f"{name.upper()}_CACHE_DIR": str(tmp_path / "moved")} if moved else {})
    said = run_python(_ASK[name], environment=environment).splitlines()[-1]
    assert str(library.root(environment)) == said


# What is taken along


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FlashInfer 0.6.11 of which there is nothing but its place and two headers."""
    site = tmp_path / "site"
    _write(site, ["flashinfer/__init__.py", "flashinfer/data/include/a.h", "flashinfer/data/csrc/b.cu"])
    (site / "flashinfer_python-0.6.11.dist-info").mkdir()
    (site / "flashinfer_python-0.6.11.dist-info" / "METADATA").write_text("Name: flashinfer-python\nVersion: 0.6.11\n")
    (site / "flashinfer" / "__init__.py").write_text("raise AssertionError('it is imported')")
    monkeypatch.syspath_prepend(site)
    return site / "flashinfer"


# As the libraries leave them: what is taken along, and what is not.
_LAYOUTS: dict[str, tuple[list[str], list[str]]] = {
    "triton": (
        ["KEY/__grp__k.json", "KEY/k.cubin", "KEY/k.json", "SO/cuda_utils.cpython-311-x86_64-linux-gnu.so"],
        ["KEY/tmp.pid_7_1f/k.ptx", "KEY/lock", "KEY/k.json.tmp.pid_7_1f", ".warmstart-" + "0" * 32 + "/e/k.cubin"],
    ),
    "tilelang": (
        [
            "autotuner/HASH/best_config.json",
            "HASH/device_kernel.cu",
            "HASH/executable.so",
            "HASH/host_kernel.cu",
            "HASH/params.pkl",
        ],
        ["tmp/7_1f.so", "py-cache/main.1f.py", "sparse_compressor/0.1.8/compress_lib.so"],
    ),
    "flashinfer": (
        [
            "90a/cached_ops/op/.ninja_deps",
            "90a/cached_ops/op/.ninja_log",
            "90a/cached_ops/op/build.ninja",
            "90a/cached_ops/op/op.cuda.o",
            "90a/cached_ops/op/op.so",
            "90a/generated/op/op.cu",
        ],
        [
            "90a/flashinfer_jit.log",
            "90a/cached_ops/tmp/op.lock",
            "90a/cached_ops/tmp/flashinfer_jit.ninja",
            "90a/cached_ops/op/op.cuda.o.d",
            "90a/cached_ops/op/.ninja_log.recompact",
        ],
    ),
    "tvm-ffi": (
        ["k_1f/.ninja_deps", "k_1f/.ninja_log", "k_1f/build.ninja", "k_1f/cuda.cu", "k_1f/cuda_0.o", "k_1f/k.so"],
        ["k_1f/lock", "k_1f/cuda_0.o.d"],
    ),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_entries_are_taken_along_and_locks_are_not(name: str, tmp_path: Path, flashinfer: Path) -> None:
    library, environment = LIBRARIES[name], {"HOME": str(tmp_path), "PATH": ""}
    if not library.is_installed:
        pytest.skip("it is not installed")
    taken, left_out = _LAYOUTS[name]
    root = library.root(environment)
    _write(root, [*taken, *left_out])
    for path in taken:
        os.utime(root / path, ns=(THEN, THEN + len(path)))
    collected = collect(library, environment)
    assert (collected.cache.library, collected.notes) == (name, ())
    assert collected.cache.key == library.key(environment)
    assert _paths(collected.cache) == sorted(taken)
    for file in collected.cache.files:
        assert file.sha256 == hashlib.sha256(file.path.encode()).hexdigest()
        assert file.mtime_ns == THEN + len(file.path)
        assert collected.contents[file.sha256] == root / file.path


@pytest.fixture
def triton(tmp_path: Path) -> tuple[Library, dict[str, str]]:
    """Triton, and an environment in which its cache is `cache`."""
    if not LIBRARIES["triton"].is_installed:
        pytest.skip("it is not installed")
    return LIBRARIES["triton"], {"TRITON_CACHE_DIR": str(tmp_path / "cache")}


Triton = tuple[Library, dict[str, str]]


def test_no_cache_is_no_error(triton: Triton, tmp_path: Path) -> None:
    collected = collect(*triton)
    assert (collected.cache.files, collected.contents, collected.notes) == ((), {}, ())
    (tmp_path / "cache").write_text("a file")
    collected = collect(*triton)
    assert collected.cache.files == ()
    assert collected.notes == (f"'{tmp_path}/cache' is left out: Not a directory",)


def test_a_library_that_is_not_installed_has_none(tmp_path: Path) -> None:
    library = LIBRARIES["flashinfer"]
    if library.is_installed:
        pytest.skip("it is installed")
    _write(tmp_path / ".cache" / "flashinfer", ["0.6.11/90a/cached_ops/op/op.so", "not installed/x"])
    assert collect(library, {"HOME": str(tmp_path)}).cache.files == ()
    assert mismatch(library, {}, {"HOME": str(tmp_path)}) == "it is not installed here"


def test_links_and_what_is_no_file_are_not_taken_along(triton: Triton, tmp_path: Path) -> None:
    root, outside = tmp_path / "cache", tmp_path / "outside"
    _write(outside, ["KEY/secret"])
    _write(root, ["KEY/k.json"])
    (root / "KEY" / "link").symlink_to(outside / "KEY" / "secret")
    (root / "LINKED").symlink_to(outside / "KEY")
    os.mkfifo(root / "KEY" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(root)  # the path of a socket may not be long
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
        assert _paths(collect(*triton).cache) == ["KEY/k.json"]


def test_the_root_may_be_a_link(triton: Triton, tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere", ["KEY/k.json"])
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert _paths(collect(*triton).cache) == ["KEY/k.json"]


def test_a_path_that_no_manifest_may_have_is_left_out_with_a_note(triton: Triton, tmp_path: Path) -> None:
    deep = "/".join(["d" * 200] * 6)
    _write(tmp_path / "cache", ["KEY/k.json", "KEY/a\nb"])
    (tmp_path / "cache" / "KEY" / os.fsdecode(b"\xff")).write_text("x")
    _write(tmp_path / "cache", [f"{deep}/x"])
    _write(tmp_path / "cache", ["KEY/old"])
    os.utime(tmp_path / "cache" / "KEY" / "old", (0, -1))
    collected = collect(*triton)
    assert _paths(collected.cache) == ["KEY/k.json"]
    assert collected.notes == (
        "triton: 'KEY/a\\nb' is left out: not printable",
        "triton: 'KEY/old' is left out: changed at -1000000000 ns",
        "triton: 'KEY/\\udcff' is left out: not printable",
        f"triton: '{deep}/x' is left out: empty, or too long",
    )


def test_what_vanishes_meanwhile_was_not_there(triton: Triton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "cache", ["KEY/k.json", "KEY/k.ptx"])

    def vanish(path: str) -> None:
        if path.endswith("ptx"):
            (tmp_path / "cache" / path).unlink()

    monkeypatch.setattr(libraries, "defect_of", vanish)
    collected = collect(*triton)
    assert (_paths(collected.cache), collected.notes) == (["KEY/k.json"], ())


def test_what_is_being_written_is_left_out_with_a_note(
    triton: Triton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "cache", ["KEY/k.json", "KEY/k.so"])
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "k.so":
            with (tmp_path / "cache" / "KEY" / "k.so").open("a") as file:
                file.write("more")
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    collected = collect(*triton)
    assert _paths(collected.cache) == ["KEY/k.json"]
    assert collected.notes == ("triton: 'KEY/k.so' is left out: it is being written",)


def test_what_a_link_has_replaced_meanwhile_is_not_followed(
    triton: Triton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, ["secret", "cache/KEY/k.json"])

    def replace(path: str) -> None:
        (tmp_path / "cache" / path).unlink()
        (tmp_path / "cache" / path).symlink_to(tmp_path / "secret")

    monkeypatch.setattr(libraries, "defect_of", replace)
    assert collect(*triton).cache.files == ()


# What it hangs on


def test_what_is_different_is_named(flashinfer: Path, tmp_path: Path) -> None:
    library, environment = LIBRARIES["flashinfer"], {"HOME": str(tmp_path), "PATH": ""}
    key = library.key(environment)
    assert mismatch(library, key, environment) is None
    assert mismatch(library, {**key, "flashinfer": "0.6.10"}, environment) == (
        "flashinfer was '0.6.10' and is '0.6.11' here"
    )
    lacking = {name: value for name, value in key.items() if name != "ninja"}
    assert mismatch(library, {**lacking, "new": "a\nb"}, environment) == (
        "ninja was 'not known' and is 'not there' here; new was 'a\\nb' and is 'not known' here"
    )


def _moved(name: str, environment: dict[str, str], flashinfer: Path, tmp_path: Path) -> None:
    headers, cuda = flashinfer / "data" / "include" / "a.h", tmp_path / "cuda"
    match name:
        case "headers":
            os.utime(headers, (time.time() + 10,) * 2)
        case "place":
            shutil.copytree(flashinfer.parent, tmp_path / "other")
            sys.path.insert(0, str(tmp_path / "other"))
        case "cache":
            environment["FLASHINFER_WORKSPACE_BASE"] = str(tmp_path / "base")
        case "switch":
            environment["FLASHINFER_NVCC_THREADS"] = "4"
        case "cuda":
            shutil.copytree(cuda, tmp_path / "cuda2", copy_function=shutil.copy2)
            environment["CUDA_HOME"] = str(tmp_path / "cuda2")
        case "cuda version":
            (cuda / "version.json").write_text('{"cuda": {"version": "13.0.1"}}')
        case "cuda headers":
            os.utime(cuda / "include" / "cuda.h", (1, 1))
        case "compiler":
            environment["CXX"] = "clang++"


_MOVES = {
    "headers": ["flashinfer's headers"],
    "place": ["flashinfer's place"],
    "cache": ["cache"],
    "switch": ["switches"],
    "cuda": ["CUDA_HOME"],
    "cuda version": ["CUDA"],
    "cuda headers": ["CUDA's headers"],
    "compiler": ["CXX"],
}


@pytest.mark.parametrize("move", _MOVES)
def test_what_flashinfer_would_compile_again_for_is_in_its_key(
    move: str, flashinfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda.h").write_text("#pragma once\n#define CUDA_VERSION 13000\n")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path / "cuda")}
    before = LIBRARIES["flashinfer"].key(environment)
    assert before["CUDA"] == "13000"
    _moved(move, environment, flashinfer, tmp_path)
    after = LIBRARIES["flashinfer"].key(environment)
    assert [name for name in before if before[name] != after.get(name)] == _MOVES[move]


def test_a_header_that_lost_its_fraction_of_a_second_is_the_same(flashinfer: Path, tmp_path: Path) -> None:
    # Layers of container images keep whole seconds.
    environment, headers = {"HOME": str(tmp_path), "PATH": ""}, flashinfer / "data" / "include" / "a.h"
    os.utime(headers, ns=(THEN * 2 + 5, THEN * 2 + 5))
    before = LIBRARIES["flashinfer"].key(environment)
    os.utime(headers, ns=(THEN * 2, THEN * 2))
    assert LIBRARIES["flashinfer"].key(environment) == before


# With the libraries themselves


def _restore(library: Library, environment: Mapping[str, str], place: Path, root: Path) -> None:
    """Take a cache along, have it vanish, and put it where another root is."""
    collected = collect(library, environment)
    assert collected.notes == ()
    contents = place / "contents"
    contents.mkdir()
    for sha256, path in collected.contents.items():
        (contents / sha256).write_bytes(path.read_bytes())
    library.root(environment).rename(place / "the cache that was")
    files = collected.cache.files
    assert publish(root, files, contents) == Published(len(files), 0)
    assert files


_TRITON = """
import sys
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) * 2)

said = []
knobs.compilation.listener = lambda **told: said.append(told["cache_hit"])
source = ASTSource(fn=kernel, signature={"x": "*fp32", "n": "constexpr"}, constexprs={"n": 128})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(said, len(compiled.asm["cubin"]))
"""


@_installed("triton", "triton")
@pytest.mark.parametrize("moved", [False, True])
def test_triton_finds_what_is_restored_where_it_was(moved: bool, tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(_TRITON)

    def compile_in(root: Path) -> list[str]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(root)}
        command = [sys.executable, str(tmp_path / "kernel.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    root = tmp_path / "cache"
    new, size = compile_in(root)
    assert new == "[False]"
    library, environment = LIBRARIES["triton"], {"TRITON_CACHE_DIR": str(root)}
    key, after = library.key(environment), tmp_path / "moved" if moved else root
    _restore(library, environment, tmp_path, after)
    assert any(path.name.startswith("__grp__") for path in after.rglob("*"))

    # Its `__grp__` files have absolute paths.
    difference = f"cache was '{root}' and is '{after}' here" if moved else None
    assert mismatch(library, key, {"TRITON_CACHE_DIR": str(after)}) == difference
    assert compile_in(after) == ["[False]" if moved else "[True]", size]


_TILELANG = """
import sys
import tilelang
import tilelang.language as T
from tvm.target import Target

@T.prim_func
def main(a: T.Tensor((1024,), "float32"), b: T.Tensor((1024,), "float32")):
    with T.Kernel(8, threads=128) as block:
        for i in T.Parallel(128):
            b[block * 128 + i] = a[block * 128 + i] + 1.0

target = Target({"kind": "cuda", "arch": "sm_90"})
kernel = tilelang.compile(main, target=target, execution_backend="tvm_ffi", verbose=True)
"""


@_installed("tilelang", "tilelang")
def test_tilelang_finds_what_is_restored_anywhere(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(_TILELANG)

    def compile_in(root: Path, cuda_home: Path) -> bool:
        environment = {
            **os.environ,
            "TILELANG_CACHE_DIR": str(root),
            "CUDA_HOME": str(cuda_home),
            "PATH": f"{cuda_home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        command = [sys.executable, str(tmp_path / "kernel.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert ("begins to compile" in said) != ("Found kernel in disk cache" in said)
        return "Found kernel in disk cache" in said

    assert not compile_in(tmp_path / "cache", toolchain().cuda_home)
    library, environment = LIBRARIES["tilelang"], {"TILELANG_CACHE_DIR": str(tmp_path / "cache"), **HOME}
    key, moved = library.key(environment), {"TILELANG_CACHE_DIR": str(tmp_path / "moved"), **HOME}
    _restore(library, environment, tmp_path, tmp_path / "moved")
    assert mismatch(library, key, moved) is None
    # There is no compiler there.
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o755)
    assert compile_in(tmp_path / "moved", tmp_path / "cuda")


_TVM_FFI = """
from tvm_ffi.cpp import load_inline
print(load_inline("k", cpp_sources="int add(int x) { return x + 1; }", functions="add").add(1))
"""


@needs_ninja
@_installed("tvm_ffi", "apache-tvm-ffi")
@pytest.mark.parametrize("moved", [False, True])
def test_tvm_ffi_finds_what_is_restored_where_it_was(moved: bool, tmp_path: Path) -> None:
    # A compiler that says when it is called.
    wrapper = tmp_path / "bin" / "c++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/calls"\nexec "{shutil.which("c++")}" "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"

    def calls_in(root: Path) -> int:
        (tmp_path / "calls").write_text("")
        assert run_python(_TVM_FFI, environment={"TVM_FFI_CACHE_DIR": str(root), "PATH": path}) == "2\n"
        return len((tmp_path / "calls").read_text().splitlines())

    root = tmp_path / "cache"
    assert calls_in(root) == 2
    library, environment = LIBRARIES["tvm-ffi"], {"TVM_FFI_CACHE_DIR": str(root), "PATH": path}
    key, after = library.key(environment), tmp_path / "moved" if moved else root
    _restore(library, environment, tmp_path, after)
    difference = f"cache was '{root}' and is '{after}' here" if moved else None
    assert mismatch(library, key, {**environment, "TVM_FFI_CACHE_DIR": str(after)}) == difference
    assert calls_in(after) == (2 if moved else 0)


# FlashInfer's commands are of this form; cp stands for the compilers.
_NINJA = """
ninja_required_version = 1.3
rule cuda_compile
  command = cp $in $out && echo "$out: $in {header}" > $out.d {flag}
  depfile = $out.d
  deps = gcc
rule link
  command = cp $in $out
build {op}/op.cuda.o: cuda_compile {source}
build {op}/op.so: link {op}/op.cuda.o
default {op}/op.so
"""

_CHANGES = {
    "nothing": False,
    "build.ninja is newer": False,
    "the header is older": False,
    "the times are those of unpacking": True,
    "the header is newer": True,
    "the source is newer": True,
    "a flag is another": True,
    ".ninja_log is missing": True,
    ".ninja_deps is missing": True,
    "op.cuda.o is missing": True,
}


@needs_ninja
@pytest.mark.parametrize("change", _CHANGES)
def test_ninja_compiles_flashinfers_kernel_again_only_if(change: str, tmp_path: Path, flashinfer: Path) -> None:
    library, environment = LIBRARIES["flashinfer"], {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    root, header = library.root(environment), flashinfer / "data" / "include" / "a.h"
    op, source = root / "90a" / "cached_ops" / "op", root / "90a" / "generated" / "op" / "op.cu"
    _write(root, ["90a/generated/op/op.cu", "90a/cached_ops/op/build.ninja", "90a/cached_ops/tmp/op.lock"])
    for path in (source, header):
        os.utime(path, ns=(THEN, THEN))

    def write_ninja(flag: str = "") -> None:
        (op / "build.ninja").write_text(_NINJA.format(op=op, source=source, header=header, flag=flag))

    def compiles() -> bool:
        command = ["ninja", "-v", "-C", str(op), "-f", str(op / "build.ninja")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert ("no work to do" in said) != ("cp " in said)
        return "cp " in said

    write_ninja()
    assert compiles()
    assert not compiles()
    _restore(library, environment, tmp_path, root)
    match change:
        case "build.ninja is newer":
            os.utime(op / "build.ninja")
        case "the header is older":
            os.utime(header, (1, 1))
        case "the times are those of unpacking":
            time.sleep(0.01)
            for path in op.iterdir():
                os.utime(path)
        case "the header is newer":
            os.utime(header)
        case "the source is newer":
            os.utime(source)
        case "a flag is another":
            write_ninja("&& true")
        case _ if change.endswith(" is missing"):
            (op / change.split()[0]).unlink()
    assert compiles() is _CHANGES[change]
