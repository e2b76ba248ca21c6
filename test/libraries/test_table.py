"""The table of JIT libraries: where each has its cache, what a bundle takes of it, and what its key hangs on.

That the libraries themselves find what is restored: test/soak/libraries.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from kit.confined import run_python
from kit.restored_cache import write
from sglang_warmstart.libraries import collect as collecting
from sglang_warmstart.libraries.cached import LibraryCache
from sglang_warmstart.libraries.collect import collect
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.table import LIBRARIES, parse_include

HOME = {"HOME": "/home/somebody", "PATH": "/nowhere"}
THEN = 1_700_000_000_000_000_000


def _paths(cache: LibraryCache) -> list[str]:
    return [file.path for file in cache.files]


# The table


def test_libraries_are_asked_for_by_name() -> None:
    assert [library.name for library in parse_include(" tilelang,triton, triton ")] == ["triton", "tilelang"]
    everything = ["triton", "flashinfer", "tilelang", "tvm-ffi", "sglang-jit", "cute-dsl", "inductor"]
    assert [library.name for library in parse_include("triton,all")] == everything


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("triton,tritn", "tritn"), ("deep-gemm", "deep-gemm"), ("", ""), (" ", ""), (",", ""), ("triton,", "")],
)
def test_any_other_name_is_an_error_that_names_those_that_are(text: str, wrong: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_include(text)
    assert str(raised.value) == (
        f"no library {wrong!r}: choose among triton, flashinfer, tilelang, tvm-ffi, sglang-jit, cute-dsl, inductor, "
        "with commas, or all"
    )


def test_none_of_the_libraries_is_imported() -> None:
    code = """
import os, sys
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.libraries.collect import collect
for library in LIBRARIES.values():
    library.mismatch(collect(library, os.environ).cache.key, os.environ)
