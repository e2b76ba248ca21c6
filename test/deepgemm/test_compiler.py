"""The compiler is found where DeepGEMM finds it, and whatever it does, one run of it ends with a cubin or with its own
words."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kit.confined import run_python
from kit.recorded import real_cubin, recording
from kit.scripted_compiler import ScriptedCompiler, wait_until_gone, write_compiler
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import cubin, digest, nvrtc
from sglang_warmstart.deepgemm.compiler import CompileJob, Compiler, CompilerError

FLAGS = "-std=c++20 --gpu-architecture=sm_90a"


def _job(compiler: Compiler, limit_s: float = 20.0, source: str = "// no kernel\n") -> CompileJob:
    return CompileJob(source, FLAGS, compiler, limit_s)


def _error(compiler: ScriptedCompiler, limit_s: float = 20.0) -> str:
    with pytest.raises(CompilerError) as caught:
        compilers.compile_kernel(_job(compiler.compiler, limit_s))
    return str(caught.value)


# Which compiler


def _program(directory: Path, name: str = "nvcc") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho 'release 13.0, V13.0.{len(str(directory))}'\n")
    path.chmod(0o700)
    return path


def test_deep_gemms_own_variable_goes_before_cuda_home_and_that_before_the_path(tmp_path: Path) -> None:
    named, in_home, on_path = (_program(tmp_path / place) for place in ("named", "home/bin", "path"))
    environment = {"PATH": str(on_path.parent)}
    assert compilers.find_path(environment) == str(on_path)
    environment["CUDA_PATH"] = str(tmp_path / "home")
    assert compilers.find_path(environment) == str(in_home)
    environment |= {"CUDA_PATH": "/nowhere", "CUDA_HOME": str(tmp_path / "home")}
    assert compilers.find_path(environment) == str(in_home)
    environment["DG_JIT_NVCC_COMPILER"] = str(named)
    assert compilers.find_path(environment) == str(named)


def test_a_compiler_that_is_not_where_it_is_named_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    path = {"PATH": str(_program(tmp_path / "path").parent)}
    with pytest.raises(CompilerError, match="DG_JIT_NVCC_COMPILER=/nowhere/nvcc is not there"):
        compilers.find_path(path | {"DG_JIT_NVCC_COMPILER": "/nowhere/nvcc"})
    with pytest.raises(CompilerError, match="CUDA_HOME=/nowhere has no bin/nvcc"):
        compilers.find_path(path | {"CUDA_HOME": "/nowhere"})


def test_without_a_word_it_is_where_cuda_usually_is_or_nowhere() -> None:
    usual = Path("/usr/local/cuda/bin/nvcc")
    if usual.exists():
        assert compilers.find_path({"PATH": "/nowhere"}) == str(usual)
    else:
        with pytest.raises(CompilerError, match="no nvcc on the PATH, and CUDA_HOME is not set"):
            compilers.find_path({"PATH": "/nowhere"})


def test_the_compiler_at_hand_says_its_release() -> None:
    found = toolchain().compiler()
    assert found.path == str(toolchain().nvcc)
    assert found.release == "13.0.88"
    assert found.version.strip() == recording().compiler


def test_a_compiler_that_fails_to_say_its_version_is_not_used(tmp_path: Path) -> None:
    path = _program(tmp_path)
    path.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(CompilerError, match=r"nvcc.*exit status 3"):
        compilers.find({"DG_JIT_NVCC_COMPILER": str(path)})


def test_the_version_of_nvrtc_tells_two_compilers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"DG_JIT_NVCC_COMPILER": str(_program(tmp_path))}
    nvcc = compilers.find(environment)
    monkeypatch.setattr(nvrtc, "version", lambda: "NVRTC 12.9")
    found = compilers.find(environment, "nvrtc")
    assert found.version == f"{nvcc.version}NVRTC 12.9\n"
    assert found.release == nvcc.release
    assert digest.signature_of(found.version) == digest.signature_of(nvcc.version) == "NVCC13.0"


def test_a_release_that_is_not_printed_is_unknown() -> None:
    assert Compiler("/bin/nvcc", "release 13").release == "unknown"


# One run of it


def test_it_is_called_as_deep_gemm_calls_it(tmp_path: Path) -> None:
    seen = shlex.quote(str(tmp_path / "seen"))
    compiler = write_compiler(
        tmp_path, f'{{ echo "$*"; pwd; }} > {seen}; cp "$source" {seen}.cu; echo cubin > "$cubin"'
    )
    source = "// as it is: \r\n\tno newline at the end, ä"
    assert compilers.compile_kernel(_job(compiler.compiler, source=source)) == b"cubin\n"

    words, directory = (tmp_path / "seen").read_text().splitlines()
    given, cubin_flag, output_flag, output, *flags = words.split()
    assert (cubin_flag, output_flag, flags) == ("-cubin", "-o", FLAGS.split())
    assert Path(given).parent == Path(output).parent == Path(directory)
    assert (tmp_path / "seen.cu").read_bytes().decode() == source
    assert not Path(directory).exists()


def test_it_reads_nothing_of_what_the_server_is_told(tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, f'cat > {shlex.quote(str(tmp_path / "seen"))}; echo cubin > "$cubin"')
    code = """
