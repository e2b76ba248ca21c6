"""`sglang-warmstart doctor` as an operator runs it: a process, its exit status, and what it prints."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sglang_warmstart
from kit.environment import child_environment
from kit.fork_server import ForkServer
from kit.release import installed_release
from kit.toolchain import toolchain

COMMAND = str(Path(sysconfig.get_path("scripts"), "sglang-warmstart"))
FEATURES = ["fast-warmup", "hc-prenorm", "mhc-prewarm", "pp-parallel-warmup", "attn-tp-gather", "build-ahead"]
FEATURES += ["exact-warmup", "bundle-restore", "jit-monitor", "start-up-events"]
SWITCHES = [
    "SGLANG_WARMSTART",
    "SGLANG_WARMSTART_ONLY",
    "SGLANG_WARMSTART_STRICT",
    "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
    "SGLANG_JIT_DEEPGEMM_FAST_WARMUP",
    "SGLANG_ENABLE_JIT_DEEPGEMM",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE",
    "SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS",
    "SGLANG_WARMSTART_COMPILER",
    "SGLANG_WARMSTART_SHARED_CACHE",
    "SGLANG_WARMSTART_BUILD_AHEAD",
    "SGLANG_WARMSTART_BUNDLE",
    "SGLANG_WARMSTART_BUNDLE_KEY",
    "SGLANG_WARMSTART_JIT_MONITOR",
    "SGLANG_PLUGINS",
]


@dataclass(frozen=True)
class Visit:
    status: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` printed. Anything else on standard output is an error here."""
        report: dict[str, Any] = json.loads(self.out)
        return report

    @property
    def states(self) -> dict[str, str]:
        return {each["name"]: each["state"] for each in self.report["features"]}


MAIN = "from sglang_warmstart.cli import main; main()"


def run(*command: str, **environment: str | None) -> Visit:
    """Run with no switch set but those of `environment`."""
    done = subprocess.run(
        command,
        env=child_environment({**dict.fromkeys(SWITCHES), "COLUMNS": "100", **environment}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Visit(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def doctor(forks: ForkServer) -> Callable[..., Visit]:
    """The command in a process that has imported SGLang: `first` is run before it."""

    def visit(*arguments: str, first: str = "", **environment: str | None) -> Visit:
        variables = {**dict.fromkeys(SWITCHES), "COLUMNS": "100", **environment}
        done = forks.run(f"{first}\n{MAIN}", "doctor", *arguments, environment=variables)
        return Visit(done.status, done.out, done.err)

    return visit


@pytest.fixture(scope="module")
def healthy() -> Visit:
    return run(COMMAND, "doctor", "--json")


def test_it_can_work_beside_a_release_that_it_knows(healthy: Visit) -> None:
    assert healthy.status == 0, healthy.err
    assert healthy.report["ok"] is True
    assert healthy.report["problems"] == []
    assert list(healthy.states) == FEATURES


def test_it_says_what_is_installed_here(healthy: Visit) -> None:
    found = {each["name"]: each["version"] for each in healthy.report["found"]}
    assert found["sglang"] == installed_release().version
    assert found["torch"] is not None
    assert {"deep_gemm", "flashinfer", "GPU", "CUDA compiler"} <= set(found)
    assert healthy.report["warmstart"] == sglang_warmstart.__version__
    assert healthy.report["python"] == sys.version.split()[0]


def test_a_library_that_cannot_be_watched_makes_the_monitor_work_partly(doctor: Callable[..., Visit]) -> None:
    visit = doctor("--json", first="import triton; del type(triton.knobs.compilation).listener")
    (monitor,) = [each for each in visit.report["features"] if each["name"] == "jit-monitor"]
    expected = "the JIT monitor does not watch triton: triton.knobs.compilation.listener: not there"
    assert (monitor["state"], monitor["detail"]) == ("partly", expected)


def test_it_shows_every_switch_with_its_value_and_default(healthy: Visit) -> None:
    switches = {each["name"]: each for each in healthy.report["switches"]}
    assert list(switches) == SWITCHES
    assert {each["value"] for each in switches.values()} == {None}
    assert switches["SGLANG_WARMSTART"]["default"] == "1"
    assert switches["SGLANG_WARMSTART_STRICT"]["default"] == "0"
    assert switches["SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS"]["default"] == "", "SGLang's own default is nobody's wish"
    assert switches["SGLANG_WARMSTART_COMPILER"]["default"] == "nvcc"


def test_without_a_gpu_it_says_that_there_is_nothing_to_warm(healthy: Visit) -> None:
    assert any("no CUDA GPU" in note for note in healthy.report["notes"])


@pytest.mark.parametrize("columns", ["100", "40"])
def test_in_words_it_says_the_same_at_any_width(healthy: Visit, doctor: Callable[..., Visit], columns: str) -> None:
    visit = doctor(COLUMNS=columns)
    assert visit.status == 0
    for feature, state in healthy.states.items():
        assert any(feature in line and state.split()[0] in line for line in visit.out.splitlines())
    words = "".join(visit.out.split())
    assert [switch for switch in SWITCHES if switch not in words] == [], "each can be copied"
    assert "The plugin can do its work here." in visit.out
    assert installed_release().version in visit.out
    assert max(map(len, visit.out.splitlines())) <= int(columns)


def test_square_brackets_in_a_value_are_shown_as_they_are(doctor: Callable[..., Visit]) -> None:
    visit = doctor(SGLANG_WARMSTART_BUNDLE="/a/[bold]b[/bold]/[/]c", DG_JIT_NVCC_COMPILER="/no/[red]such[/red]")
    assert visit.status == 0, visit.err
    assert "/a/[bold]b[/bold]/[/]c" in visit.out
    assert "/no/[red]such[/red]" in visit.out


# A GPU as torch shows one: of it the doctor asks no more.
HOPPER = """
import types, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132
)
"""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "is not there"),
        ("exit 3", "exit status 3"),
        ('echo "fatal error: cuda_runtime.h: No such file or directory"; exit 1', "cuda_runtime.h: No such file"),
    ],
    ids=["no compiler", "one that fails", "one without headers"],
)
def test_on_a_gpu_host_a_compiler_that_cannot_compile_is_a_problem(
    script: str | None, why: str, doctor: Callable[..., Visit], tmp_path: Path
) -> None:
    compiler = tmp_path / "nvcc"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'release 13.0, V13.0.88' && exit\n{script}\n")
        compiler.chmod(0o755)
    visit = doctor("--json", first=HOPPER, DG_JIT_NVCC_COMPILER=str(compiler))
    assert visit.status == 1
    (problem,) = visit.report["problems"]
    assert problem.startswith("DeepGEMM cannot compile kernels here: ") and why in problem


