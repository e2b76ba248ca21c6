"""What DeepGEMM compiles while serving is reported or refused: with SGLang's wrapper, a real service, and a stand-in
for DeepGEMM that runs its compiler as DeepGEMM does."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from kit.delivery import Delivery, delivered
from kit.environment import child_environment, python_path
from kit.node import wait_until
from kit.recorded import recording
from kit.release import installed_release, is_patched
from kit.served_rank import ServedRank, compiled_for
from kit.standin_library import kernels_of
from kit.wrapped_gemms import DENSE, dense, target
from sglang.srt.layers.deep_gemm_wrapper import compile_utils as sglang_compile_utils
from sglang.srt.managers.scheduler import Scheduler
from sglang_warmstart.base import events
from sglang_warmstart.base.events import Event, EventLog, open_log

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

if is_patched():
    pytest.skip("is about the plugin, which is not loaded into a patched SGLang", allow_module_level=True)

from sglang_warmstart.base.runs import say_ready
from sglang_warmstart.libraries.deep_gemm_watch import kernel_of
from sglang_warmstart.libraries.monitor import JitWhileServingError
from sglang_warmstart.plugin import loaded_plugin
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.sglang.exact_warmup.rank import Rank

FEATURE = "jit-monitor"
MONITOR = "SGLANG_WARMSTART_JIT_MONITOR"
PRECOMPILE = "SGLANG_JIT_DEEPGEMM_PRECOMPILE"
COMPILER = "DG_JIT_NVCC_COMPILER"

DIES = "echo 'no such architecture' >&2; exit 7"


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str | None:
    """Of the monitor; None where nobody has set it."""
    return getattr(request, "param", None)


refusing = pytest.mark.parametrize("mode", ["error"], indirect=True)


@pytest.fixture(autouse=True)
def delivery(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Delivery]:
    """Started anew for each test: the mode is read once."""
    for switch in (MONITOR, PRECOMPILE, "SGLANG_WARMSTART_STRICT"):
        monkeypatch.delenv(switch, raising=False)
    if mode is not None:
        monkeypatch.setenv(MONITOR, mode)
    with delivered() as delivery:
        yield delivery


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    """The events of this process, as a rank has them."""
    log = open_log("rank", {events.EVENTS: str(tmp_path / "run")})
    assert log is not None
    yield log
    events.close_log()


@pytest.fixture
def begin(log: EventLog, rank: ServedRank, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Bring the rank to its event loop, with exact warm-up or without, and the server to where it is ready."""

    def begin(*, exact: bool, ready: bool = True, node_rank: int = 0) -> None:
        monkeypatch.setenv(PRECOMPILE, "1" if exact else "0")
        monkeypatch.setattr(sglang_compile_utils, "_ENABLE_JIT_DEEPGEMM_PRECOMPILE", exact)  # it is read at import
        rank.connect(runner, node_rank=node_rank)
        with pytest.raises(_Begun):
            Scheduler.run_event_loop(_Scheduled(node_rank))
        if ready:
            say_ready(log.directory)

    return begin


class _Begun(Exception):
    """The event loop has begun."""


class _Scheduled:
    """A scheduler up to there: the loop itself needs a device."""

    def __init__(self, node_rank: int) -> None:
        self.server_args = SimpleNamespace(node_rank=node_rank)

    def __getattr__(self, name: str) -> object:
        raise _Begun(name)


def jit(log: EventLog) -> list[Event]:
    """The JIT events so far."""
    return [event for event in read_run(log.directory).lanes[0].events if event.kind == "jit"]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "JIT while serving" in line]


def test_what_deep_gemm_compiles_is_an_event(
    log: EventLog, begin: Callable[..., None], rank: ServedRank, caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=False)
    dense(m=5)
    assert wait_until(lambda: len(jit(log)) == 2)
    for event in jit(log):
        assert (event.library, event.phase) == ("deep-gemm", "serving")
        assert event.shape == "gemm_nt_f8f8bf16(lhs: (5, 512), rhs: (384, 512), out: (5, 384))"
        assert 0 < event.seconds < 30
    assert len(said(caplog)) == 2
    assert "exact warm-up would have; `sglang-warmstart doctor` says why it is not at work" in said(caplog)[0]


