"""Kernels are recorded without a GPU, by the real libraries; what they do not fit is refused in one line."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.nogpu import BLACKWELL, RELEASES, TARGETS, Recorder, call_on
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import CompileJob, compile_kernel
from sglang_warmstart.deepgemm.nogpu import build, symbols
from sglang_warmstart.deepgemm.nogpu.build import BESIDE_CPU_TORCH, BESIDE_CUDA_TORCH, StandInsError
from sglang_warmstart.deepgemm.nogpu.devices import GPUS, UnknownGpuError, gpu_of
from sglang_warmstart.deepgemm.nogpu.host import KNOWN, PLACE, known_at
from sglang_warmstart.deepgemm.nogpu.symbols import SymbolsError
from sglang_warmstart.deepgemm.record.child import RecordingProblem
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import Target

DENSE, CONTIGUOUS, MASKED, PRENORM = TARGETS
ALL = pytest.mark.parametrize("version", RELEASES)
# One of each JIT; the soak has every release.
BOTH = pytest.mark.parametrize("version", ["0.1.7", "0.2.5"])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[RecordedKernel]]:
    """The kernels of the dense target, by release."""
    known: dict[str, list[RecordedKernel]] = {}

    def recorded(version: str) -> list[RecordedKernel]:
        if version not in known:
            known[version] = Recorder(version, tmp_path_factory.mktemp("recorder")).record(DENSE)
        return known[version]

    return recorded


# What is recorded


@ALL
def test_a_dense_gemm_has_a_kernel_per_range_of_rows_and_one_for_its_scales(
    recorded: Callable[[str], list[RecordedKernel]], version: str
) -> None:
    kernels = recorded(version)
    dialect = dialects.dialect_of(toolchain().deep_gemm_of(version))
    names = [dialect.kernel_name(kernel.directory) for kernel in kernels]
    assert names.count("transpose_fp32") == 1
    assert names.count("sm90_fp8_gemm_1d2d") == len(names) - 1 >= 8
    assert [kernel.m for kernel in kernels] == sorted(kernel.m for kernel in kernels)
    assert all("--gpu-architecture=sm_90a" in kernel.flags for kernel in kernels)


@pytest.mark.parametrize("target", [CONTIGUOUS, MASKED, PRENORM], ids=lambda target: target.kernel_type)
@BOTH
def test_every_other_kernel_type_is_recorded(tmp_path: Path, version: str, target: object) -> None:
    assert Recorder(version, tmp_path).record(target)  # type: ignore[arg-type]


@BOTH
def test_nothing_but_sms_and_capability_selects_a_kernel(
    recorded: Callable[[str], list[RecordedKernel]], version: str, tmp_path: Path
) -> None:
    recorder = Recorder(version, tmp_path, "kit.nogpu_poisoned")
    assert recorder.record(DENSE, WARMSTART_TEST_OTHER_BYTES="165") == recorded(version)


@BOTH
def test_the_number_of_sms_does(recorded: Callable[[str], list[RecordedKernel]], version: str, tmp_path: Path) -> None:
    fewer = Recorder(version, tmp_path).record(msgspec.structs.replace(DENSE, num_sms=78), gpu_of("h20"))
    assert {kernel.source for kernel in fewer} != {kernel.source for kernel in recorded(version)}


def test_another_capability_is_another_architecture(tmp_path: Path) -> None:
    target = msgspec.structs.replace(PRENORM, num_sms=148, m_max=1)
    (kernel,) = Recorder("0.2.5", tmp_path).record(target, gpu_of("b200"))
    assert "--gpu-architecture=sm_100f" in kernel.flags


# On Blackwell; the soak has every release and every GPU

B200 = gpu_of("b200")


def on_b200(tmp_path: Path, version: str, target: Target) -> list[str]:
    """The sources of the GEMMs of a target."""
    kernels = Recorder(version, tmp_path).record(msgspec.structs.replace(target, num_sms=B200.num_sms), B200)
    return [kernel.source for kernel in kernels if "gemm_" in kernel.directory]


@pytest.mark.parametrize("name", ["dense", "contiguous FP4", "MXFP8", "block 32", "contiguous bf16"])
def test_the_kernel_is_of_the_types_and_blocks_of_the_target(tmp_path: Path, name: str) -> None:
    target, seen = BLACKWELL[name]
    sources = on_b200(tmp_path, "0.2.5", target)
    assert sources
    for source in sources:
        assert all(each in source for each in ("&sm100_", *seen)), source


def test_scales_in_float32_are_packed_by_a_kernel(tmp_path: Path) -> None:
    # Their columns are no multiple of four rows: some are packed by torch's operators.
    target = msgspec.structs.replace(DENSE, m_max=5, num_sms=B200.num_sms, lhs_scale="tma")
    names = [each.directory.split(".")[1] for each in Recorder("0.1.7", tmp_path).record(target, B200)]
    assert {"transpose_and_pack_fp32_into_ue8m0", "pack_fp32_into_ue8m0"} <= set(names)


def test_what_needs_blackwell_is_refused_by_the_library_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(RecordingProblem, match="Assertion error") as problem:
        Recorder("0.2.5", tmp_path).record(BLACKWELL["contiguous FP4"][0], gpu_of("h200"))
    assert "\n" not in str(problem.value)


# What is recorded is what the library finds


@pytest.mark.long
def test_half_an_entry_is_completed_and_counts_from_then_on(tmp_path: Path) -> None:
    target = msgspec.structs.replace(PRENORM, m_max=1)
    (kernel,) = Recorder("0.2.5", tmp_path).record(target)
    data = compile_kernel(CompileJob(kernel.source, kernel.flags, toolchain().compiler(), 120))
    cache = KernelCache(tmp_path / "cache", dialects.DEEPJIT)
    # Before there is anything, the calls ask for a kernel.
    assert call_on(str(cache.root), "0.2.5", [target], tmp_path)
    for name in dialects.DEEPJIT.files:
        cache.publish(kernel.directory, kernel.source, data, kernel.flags)
        (cache.path(kernel.directory) / name).unlink()
        assert not cache.has(kernel.directory)
        cache.publish(kernel.directory, kernel.source, data, kernel.flags)
        assert cache.has(kernel.directory)
    entry, compiler = cache.path(kernel.directory), toolchain().compiler().version
    assert dialects.DEEPJIT.flags_of(entry, compiler, ()) == kernel.flags
    (tmp_path / "asked").unlink()
    # Of the prenorm GEMM only the ends of the range are asked for: the library has one kernel for every M.
    assert call_on(str(cache.root), "0.2.5", [msgspec.structs.replace(PRENORM, m_max=4096)], tmp_path) == []


# What is refused


def _refused(tmp_path: Path, deep_gemm: Path, **environment: str) -> str:
    with pytest.raises(RecordingProblem) as problem:
        Recorder("0.2.5", tmp_path).record(PRENORM, **{PLACE: str(deep_gemm), **environment})
    return str(problem.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "is none of the releases of sgl-deep-gemm that were tried"),
        (lambda data: data[:-1] + b"!", "is none of the releases of sgl-deep-gemm that were tried"),
        (lambda data: None, "No such file or directory: this DeepGEMM has no host library"),
    ],
    ids=["half", "another byte", "none"],
)
def test_a_library_that_is_not_known_is_not_loaded(
    tmp_path: Path, spoil: Callable[[bytes], bytes | None], reason: str
) -> None:
    deep_gemm = tmp_path / "site" / "deep_gemm"
    shutil.copytree(toolchain().deep_gemm_of("0.2.5"), deep_gemm)
    data = spoil((deep_gemm / "_C.so").read_bytes())
    (deep_gemm / "_C.so").unlink()
    if data is not None:
        (deep_gemm / "_C.so").write_bytes(data)
    said = _refused(tmp_path, deep_gemm)
    assert reason in said and "\n" not in said


def test_a_torch_that_was_not_tried_is_refused() -> None:
    deep_gemm = toolchain().deep_gemm_of("0.2.5")
    assert known_at(deep_gemm, "2.13.0+cpu").version == "0.2.5"
    with pytest.raises(StandInsError, match=r"tried without a GPU with torch 2\.13.*this is torch 2\.9\.1$"):
        known_at(deep_gemm, "2.9.1")


def test_what_the_library_asserts_is_one_line(tmp_path: Path) -> None:
    # DeepGEMM takes bf16 with an addend to cuBLASLt, by a handle of torch's.
    bf16 = msgspec.structs.replace(
        DENSE, kernel_type="GEMM_NT_BF16BF16F32", lhs_scale="", rhs_scale="", out_dtype="int8"
    )
    with pytest.raises(RecordingProblem) as problem:
        Recorder("0.2.5", tmp_path).record(bf16)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere", "CC": ""}, "needs a C compiler once, and cc is not there: install gcc, or set CC"),
        ({"CC": "/nowhere/cc"}, "CC=/nowhere/cc is not there"),
        ({"CC": "false"}, "false cannot compile the stand-ins"),
    ],
    ids=["none", "named and not there", "fails"],
)
def test_without_a_c_compiler_it_is_said(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    with pytest.raises(StandInsError) as error:
        build.build(BESIDE_CPU_TORCH, {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"], **environment})
    assert reason in str(error.value)
    assert not list((tmp_path / "sglang-warmstart" / "nogpu").glob("[0-9a-f]*"))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StandInsError, match="make it writable, or set XDG_CACHE_HOME"):
        build.build(BESIDE_CPU_TORCH, {"XDG_CACHE_HOME": str(tmp_path / "file"), "PATH": os.environ["PATH"]})


def test_stand_ins_that_others_could_have_put_there_are_not_loaded(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    place = tmp_path / "sglang-warmstart" / "nogpu"
    place.mkdir(parents=True)
    place.chmod(0o777)
    with pytest.raises(StandInsError, match="nogpu can be written by every user"):
        build.build(BESIDE_CPU_TORCH, environment)
    assert not list(place.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of stand-ins, empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("stand_ins", [BESIDE_CPU_TORCH, BESIDE_CUDA_TORCH], ids=["CPU", "CUDA"])
def test_they_are_compiled_once(built: Path, stand_ins: tuple[build.StandIn, ...]) -> None:
    environment = {"XDG_CACHE_HOME": str(built), "PATH": os.environ["PATH"]}
    directory = build.build(stand_ins, environment)
    assert {each.file for each in stand_ins} <= {path.name for path in directory.iterdir()}
    assert build.build(stand_ins, {**environment, "PATH": "/nowhere"}) == directory


# Symbols


@ALL
def test_every_symbol_of_cuda_that_a_release_asks_for_has_a_stand_in(version: str, built: Path) -> None:
    directory = build.build(BESIDE_CPU_TORCH, {"XDG_CACHE_HOME": str(built), "PATH": os.environ["PATH"]})
    asked = symbols.undefined(toolchain().deep_gemm_of(version) / "_C.so")
    assert {"cudaGetDeviceProperties", "cublasLtMatmul"} <= asked
    offered = set().union(*(symbols.defined(directory / each.file) for each in BESIDE_CPU_TORCH))
    assert asked <= offered


def test_what_is_no_library_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no library")
    with pytest.raises(SymbolsError, match="is no shared library"):
        symbols.undefined(path)
    with pytest.raises(SymbolsError, match="No such file"):
        symbols.undefined(tmp_path / "nothing")


@given(length=st.integers(5, 1 << 16), place=st.integers(16, 4096), value=st.binary(min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_damaged_library_is_said_and_crashes_nothing(length: int, place: int, value: bytes) -> None:
    data = bytearray(_SMALL[: min(length, len(_SMALL))])
    data[place : place + len(value)] = value
    path = Path(os.environ["HOME"]) / "damaged.so"
    path.write_bytes(bytes(data))
    try:
        symbols.undefined(path)
    except SymbolsError as error:
        assert "\n" not in str(error)


# An ELF header whose table of sections is at its end: all that the reader looks at.
_SMALL = b"\x7fELF\x02".ljust(40, b"\0") + struct.pack("<Q", 64) + bytes(10) + struct.pack("<HH", 64, 3) + bytes(4096)


# GPUs


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_had_by_its_name_and_with_another_number_of_sms(name: str) -> None:
    gpu, fewer = gpu_of(name), gpu_of(f" {name.upper()}:{96}")
    assert gpu.num_sms == GPUS[name][1]
    assert (fewer.num_sms, fewer.name, fewer.capability) == (96, gpu.name, gpu.capability)


@pytest.mark.parametrize("word", ["", "h101", "b200:", "b200:0", "b200:-1", "b200:12345", "b200:x", "h200:132:1"])
def test_another_word_is_refused_with_those_that_there_are(word: str) -> None:
    with pytest.raises(UnknownGpuError) as error:
        gpu_of(word)
    assert "h200" in str(error.value) or "from 1 to 9999" in str(error.value)


def test_the_known_releases_have_names_of_their_own() -> None:
    versions = [known.version for known in KNOWN.values()]
    assert len(set(versions)) == len(versions)
    assert set(RELEASES) <= set(versions)