def test_on_a_gpu_host_the_real_compiler_will_do(doctor: Callable[..., Visit]) -> None:
    visit = doctor("--json", first=HOPPER, CUDA_HOME=str(toolchain().cuda_home))
    assert (visit.status, visit.report["problems"]) == (0, [])


def test_switched_off_it_cannot_work(doctor: Callable[..., Visit]) -> None:
    visit = doctor("--json", SGLANG_WARMSTART="0", SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP="1")
    assert visit.status == 1
    assert visit.report["ok"] is False
    assert visit.report["problems"] == ["SGLANG_WARMSTART=0: the plugin is switched off"]
    assert visit.states == dict.fromkeys(FEATURES, "off")
    visit = doctor(SGLANG_WARMSTART="0")
    assert visit.status == 1
    assert visit.out.rstrip().endswith("The plugin cannot do its work here.")
    assert "problem: SGLANG_WARMSTART=0" in visit.out


def test_a_plugin_list_without_us_is_a_problem_that_names_the_switches_it_makes_idle(
    doctor: Callable[..., Visit],
) -> None:
    visit = doctor(
        "--json",
        SGLANG_PLUGINS="other",
        SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP="1",
        SGLANG_JIT_DEEPGEMM_FAST_WARMUP="1",
        SGLANG_WARMSTART_STRICT="1",
        SGLANG_WARMSTART_COMPILER="nvrtc",
        SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS="3",
    )
    assert visit.status == 1
    (problem,) = visit.report["problems"]
    assert problem.startswith("SGLANG_PLUGINS=other leaves this plugin out.")
    assert "Add `warmstart`" in problem
    idle = problem.split("without effect:")[1]
    # From 0.5.13 on the first of them is built in; the second is SGLang's own on all.
    assert ("SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP" in idle) != installed_release().since("0.5.13")
    assert "SGLANG_WARMSTART_STRICT" in idle
    assert "SGLANG_WARMSTART_COMPILER" in idle
    assert "SGLANG_JIT_DEEPGEMM_FAST_WARMUP" not in idle
    assert "SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS" not in idle


def test_a_plugin_list_with_us_is_fine(doctor: Callable[..., Visit]) -> None:
    visit = doctor("--json", SGLANG_PLUGINS="warmstart,other", SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP="1")
    assert visit.status == 0
    assert visit.report["problems"] == []


def test_unknown_words_in_switches_are_named_and_no_reason_to_fail(doctor: Callable[..., Visit]) -> None:
    # A path is not a word, and so is no list.
    switches = [
        name for name in SWITCHES if "BUNDLE" not in name and name not in ("SGLANG_PLUGINS", "SGLANG_WARMSTART_ONLY")
    ]
    visit = doctor("--json", **dict.fromkeys(switches, "maybe"))
    assert visit.status == 0
    for switch in switches:
        assert len([note for note in visit.report["notes"] if f'{switch}: "maybe"' in note]) == 1


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(doctor: Callable[..., Visit]) -> None:
    evil = "\x1b]0;title\x07\n\udcff"
    visit = doctor(SGLANG_WARMSTART_COMPILER=evil, SGLANG_WARMSTART_ONLY=f"jit-monitor,{evil}", SGLANG_PLUGINS=None)
    assert "\\x1b]0;title\\x07" in visit.out
    assert visit.out.replace("\n", "").isprintable()