def test_what_is_compiled_is_the_same_as_without(begin: Callable[..., None], rank: ServedRank) -> None:
    begin(exact=False)
    dense(m=5)
    wanted = {kernel.directory for kernel in kernels_of(target(DENSE), 5)}
    assert {path.name for path in (rank.cache / "cache").iterdir()} == wanted
    assert sum(rank.nvcc.compiled.values()) == len(wanted)


def test_a_call_that_needs_no_compiler_makes_no_event(
    log: EventLog, begin: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=False, ready=False)
    dense(m=5)
    assert wait_until(lambda: len(jit(log)) == 2)
    say_ready(log.directory)
    dense(m=6)
    time.sleep(0.2)
    assert [event.phase for event in jit(log)] == ["startup", "startup"]
    assert said(caplog) == []


def test_a_target_that_is_met_while_serving_is_an_event(
    log: EventLog, begin: Callable[..., None], rank: ServedRank, caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=True)
    dense(m=5)
    met = target(DENSE)
    assert rank.nvcc.compiled == compiled_for(met)
    (event,) = jit(log)
    assert (event.name, event.target, event.phase) == ("a new target", str(met), "serving")
    (line,) = said(caplog)
    assert line.startswith(f"warmstart: JIT while serving: deep-gemm compiled a new target for {met} in ")
    assert "the marker does now" in line
    # DeepGEMM itself compiled nothing.
    dense(m=200)
    time.sleep(0.2)
    assert len(jit(log)) == 1


@refusing
def test_a_compile_is_refused_with_the_same_words(
    log: EventLog, begin: Callable[..., None], rank: ServedRank, caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=False)
    with pytest.raises(JitWhileServingError) as refused:
        dense(m=5)
    (line,) = said(caplog)
    assert line == f"warmstart: {refused.value}"
    assert "deep-gemm needs a kernel for gemm_nt_f8f8bf16(lhs: (5, 512), " in line
    assert isinstance(refused.value.__cause__, RuntimeError)
    assert line.endswith(" says why it is not at work") and "refused before it was compiled" in line
    assert not (rank.cache / "cache").exists()
    assert rank.nvcc.compiled == {}


@refusing
def test_a_new_target_is_refused(log: EventLog, begin: Callable[..., None], rank: ServedRank) -> None:
    begin(exact=True)
    with pytest.raises(JitWhileServingError, match=r"deep-gemm needs a kernel for gemm_nt_f8f8bf16\(lhs: \(5, 512\)"):
        dense(m=5)
    assert len(jit(log)) == 1
    assert rank.nvcc.compiled == {}, "neither by the service nor by DeepGEMM"


@refusing
def test_nothing_is_refused_before_the_server_is_ready(log: EventLog, begin: Callable[..., None]) -> None:
    begin(exact=False, ready=False)
    dense(m=5)
    assert wait_until(lambda: len(jit(log)) == 2)


@pytest.mark.parametrize(("mode", "ready"), [(None, True), ("error", False)], indirect=["mode"])
def test_a_compiler_that_fails_fails_as_ever(
    ready: bool, log: EventLog, begin: Callable[..., None], rank: ServedRank, caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=False, ready=ready)
    rank.nvcc.on_each_kernel(DIES)
    with pytest.raises(RuntimeError, match="NVCC compilation failed") as failed:
        dense(m=5)
    assert not isinstance(failed.value, JitWhileServingError)
    assert wait_until(lambda: len(jit(log)) == 1)
    assert jit(log)[0].error == "the compiler's exit status is 7"
    # What fails before the server is ready is not said to be compiled while serving. The line comes after the event.
    assert wait_until(lambda: len(said(caplog)) >= ready)
    assert ["failed to compile" in line for line in said(caplog)] == [True] * ready


@refusing
def test_on_a_further_node_it_is_reported(
    log: EventLog, begin: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=False, ready=False, node_rank=1)
    assert log.phase == "serving"
    dense(m=5)
    assert wait_until(lambda: len(said(caplog)) == 2)