print(sorted({"torch", "triton", "tilelang", "tvm", "tvm_ffi", "flashinfer", "sglang", "deep_gemm"} & set(sys.modules)))
"""
    assert run_python(code, environment={"HOME": "/nowhere"}) == "[]\n"


def test_files_for_deep_gemms_cache_are_refused_whatever_a_bundle_says() -> None:
    library = LIBRARIES["deep-gemm"]
    assert library.mismatch(library.key(HOME), HOME) == "a bundle does not carry its cache as files"


# Where they lie

HERE = Path.cwd()
_ROOTS: list[tuple[str, dict[str, str], Path | None]] = [
    ("deep-gemm", {}, Path("/home/somebody/.deep_gemm")),
    ("deep-gemm", {"DG_JIT_CACHE_DIR": "/c"}, Path("/c")),
    ("deep-gemm", {"DG_JIT_CACHE_DIR": ""}, Path("/home/somebody/.deep_gemm")),
    ("triton", {}, Path("/home/somebody/.triton/cache")),
    ("triton", {"HOME": ""}, Path("/.triton/cache")),
    ("triton", {"TRITON_HOME": "/t"}, Path("/t/.triton/cache")),
    ("triton", {"TRITON_HOME": ""}, HERE / ".triton/cache"),
    ("triton", {"TRITON_HOME": "/t", "TRITON_CACHE_DIR": "/c"}, Path("/c")),
    ("triton", {"TRITON_CACHE_DIR": ""}, None),
    ("tilelang", {}, Path("/home/somebody/.tilelang/cache")),
    ("tilelang", {"TILELANG_CACHE_DIR": "/c"}, Path("/c")),
    ("tilelang", {"TILELANG_CACHE_DIR": ""}, None),
    ("tvm-ffi", {}, Path("/home/somebody/.cache/tvm-ffi")),
    ("tvm-ffi", {"TVM_FFI_CACHE_DIR": "~/c"}, Path("/home/somebody/c")),
    ("tvm-ffi", {"TVM_FFI_CACHE_DIR": ""}, None),
    ("flashinfer", {}, Path("/home/somebody/.cache/flashinfer/0.6.11")),
    ("flashinfer", {"FLASHINFER_WORKSPACE_BASE": "/c"}, Path("/c/.cache/flashinfer/0.6.11")),
    ("flashinfer", {"FLASHINFER_WORKSPACE_BASE": ""}, HERE / ".cache/flashinfer/0.6.11"),
    ("sglang-jit", {}, Path("/home/somebody/.cache/sglang/jit")),
    ("sglang-jit", {"SGLANG_JIT_CACHE_DIR": "c"}, HERE / "c"),
    ("cute-dsl", {}, None),
    ("cute-dsl", {"SGLANG_CUTE_AOT_CACHE_DIR": ""}, None),
    ("cute-dsl", {"SGLANG_CUTE_AOT_CACHE_DIR": "~/c"}, Path("/home/somebody/c")),
    ("inductor", {"TORCHINDUCTOR_CACHE_DIR": "/c"}, Path("/c")),
    ("inductor", {"TORCHINDUCTOR_CACHE_DIR": ""}, None),
    ("inductor", {"TMPDIR": "/t", "USER": "some body:"}, Path("/t/torchinductor_some body_")),
]


@pytest.mark.parametrize(("name", "variables", "root"), _ROOTS)
def test_a_cache_lies_where_the_library_has_it(
    name: str, variables: Mapping[str, str], root: Path | None, flashinfer: Path
) -> None:
    assert LIBRARIES[name].root({**HOME, **variables}) == root


# What the libraries do where nothing names a home: two take it literally, the others fail or have none.
_HOMELESS = {
    "deep-gemm": None,
    "triton": HERE / "~/.triton/cache",
    "flashinfer": None,
    "tilelang": HERE / "~/.tilelang/cache",
    "tvm-ffi": None,
    "sglang-jit": None,
    "cute-dsl": None,
    "inductor": Path(tempfile.gettempdir()) / f"torchinductor_uid_{os.getuid()}",
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_user_without_a_home_is_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwuid(_: int) -> None:
        raise KeyError("not found")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    library, environment = LIBRARIES[name], {"PATH": "/nowhere"}
    assert library.root(environment) == _HOMELESS[name]
    assert collect(library, environment).cache.files == ()
    if library.root(environment) is None and library.is_installed:
        assert library.mismatch(library.key(environment), environment) is not None


_ASK = {
    "triton": "from triton import knobs; print(repr(knobs.cache.dir))",
    "tilelang": "from tilelang import env; print(repr(env.TILELANG_CACHE_DIR))",
    "inductor": "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(repr(cache_dir()))",
}
_TRITONS: list[dict[str, str]] = [
    {"TRITON_CACHE_DIR": "/c"},
    {"TRITON_CACHE_DIR": ""},
    {"TRITON_HOME": ""},
    {"HOME": ""},
]


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("triton", {}),
        *(("triton", each) for each in _TRITONS),
        ("tilelang", {}),
        *(("inductor", each) for each in ({}, {"USER": 'a "user"'}, {"TORCHINDUCTOR_CACHE_DIR": "c"})),
    ],
)
def test_the_library_itself_says_so(
    name: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A machine may name its user by any of them, and only the library's process would see it.
    nobody = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    library, environment = LIBRARIES[name], {"HOME": str(tmp_path), **nobody, **variables}
    if not library.is_installed:
        pytest.skip("it is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in a process that has asked
    said = ast.literal_eval(run_python(_ASK[name], environment=environment).splitlines()[-1])
    assert library.root(environment) == (Path(said).absolute() if said else None)


# What is taken along


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
    "sglang-jit": (
        ["sm90a/m/build-1f/deps-2e/sgl_deps.json", "sm90a/m/build-1f/deps-2e/m.so", "sm90a/m/build-1f/deps-2e/cuda.cu"],
        [
            "sm90a/m/build-1f/.lock",
            "sm90a/m/build-1f/.staging-1f2e/m.so",
            "sm90a/m/build-1f/deps-2e/cuda_0.o",
            "sm90a/m/build-1f/deps-2e/cuda_0.o.d",
            "sm90a/m/build-1f/deps-2e/.ninja_log",
        ],
    ),
    "inductor": (
        ["fxgraph/rr/frri/ddwx", "aotautograd/a7pr/yur3", "5i/c5ia.py", "triton/0/KEY/__grp__k.json"],
        ["locks/c5ia.lock", "5i/.7.139.tmp", "triton/0/KEY/tmp.pid_7_1f/k.ptx"],
    ),
    "tvm-ffi": (
        ["k_1f/.ninja_deps", "k_1f/.ninja_log", "k_1f/build.ninja", "k_1f/cuda.cu", "k_1f/cuda_0.o", "k_1f/k.so"],
        ["k_1f/lock", "k_1f/cuda_0.o.d"],
    ),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_entries_are_taken_along_and_locks_are_not(name: str, tmp_path: Path, flashinfer: Path) -> None:
    library, environment = LIBRARIES[name], {"HOME": str(tmp_path), "PATH": "", "TMPDIR": str(tmp_path)}
    if not library.is_installed:
        pytest.skip("it is not installed")
    taken, left_out = _LAYOUTS[name]
    root = library.root(environment)
    write(root, [*taken, *left_out])
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
    write(tmp_path / ".cache" / "flashinfer", ["0.6.11/90a/cached_ops/op/op.so", "not installed/x"])
    assert collect(library, {"HOME": str(tmp_path)}).cache.files == ()
    assert library.mismatch({}, {"HOME": str(tmp_path)}) == "it is not installed here"


def test_links_and_what_is_no_file_are_not_taken_along(triton: Triton, tmp_path: Path) -> None:
    root, outside = tmp_path / "cache", tmp_path / "outside"
    write(outside, ["KEY/secret"])
    write(root, ["KEY/k.json"])
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
    write(tmp_path / "elsewhere", ["KEY/k.json"])
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert _paths(collect(*triton).cache) == ["KEY/k.json"]


def test_a_path_that_no_manifest_may_have_is_left_out_with_a_note(triton: Triton, tmp_path: Path) -> None:
    deep = "/".join(["d" * 200] * 6)
    write(tmp_path / "cache", ["KEY/k.json", "KEY/a\nb"])
    (tmp_path / "cache" / "KEY" / os.fsdecode(b"\xff")).write_text("x")
    write(tmp_path / "cache", [f"{deep}/x"])
    write(tmp_path / "cache", ["KEY/old"])
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
    write(tmp_path / "cache", ["KEY/k.json", "KEY/k.ptx"])

    def vanish(path: str) -> None:
        if path.endswith("ptx"):
            (tmp_path / "cache" / path).unlink()

    monkeypatch.setattr(collecting, "defect_of", vanish)
    collected = collect(*triton)
    assert (_paths(collected.cache), collected.notes) == (["KEY/k.json"], ())


def test_what_is_being_written_is_left_out_with_a_note(
    triton: Triton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache", ["KEY/k.json", "KEY/k.so"])
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
    write(tmp_path, ["secret", "cache/KEY/k.json"])

    def replace(path: str) -> None:
        (tmp_path / "cache" / path).unlink()
        (tmp_path / "cache" / path).symlink_to(tmp_path / "secret")

    monkeypatch.setattr(collecting, "defect_of", replace)
    assert collect(*triton).cache.files == ()


# What it hangs on


def test_what_is_different_is_named(flashinfer: Path, tmp_path: Path) -> None:
    library, environment = LIBRARIES["flashinfer"], {"HOME": str(tmp_path), "PATH": ""}
    key = library.key(environment)
    assert library.mismatch(key, environment) is None
    assert library.mismatch({**key, "flashinfer": "0.6.10"}, environment) == (
        "flashinfer was '0.6.10' and is '0.6.11' here"
    )
    lacking = {name: value for name, value in key.items() if name != "ninja"}
    assert library.mismatch({**lacking, "new": "a\nb"}, environment) == (
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