def test_a_cache_that_others_can_write_is_a_problem(doctor: Callable[..., Visit], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    visit = doctor("--json", SGLANG_DG_CACHE_DIR=str(tmp_path))
    assert visit.status == 1
    (problem,) = visit.report["problems"]
    assert f"{tmp_path} can be written by every user (mode 0777)" in problem
    visit = doctor("--json", SGLANG_DG_CACHE_DIR=str(tmp_path), SGLANG_WARMSTART_SHARED_CACHE="1")
    assert (visit.status, visit.report["problems"]) == (0, [])


def test_features_that_are_left_out_are_off(doctor: Callable[..., Visit]) -> None:
    visit = doctor("--json", SGLANG_WARMSTART_ONLY="start-up-events, jit-monitor,warmth")
    assert visit.status == 0
    off = {name for name, state in visit.states.items() if state == "off"}
    assert off == {*FEATURES} - {"start-up-events", "jit-monitor"}
    (note,) = [note for note in visit.report["notes"] if "SGLANG_WARMSTART_ONLY" in note]
    assert '"warmth"' in note and "exact-warmup" in note
    visit = doctor("--json", SGLANG_WARMSTART_ONLY="warmth")
    assert set(visit.states.values()) == {"off"}, "a word that names nothing installs nothing"
    visit = doctor("--json", SGLANG_WARMSTART_ONLY="warmth", SGLANG_WARMSTART_STRICT="1")
    assert visit.status == 1 and '"warmth"' in visit.report["problems"][0]


@pytest.mark.release("0.5.12")
def test_a_feature_that_stands_aside_is_a_problem(doctor: Callable[..., Visit]) -> None:
    utils = "sglang.srt.layers.deep_gemm_wrapper.compile_utils"
    visit = doctor("--json", first=f"import {utils} as utils; del utils._BUILTIN_M_LIST")
    assert visit.status == 1
    assert visit.states == {**dict.fromkeys(FEATURES, "active"), "fast-warmup": "stands aside"}
    (problem,) = visit.report["problems"]
    assert "fast-warmup stands aside" in problem
    assert "_BUILTIN_M_LIST" in problem


@pytest.fixture(scope="module")
def site_without_sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment but SGLang and torch, as links."""
    directory = tmp_path_factory.mktemp("site")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("sglang-", "torch")) and path.name != "sglang":
            directory.joinpath(path.name).symlink_to(path)
    return directory


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_without_sglang_it_fails_with_one_line_that_says_what_to_install(
    form: tuple[str, ...], site_without_sglang: Path
) -> None:
    package = Path(sglang_warmstart.__file__).parents[1]
    visit = run(
        sys.executable,
        "-S",  # no site-packages but those of PYTHONPATH
        "-c",
        MAIN,
        "doctor",
        *form,
        PYTHONPATH=f"{package}{os.pathsep}{site_without_sglang}",
        COLUMNS="300",
    )
    assert visit.status == 1
    assert "Traceback" not in visit.out + visit.err
    assert visit.err == ""
    problem = "SGLang is not installed. Install it: pip install sglang==0.5.12"
    if form:
        assert visit.report["problems"] == [problem]
        assert visit.report["features"] == []
        assert {"name": "sglang", "version": None, "note": "not installed"} in visit.report["found"]
    else:
        assert [line for line in visit.out.splitlines() if line.startswith("problem:")] == [f"problem: {problem}"]


def test_a_torch_that_does_not_load_is_a_problem_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    broken.joinpath("__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    visit = run(COMMAND, "doctor", "--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{child_environment()['PYTHONPATH']}")
    assert visit.status == 1
    assert "Traceback" not in visit.err
    (problem,) = visit.report["problems"]
    assert "OSError: libcudart.so.13: cannot open shared object file" in problem
    assert "pip install" not in problem


def test_a_compiler_that_the_environment_names_is_the_one_that_is_looked_for(
    doctor: Callable[..., Visit], tmp_path: Path
) -> None:
    def found(**environment: str) -> dict[str, object]:
        report = doctor("--json", **environment).report
        return next(each for each in report["found"] if each["name"] == "CUDA compiler")

    assert found(CUDA_HOME=str(tmp_path))["note"] == f"CUDA_HOME={tmp_path} has no bin/nvcc"
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.41'\n")
    compiler.chmod(0o755)
    named = found(CUDA_HOME=str(tmp_path), DG_JIT_NVCC_COMPILER=str(compiler))
    assert (named["version"], named["note"]) == ("12.9.41", str(compiler))


def test_the_version_is_printed() -> None:
    visit = run(COMMAND, "--version")
    assert (visit.status, visit.out) == (0, f"sglang-warmstart {sglang_warmstart.__version__}\n")