def test_the_service_is_told_of_the_real_compiler(begin: Callable[..., None], rank: ServedRank, log: EventLog) -> None:
    begin(exact=True)
    assert os.environ[COMPILER] != str(rank.nvcc.path)
    dense(m=5)
    assert rank.nvcc.compiled == compiled_for(target(DENSE))


@pytest.mark.parametrize("mode", ["loud"], indirect=True)
def test_a_mode_that_is_none_is_said_once_and_warn_is_used(
    log: EventLog, begin: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    (line,) = [record.getMessage() for record in records if MONITOR in record.getMessage()]
    assert line == f'warmstart: {MONITOR}: "loud" is not warn or error or off, using the default warn'
    begin(exact=False)
    dense(m=5)
    assert wait_until(lambda: len(said(caplog)) == 2)


@pytest.mark.parametrize("mode", ["off"], indirect=True)
def test_off_leaves_the_compiler_alone(log: EventLog, begin: Callable[..., None], rank: ServedRank) -> None:
    begin(exact=False)
    assert os.environ[COMPILER] == str(rank.nvcc.path)
    dense(m=5)
    assert jit(log) == []


@pytest.mark.parametrize(("mode", "watched"), [(None, True), ("error", True), ("off", False)], indirect=["mode"])
def test_the_other_libraries_are_watched_once_they_are_imported(watched: bool) -> None:
    import triton  # noqa: F401

    # SGLang 0.5.23 has a listener of its own, with which ours stacks.
    assert ("listener" in hooked()) is watched


def hooked() -> set[str]:
    """What the feature has changed."""
    plugin = loaded_plugin()
    assert plugin is not None
    (installation,) = [each for each in plugin.installations if each.feature.name == FEATURE]
    return {name.rpartition(".")[2] for name in installation.hooks.changed}


def test_where_nothing_is_refused_nothing_is_on_the_path_of_a_call() -> None:
    assert hooked() & {"update_deep_gemm_config", "run_event_loop"}
    assert "deep_gemm_execution_hook" not in hooked()


@refusing
def test_where_calls_are_refused_each_can_say_why() -> None:
    assert "deep_gemm_execution_hook" in hooked()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DG_JIT_USE_NVRTC", "1", "DG_JIT_USE_NVRTC is set: DeepGEMM compiles inside the process"),
        (COMPILER, "/nowhere/nvcc", "DG_JIT_NVCC_COMPILER=/nowhere/nvcc is not there"),
    ],
)
def test_where_there_is_no_compiler_to_stand_before_it_is_said(
    variable: str,
    value: str,
    reason: str,
    log: EventLog,
    begin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, value)
    begin(exact=False)
    assert f"warmstart: the JIT monitor does not watch deep-gemm: {reason}" in caplog.messages
    assert os.environ[variable] == value


