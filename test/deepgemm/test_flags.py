"""A compiler is given the options that DeepGEMM writes, and no other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest
from kit.bundles import bundle_of, cubin, recorded_plan
from kit.compile_runs import Machine
from kit.nogpu import RELEASES, TARGETS, Recorder
from kit.recorded import recording
from kit.toolchain import toolchain
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm import stub
from sglang_warmstart.deepgemm.dialects import FIRST_JIT
from sglang_warmstart.deepgemm.flags import unknown_option
from sglang_warmstart.deepgemm.plan import INCLUDE, Plan, PlanError

# What each of DeepGEMM's settings adds: as the strings are in its libraries.
SETTINGS = (
    "-std=c++20 --diag-suppress=39,161,174,177,186,940 --ptxas-options=--register-usage-level=10",
    "--ptxas-options=--verbose,--warn-on-local-memory-usage",
    "-Xcompiler -rdynamic -lineinfo",
    "-gencode=arch=compute_120f,code=sm_120f",
    "--gpu-architecture=sm_100f -O3 --compiler-options=-O3 --use_fast_math --generate-line-info",
    "--ptxas-options=--warn-on-spills --ptxas-options=--warn-on-local-memory-usage --ptxas-options=--verbose",
    "--compiler-options=-Wno-deprecated-declarations,-Wno-abi --include-path {include}",
)
# Settings of DeepGEMM that change the flags.
OF_ITS_JIT = (
    "DG_JIT_PTXAS_VERBOSE",
    "DG_JIT_PTXAS_CHECK",
    "DG_JIT_WITH_LINEINFO",
    "DG_JIT_CHECK_NO_SPILLS",
    "DG_JIT_CHECK_NO_LOCAL_MEMORY",
)
# Each of these runs a program, reads a file or writes one.
HOSTILE = (
    "-ccbin=evil",
    "-ccbin evil",
    "--compiler-bindir=evil",
    "-Xcompiler -fplugin=evil.so",
    "-Xcompiler",
    "--compiler-options=-fPIC,-wrapper,evil",
    "--compiler-options=-fplugin=evil.so",
    "--compiler-options=-Bevil",
    "--options-file=evil",
    "-optf evil",
    "-o evil",
    "--output-file=evil",
    "-time evil",
    "-include /etc/passwd",
    "--pre-include=/etc/passwd",
    "--keep-dir=evil",
    "-run",
    "-ldir evil",
    "--ptxas-options=--output-file=evil",
    "--ptxas-options=--verbose,--options-file,evil",
    "-Ievil,more",
    "-I`touch${IFS}evil`",
    '-I"',
    "-I$(evil)",
    "--include-path",
    "--include-path /a;evil",
    "another.cu",
    "@evil",
    "-std=c++20\x1b[31m",
    "--diag-suppress=1,",
)


RECORDED = sorted({kernel.flags for kernel in recording().kernels.values()})


@pytest.mark.parametrize("flags", [*RECORDED, *SETTINGS, *stub.flags_for((9, 0))])
def test_what_deepgemm_writes_is_known(flags: str) -> None:
    assert unknown_option(flags) is None
    assert unknown_option(flags, INCLUDE) is None


@pytest.mark.parametrize("version", RELEASES)
def test_what_the_libraries_write_is_known(version: str, tmp_path: Path) -> None:
    include = str(toolchain().deep_gemm_of(version) / "include")
    few = msgspec.structs.replace(TARGETS[0], m_max=1)
    for number, settings in enumerate(({}, dict.fromkeys(OF_ITS_JIT, "1"))):
        (tmp_path / str(number)).mkdir()
        kernels = Recorder(version, tmp_path / str(number)).record(few, **settings)
        assert kernels
        assert {unknown_option(kernel.flags, include) for kernel in kernels} == {None}


@pytest.mark.parametrize("option", HOSTILE)
def test_any_other_is_named(option: str) -> None:
    for flags in (option, f"-O3 {option}", f"-O3 {option} -lineinfo"):
        found = unknown_option(flags)
        assert found is not None
        assert found.split()[0] == option.split()[0]


def test_only_the_headers_of_deepgemm_are_included() -> None:
    for flags in ("-O3 -I/evil", "--include-path /evil"):
        assert unknown_option(flags) is None
        assert unknown_option(flags, "/opt/deep_gemm/include") in (flags, "-I/evil")
    assert unknown_option("-I/opt/deep_gemm/include", "/opt/deep_gemm/include") is None


@pytest.mark.parametrize(
    "option",
    [
        "-ccbin={evil}",
        "-I{place}/`{evil}/gcc`",
        "--compiler-options=-wrapper,{evil}/gcc",
        "--options-file={place}/options",
    ],
)
def test_what_is_refused_would_have_run_a_program(option: str, tmp_path: Path) -> None:
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    (evil / "gcc").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (evil / "gcc").chmod(0o755)
    (tmp_path / "options").write_text(f"-ccbin {evil}")
    (tmp_path / "kernel.cu").write_text(stub.SOURCE)
    flags = f"--gpu-architecture=sm_90 {option.format(place=tmp_path, evil=evil)}"
    assert unknown_option(flags) is not None
    command = [toolchain().nvcc, "kernel.cu", "-cubin", "-o", "kernel.cubin", *flags.split()]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert ran.exists()


def hostile(plan: Plan, option: str) -> Plan:
    """The plan with an option more, and the names that its kernels have with it."""
    flags = tuple(f"{line} {option}" for line in plan.flags)
    kernels, names = {}, {}
    for name, kernel in plan.kernels.items():
        names[name] = FIRST_JIT.directory_of(name, plan.compiler, flags[kernel.flags], kernel.source)
        kernels[names[name]] = kernel
    text = json.dumps(msgspec.to_builtins(msgspec.structs.replace(plan, flags=flags, kernels=kernels)))
    for name, other in names.items():
        text = text.replace(name, other)
    return msgspec.json.decode(text, type=Plan)


def test_a_plan_with_another_option_is_refused_in_one_line_and_no_compiler_is_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    good = plans.decode(machine.plan(2).read_bytes())
    plans.decode(plans.encode(hostile(good, "-lineinfo")))
    path = tmp_path / "plan.json"
    path.write_bytes(plans.encode(hostile(good, "-ccbin=/tmp/\x1b[31mevil")))
    with pytest.raises(PlanError, match="is no option that DeepGEMM gives"):
        plans.decode(path.read_bytes())
    ended = machine.run(path)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert f"{path}: '-ccbin=/tmp/\\x1b[31mevil' is no option" in ended.err
    assert machine.nvcc.runs == {}


def test_a_bundle_of_such_a_plan_is_refused() -> None:
    manifest = bundle_of(hostile(recorded_plan(), "-ccbin=evil"), [cubin()]).manifest
    with pytest.raises(BundleError, match="'-ccbin=evil' is no option that DeepGEMM gives to its compiler"):
        manifests.decode(manifests.encode(manifest))
