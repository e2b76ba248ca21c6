"""`sglang-warmstart plan --gpu` as its users run it: a process, with the real library and no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from kit.environment import child_environment
from kit.nogpu import TARGETS, Recorder, call_on
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import dialects
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.marker import Markers
from sglang_warmstart.deepgemm.plan import NO_GPU, Plan

DENSE, CONTIGUOUS, MASKED, PRENORM = TARGETS
FEW = [msgspec.structs.replace(MASKED, m_max=4), msgspec.structs.replace(PRENORM, m_max=4)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from sglang_warmstart.cli import main; sys.argv[0] = 'sglang-warmstart'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=child_environment({"CUDA_HOME": str(toolchain().cuda_home), **environment}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def make(source: Path, output: Path, version: str, *options: object) -> subprocess.CompletedProcess[str]:
    return run("plan", source, "-o", output, "--deep-gemm", toolchain().deep_gemm_of(version), *options)


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    """A file with a few targets."""
    path = tmp_path / "targets.json"
    path.write_bytes(msgspec.json.encode(FEW))
    return path


def read(path: Path) -> Plan:
    return plans.decode(path.read_bytes())


@pytest.mark.parametrize("version", [pytest.param("0.1.7", marks=pytest.mark.long), "0.2.5"])
def test_targets_become_a_plan_and_that_a_cache_in_which_the_library_finds_all(
    version: str, wanted: Path, tmp_path: Path
) -> None:
    made = make(wanted, tmp_path / "plan.json", version, "--gpu", "h200")
    assert made.returncode == 0, made.stderr
    plan = read(tmp_path / "plan.json")
    (launch,) = plan.launches
    assert (plan.made, launch.gpu, launch.num_sms, launch.capability) == (NO_GPU, "NVIDIA H200", 132, (9, 0))
    assert made.stdout == f"{tmp_path / 'plan.json'}: {len(plan.kernels)} kernels, 2 targets of 1 ranks\n"
    deep_gemm, root = toolchain().deep_gemm_of(version), tmp_path / "root"
    recorder = Recorder(version, tmp_path)
    expected = {target: [kernel.directory for kernel in recorder.record(target)] for target in FEW}
    found = plan.targets_of(launch, deep_gemm / "include", plan.directories(deep_gemm / "include"))
    assert {each.target: [use.directory for use in each.kernels] for each in found} == expected

    compiled = run("compile", tmp_path / "plan.json", "-o", root, "--deep-gemm", deep_gemm)
    assert compiled.returncode == 0, compiled.stderr
    markers = Markers(KernelCache(root, plan.dialect), plan.identity_of(launch, deep_gemm, plan.compiler))
    assert all(markers.find(target) is not None for target in FEW)
    assert markers.load({"model": "a server's own"}) is None
    value = f"{tmp_path / 'writable'}:{root}" if plan.dialect is dialects.DEEPJIT else str(root)
    assert call_on(value, version, FEW, tmp_path) == []
    again = run("compile", tmp_path / "plan.json", "-o", root, "--deep-gemm", deep_gemm, "--json")
    assert (json.loads(again.stdout)["compiled"], json.loads(again.stdout)["resumed"]) == (0, len(plan.kernels))


def test_a_plan_becomes_one_for_another_gpu_and_another_deep_gemm_and_for_its_own_stays_the_same(
    tmp_path: Path,
) -> None:
    wanted, here, same, there = (tmp_path / name for name in ("targets", "here.json", "same.json", "there.json"))
    wanted.write_bytes(msgspec.json.encode(FEW[1:]))
    assert make(wanted, here, "0.1.7", "--gpu", "h200").returncode == 0
    assert make(here, same, "0.1.7").returncode == 0
    assert here.read_bytes() == same.read_bytes()
    # Its compiler is that of the plan: none has to be there.
    made = make(here, there, "0.2.5", "--gpu", "h20")
    assert made.returncode == 0, made.stderr
    (launch,) = read(there).launches
    assert (launch.gpu, launch.num_sms) == ("NVIDIA H20", 78)
    assert [each.target.num_sms for each in launch.targets] == [78]
    assert (read(there).jit, read(here).jit) == ("deepjit", "0.1")
    assert read(there).compiler == read(here).compiler


def test_what_deep_gemm_refuses_is_named_and_the_others_are_in_the_plan(tmp_path: Path) -> None:
    odd = {"kernel_type": "GEMM_NT_F8F8BF16", "n": 100, "k": 7168, "m_max": 64}
    (tmp_path / "targets.json").write_bytes(msgspec.json.encode([odd, FEW[1]]))
    made = make(tmp_path / "targets.json", tmp_path / "plan.json", "0.2.5", "--gpu", "h200")
    assert made.returncode == 1
    assert "not in the plan: <GEMM_NT_F8F8BF16> N=100 K=7168" in made.stderr
    assert [each.target for launch in read(tmp_path / "plan.json").launches for each in launch.targets] == [FEW[1]]


GOOD = {"kernel_type": "TF32_HC_PRENORM_GEMM", "n": 24, "k": 28672, "m_max": 8}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "there is no target in it"),
        ("nonsense", "not a plan: "),
        ("[1]", "not a list of targets: "),
        ('{"format": 99}', "a plan of format 99, this version reads format 1"),
        ([{**GOOD, "kernel_type": "GEMM"}], "target 1: kernel_type is 'GEMM'; there are: GEMM_NT_F8F8BF16, "),
        ([GOOD, {**GOOD, "n": 0}], "target 2: n is 0, expected 1 to "),
        ([{**GOOD, "k": -64}], "target 1: k is -64, expected 1 to "),
        ([{**GOOD, "n": 1 << 40}], "target 1: n is 1099511627776, expected 1 to "),
        ([{**GOOD, "n": "24"}], "target 1: Expected `int`, got `str` - at `$.n`"),
        ([{**GOOD, "m": 3}], "target 1: 'm' is no field of a target"),
        ([{**GOOD, "out_dtype": "int8"}], "target 1: out_dtype is 'int8', expected "),
        ([{**GOOD, "kernel_type": "GEMM_NT_F8F8BF16", "n": 100, "k": 7168}], "DeepGEMM refuses every target: <GEMM_"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(text: object, reason: str, tmp_path: Path) -> None:
    source, output = tmp_path / "targets.json", tmp_path / "plan.json"
    source.write_text(text if isinstance(text, str) else json.dumps(text))
    made = make(source, output, "0.2.5", "--gpu", "h200")
    assert made.returncode == 2
    *_, line = made.stderr.splitlines()
    assert reason in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ((), {}, "is a list of targets: say with --gpu for which GPU"),
        (("--gpu", "h101"), {}, "--gpu: there is no GPU 'h101', but h20, h100, "),
        (
            ("--gpu", "h200", "--deep-gemm", "/nowhere/deep_gemm"),
            {},
            "the JIT of the DeepGEMM in /nowhere/",
        ),
        (("--gpu", "h200", "--nvcc", "/nowhere/nvcc"), {}, "/nowhere/nvcc is not there, or is no program"),
        (("--gpu", "h200"), {"CC": "/nowhere/cc", "XDG_CACHE_HOME": "{tmp}"}, "CC=/nowhere/cc is not there"),
    ],
    ids=["no GPU", "another GPU", "no DeepGEMM", "no nvcc", "no C compiler"],
)
def test_what_is_missing_is_one_line_and_nothing_is_written(
    options: tuple[str, ...], environment: dict[str, str], reason: str, wanted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    own = () if "--deep-gemm" in options else ("--deep-gemm", str(toolchain().deep_gemm_of("0.2.5")))
    filled = {name: value.format(tmp=tmp_path / "cache") for name, value in environment.items()}
    made = run("plan", wanted, "-o", output, *own, *options, **filled)
    assert made.returncode == 2
    (line,) = made.stderr.splitlines()
    assert reason in line
    assert not output.exists()


def test_a_cache_bears_no_signature(wanted: Path, tmp_path: Path) -> None:
    assert make(wanted, tmp_path / "plan.json", "0.2.5", "--gpu", "h200").returncode == 0
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    ended = run("compile", tmp_path / "plan.json", "-o", tmp_path / "root", "--sign", key)
    assert ended.returncode == 2
    assert "a cache bears no signature" in ended.stderr


def test_the_commands_of_plans_are_still_there(tmp_path: Path) -> None:
    ended = run("plan", "show", tmp_path / "nothing.json")
    assert (ended.returncode, ended.stderr) == (2, f"{tmp_path / 'nothing.json'}: No such file or directory\n")
    assert "export" in run("plan", "--help", COLUMNS=os.environ.get("COLUMNS", "100")).stdout