import sys
from sglang_warmstart.deepgemm.compiler import CompileJob, Compiler, compile_kernel
compile_kernel(CompileJob("", "", Compiler(sys.argv[1], ""), 20))
"""
    run_python(code, compiler.compiler.path, prefix=("sh", "-c", 'echo for the server | "$@"', "sh"))
    assert (tmp_path / "seen").read_text() == ""


def test_it_runs_behind_the_server(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    compiler = write_compiler(tmp_path, f'sleep 0.3; nice > {shlex.quote(str(seen))}; echo cubin > "$cubin"')
    compilers.compile_kernel(_job(compiler.compiler))
    assert int(seen.read_text()) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


def test_a_kernel_compiles_for_real() -> None:
    # By this very function, with the flags and the source that DeepGEMM gave.
    assert cubin.defect_of(real_cubin()) is None
    assert b"transpose_fp32" in real_cubin()


def test_a_source_that_does_not_compile_fails_with_the_compilers_own_words() -> None:
    with pytest.raises(CompilerError, match=r'exit status [1-9](?s:.*)identifier "no_such_thing" is undefined'):
        compilers.compile_kernel(_job(toolchain().compiler(), source="__global__ void k() { no_such_thing(); }\n"))


def test_a_compiler_that_fails_without_a_word(tmp_path: Path) -> None:
    assert _error(write_compiler(tmp_path, "(exit 3)")).endswith("nvcc: exit status 3: it said nothing")


def test_words_on_both_streams_are_kept_but_not_without_end(tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, "echo one; echo two >&2; head -c 100000 /dev/zero | tr '\\0' x; (exit 1)")
    error = _error(compiler)
    assert "exit status 1: one\ntwo\nxxx" in error
    assert error.endswith("xxx ...")
    assert len(error) < 5000


def test_a_compiler_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    # nvcc is a driver: what hangs is a grandchild.
    child = shlex.quote(str(tmp_path / "child"))
    compiler = write_compiler(tmp_path, f"sh -c 'sleep 300 & echo $! > {child}; wait' & wait")
    begun = time.monotonic()
    assert _error(compiler, limit_s=0.5).endswith("nvcc was ended after 0.5 s")
    assert time.monotonic() - begun < 5
    assert wait_until_gone([*compiler.starts, int((tmp_path / "child").read_text())]) == []


def test_a_compiler_that_is_killed_says_by_which_signal(tmp_path: Path) -> None:
    # What the kernel does where memory is short.
    assert "nvcc: SIGKILL: it said nothing" in _error(write_compiler(tmp_path, "kill -KILL $$"))


def test_a_compiler_that_leaves_nothing(tmp_path: Path) -> None:
    assert _error(write_compiler(tmp_path, "echo done")).endswith("nvcc: it left no cubin")


def test_a_compiler_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match="No such file or directory"):
        compilers.compile_kernel(_job(Compiler(str(tmp_path / "nvcc"), recording().compiler)))


def test_no_scratch_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for body, limit_s in (("echo . > $cubin", 20.0), ("(exit 1)", 20.0), ("sleep 300", 0.2)):
        compiler = write_compiler(tmp_path, body)
        try:
            compilers.compile_kernel(_job(compiler.compiler, limit_s))
        except CompilerError as error:
            assert "exit status 1" in str(error) or "was ended" in str(error)
        assert list(scratch.iterdir()) == []


# In a process of its own, since it is for one that ends.
_END_ALL_RUNS = """
import sys, threading, time
from sglang_warmstart.deepgemm import compiler as compilers
job = compilers.CompileJob("", "", compilers.Compiler(sys.argv[1], ""), 60)
said = []
def run():
    try:
        compilers.compile_kernel(job)
    except compilers.CompilerError as error:
        said.append(str(error))
thread = threading.Thread(target=run)
thread.start()
sys.stdin.readline()
compilers.end_all_runs()
thread.join()
run()
print(*said, sep="\\n")
"""


def test_all_runs_of_a_process_can_be_ended_and_none_begins_after_that(tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path, "sleep 300")
    command = [sys.executable, "-c", _END_ALL_RUNS, compiler.compiler.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            compiler.wait_for_start()
            said, _ = process.communicate("\n", timeout=20)
        finally:
            process.kill()
    running, late = said.splitlines()
    assert signal.SIGKILL.name in running
    assert signal.SIGKILL.name in late
    assert wait_until_gone(compiler.starts) == []
    assert process.returncode == os.EX_OK