def test_it_stands_there_before_sglang_first_calls_deep_gemm(
    log: EventLog, begin: Callable[..., None], rank: ServedRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What SGLang calls from 0.5.13 on. A DeepJIT asks for its compiler in its first call, also in this one.
    seen: list[str] = []
    monkeypatch.setattr(rank.deep_gemm.module, "set_pdl", lambda _: seen.append(os.environ[COMPILER]), raising=False)
    monkeypatch.setenv("SGLANG_DEEPGEMM_PDL", "1")
    begin(exact=True)
    assert os.environ[COMPILER] != str(rank.nvcc.path), "the command"
    assert seen in ([os.environ[COMPILER]], []) and bool(seen) is installed_release().since("0.5.13")
    dense()
    assert rank.nvcc.compiled == compiled_for(target(DENSE)), "by the service, with the real one"
    assert [event.name for event in jit(log)] == ["a new target"], "and nothing by the command"


def test_a_command_that_cannot_run_leaves_the_compiler_alone(
    log: EventLog,
    begin: Callable[..., None],
    rank: ServedRank,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # As where nothing may be executed in the temporary directory.
    chmod = Path.chmod
    monkeypatch.setattr(Path, "chmod", lambda path, mode: chmod(path, mode & ~0o111))
    begin(exact=False)
    (line,) = [line for line in caplog.messages if "does not watch deep-gemm" in line]
    assert "a command before the compiler cannot run" in line and "Permission denied" in line
    assert os.environ[COMPILER] == str(rank.nvcc.path)
    dense(m=5)


def test_a_server_that_outlives_its_installation_compiles_unwatched(
    log: EventLog, begin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "compiler_command.py"
    monkeypatch.setattr("sglang_warmstart.libraries.deep_gemm_front.__file__", str(gone))
    begin(exact=False)
    dense(m=5)
    time.sleep(0.2)
    assert jit(log) == []


def test_a_look_that_fails_does_not_end_the_watch(
    log: EventLog, begin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("dictionary changed size during iteration")

    begin(exact=False)
    with monkeypatch.context() as context:
        context.setattr("sglang_warmstart.libraries.deep_gemm_watch.call_under_way", fails)
        dense(m=5)
        assert wait_until(lambda: len(jit(log)) == 2)
    assert "warmstart: the JIT monitor missed a kernel of deep-gemm's" in caplog.messages
    assert {event.name for event in jit(log)} == {"a kernel"}


def test_a_python_that_cannot_start_leaves_the_compiler_alone(
    log: EventLog,
    begin: Callable[..., None],
    rank: ServedRank,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # As one that is nothing without its PYTHONHOME, which -I leaves out.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    begin(exact=False)
    (line,) = [line for line in caplog.messages if "does not watch deep-gemm" in line]
    assert "a command before the compiler cannot run" in line
    assert os.environ[COMPILER] == str(rank.nvcc.path)
    dense(m=5)


def test_without_events_it_is_said_that_nothing_is_watched(
    log: EventLog, begin: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    events.close_log()
    begin(exact=False)
    assert "warmstart: the JIT monitor watches nothing here: no events are recorded in this process" in caplog.messages


def test_a_new_target_for_which_nothing_was_compiled_is_no_jit(
    log: EventLog, begin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where another node has published its kernels.
    begin(exact=True)
    monkeypatch.setattr(Rank, "warm", lambda *_: None)
    dense(m=5)
    met = [event for event in read_run(log.directory).lanes[0].events if event.name == "a new target"]
    assert [(event.kind, event.cached, event.target) for event in met] == [("load", True, str(target(DENSE)))]


_KILLED = """
import os, sys
from pathlib import Path
from sglang_warmstart.base.events import EventLog, this_process
from sglang_warmstart.libraries.deep_gemm_watch import DeepGemmWatch
environment = {"DG_JIT_NVCC_COMPILER": "/bin/true"}
watch = DeepGemmWatch(EventLog(Path(sys.argv[1]), this_process("rank")), environment, refuse=False, exact=False)
print(environment["DG_JIT_NVCC_COMPILER"], flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_rank_leaves_goes_with_the_next_start(tmp_path: Path) -> None:
    def run(how: str) -> Path:
        command = [sys.executable, "-c", _KILLED, str(tmp_path), how]
        environment = child_environment({"PYTHONPATH": python_path(Path(__file__).parents[1])})
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == (-signal.SIGKILL if how == "killed" else 0)
        return Path(done.stdout.strip()).parent

    left = run("killed")  # whoever starts on this machine meanwhile removes it, too
    assert not run("ends").exists()
    assert not left.exists()


def test_a_kernel_is_named_as_deep_gemm_names_it(tmp_path: Path) -> None:
    kernels = recording().kernels.values()
    names = set()
    for kernel in kernels:
        (tmp_path / "kernel.cu").write_text(kernel.source)
        names.add(kernel_of(tmp_path / "kernel.cu"))
    assert all(re.fullmatch(r"\w+<[^;\n]+>", name) for name in names)
    assert len(names) == len({kernel.source.partition("__instantiate_kernel")[2] for kernel in kernels})
    assert kernel_of(tmp_path / "nothing") == "a kernel"


def test_the_log_level_is_a_warning(
    begin: Callable[..., None], log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    begin(exact=True)
    dense(m=5)
    levels = {record.levelno for record in caplog.records if "JIT while serving" in record.message}
    assert levels == {logging.WARNING}
