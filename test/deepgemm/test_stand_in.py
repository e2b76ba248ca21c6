"""The sweep with a compiler that only records, against a stand-in for DeepGEMM that runs it as DeepGEMM does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.standin_library import FLAGS, LINE_INFO, VERSION, Jit, Kernel
from sglang_warmstart.deepgemm.digest import directory_of, signature_of
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel, RecordingCompiler, RecordingError

STUB = b"the stub of this GPU"
SMALL, LARGE, TRANSPOSE = (Kernel("gemm", f"// {what}\n") for what in ("small", "large", "transpose"))


class Recording:
    """A recording compiler and a DeepGEMM that has been told of it, as in the process that records."""

    def __init__(self, directory: Path, **environment: str) -> None:
        directory.mkdir(parents=True)
        (directory / "stub").write_bytes(STUB)
        own = directory / "own"
        own.mkdir()
        self.environment = environment
        self.compiler = RecordingCompiler(own)
        self.compiler.install(self.environment, version=VERSION, stub=directory / "stub")
        self.jit = Jit(self.environment)

    @property
    def command(self) -> str:
        return self.environment["DG_JIT_NVCC_COMPILER"]

    def kernels(self, kernels_of: Callable[[int], list[Kernel]], m_values: range) -> list[RecordedKernel]:
        def call(m: int) -> None:
            for kernel in kernels_of(m):
                self.jit.build(kernel)

        return list(self.compiler.sweep(call, m_values))


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "recording")


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([command, *arguments], capture_output=True, text=True)


@settings(max_examples=25, deadline=None)
@given(choices=st.lists(st.sets(st.integers(0, 4), max_size=2), max_size=40), start=st.integers(1, 9))
def test_a_sweep_finds_every_kernel_with_the_smallest_m_that_needs_it(
    tmp_path_factory: pytest.TempPathFactory, choices: list[set[int]], start: int
) -> None:
    # Whatever DeepGEMM's heuristics do: an M may need no kernel, or two, and a kernel may come back for a larger M.
    m_values = range(start, start + 3 * len(choices), 3)
    needed = {
        m: [Kernel("gemm", f"// {each}\n") for each in choice] for m, choice in zip(m_values, choices, strict=True)
    }
    found = Recording(tmp_path_factory.mktemp("sweep") / "recording").kernels(needed.__getitem__, m_values)
    assert {(each.directory, each.m) for each in found} == {
        (kernel.directory, min(m for m in m_values if kernel in needed[m]))
        for kernels in needed.values()
        for kernel in kernels
    }
    assert len(found) == len({each.directory for each in found})
    assert [each.m for each in found] == sorted(each.m for each in found)


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_source_is_kept_byte_by_byte(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    kernel = Kernel("gemm", source)
    (found,) = Recording(tmp_path_factory.mktemp("source") / "recording").kernels(lambda _: [kernel], range(1, 2))
    assert found.source.encode() == source.encode()


@pytest.mark.parametrize(("line_info", "flags"), [("0", FLAGS), ("1", FLAGS + LINE_INFO)])
def test_flags_and_source_are_what_deep_gemm_made_its_digest_of(tmp_path: Path, line_info: str, flags: str) -> None:
    recording = Recording(tmp_path / "recording", DG_JIT_WITH_LINEINFO=line_info)
    (found,) = recording.kernels(lambda _: [SMALL], range(1, 2))
    assert found.flags == flags
    assert found.directory == directory_of("gemm", signature_of(VERSION), found.flags, found.source)


def test_two_kernels_of_one_m_are_both_found(recording: Recording) -> None:
    found = recording.kernels(lambda m: [TRANSPOSE, SMALL if m < 3 else LARGE], range(1, 5))
    assert {(each.source, each.m) for each in found} == {(TRANSPOSE.source, 1), (SMALL.source, 1), (LARGE.source, 3)}


def test_a_kernel_is_handed_on_before_the_next_m_is_tried(recording: Recording) -> None:
    tried: list[int] = []

    def call(m: int) -> None:
        tried.append(m)
        recording.jit.build(LARGE if m == 3 else SMALL)

    assert [(each.m, tried[-1]) for each in recording.compiler.sweep(call, range(1, 9))] == [(1, 1), (3, 3)]
    assert tried == list(range(1, 9))


def test_the_stub_lies_in_a_private_cache_and_nothing_in_the_real_one(tmp_path: Path) -> None:
    real = tmp_path / "real cache"
    recording = Recording(tmp_path / "recording", DG_JIT_CACHE_DIR=str(real), DG_JIT_NVCC_COMPILER="/opt/real/nvcc")
    (found,) = recording.kernels(lambda _: [SMALL], range(1, 2))
    assert (recording.compiler.cache / "cache" / found.directory / "kernel.cubin").read_bytes() == STUB
    assert not real.exists()


def test_nothing_is_left_on_that_would_go_around_the_recording_compiler_or_look_into_a_stub(tmp_path: Path) -> None:
    dumps = {"DG_JIT_DUMP_ASM": "1", "DG_JIT_DUMP_PTX": "1", "DG_JIT_DUMP_SASS": "1"}
    recording = Recording(tmp_path / "recording", DG_JIT_USE_NVRTC="1", **dumps)
    assert recording.environment["DG_JIT_USE_NVRTC"] == "0"
    assert not dumps.keys() & recording.environment.keys()


def test_the_command_says_the_version_of_the_real_compiler(recording: Recording) -> None:
    assert run(recording.command, "--version").stdout == VERSION


@pytest.mark.parametrize(
    "arguments",
    [
        ["-cubin", "kernel.cu", "-o", "kernel.cubin", "-O3"],
        ["kernel.cu", "-ptx", "-o", "kernel.ptx", "-O3"],
        ["kernel.cu", "-cubin", "-o", "kernel.cubin"],  # no flags: no architecture
        [],
    ],
)
def test_the_command_refuses_what_it_does_not_understand(recording: Recording, arguments: list[str]) -> None:
    ended = run(recording.command, *arguments)
    assert ended.returncode == 64
    expected = "the recording compiler expected SOURCE -cubin -o CUBIN FLAGS"
    assert ended.stderr == f"{expected}, got: {' '.join(arguments)}\n"


def test_the_command_fails_where_it_cannot_write(recording: Recording, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "kernel.cubin"
    ended = run(recording.command, "kernel.cu", "-cubin", "-o", str(missing), "-O3")
    assert ended.returncode != 0
    assert str(missing) in ended.stderr


def test_the_command_works_in_a_directory_with_any_name(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "it's $HOME; a `name`")
    ended = run(recording.command, "kernel.cu", "-cubin", "-o", str(tmp_path / "kernel.cubin"), "-O3")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "kernel.cubin").read_bytes() == STUB


def test_a_call_that_raises_ends_the_sweep(recording: Recording) -> None:
    def call(m: int) -> None:
        raise ValueError(f"no M like {m}")

    with pytest.raises(ValueError, match="no M like 1"):
        list(recording.compiler.sweep(call, range(1, 9)))


def test_a_compiler_run_that_leaves_no_kernel_is_reported(recording: Recording) -> None:
    def call(m: int) -> None:
        run(recording.command, "kernel.cu", "-cubin", "-o", str(recording.compiler.directory / "elsewhere"), "-O3")

    with pytest.raises(RecordingError, match="M=5: the compiler ran 1 times, 0 kernels came into the cache"):
        list(recording.compiler.sweep(call, range(5, 9)))


def test_a_cache_that_is_laid_out_otherwise_is_reported(recording: Recording) -> None:
    def call(m: int) -> None:
        recording.jit.build(SMALL)
        for source in recording.compiler.cache.glob("cache/*/kernel.cu"):
            source.rename(source.with_name("source.cu"))

    with pytest.raises(RecordingError, match=rf"M=1: {SMALL.directory}: .*kernel\.cu"):
        list(recording.compiler.sweep(call, range(1, 9)))
