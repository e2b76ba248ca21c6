"""Events of a start-up, and metrics. A real server's are in test_server.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit.confined import run_python
from kit.release import is_patched
from sglang_warmstart.base import events
from sglang_warmstart.base.events import close_log, log_of_process

if is_patched():
    pytest.skip("is about the plugin, which is not loaded into a patched SGLang", allow_module_level=True)

from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.metrics import METRICS
from sglang_warmstart.sglang import start_up_events

FEATURE = "start-up-events"


_COUNT = """
import os, sys
from sglang_warmstart.base.events import emit, open_log
log = open_log("rank", os.environ)
emit("jit", "a", 1.0, 2.5, library="triton")
emit("jit", "b", 1.0, 0.5, library="triton", phase="serving")
emit("load", "c", 1.0, 0.1, library="triton", cached=True)
emit("compile", "d", 1.0, 4.0, library="deep-gemm")
emit("compile", "d", 1.0, library="deep-gemm", cached=True, target="another one that needs it")
emit("compile", "e", 1.0, library="deep-gemm", cached=True)
emit("compile", "the stub", 1.0, 3.0, library="deep-gemm", lane="stub")
emit("compile", "f", 1.0, 1.0, library="deep-gemm", error="no")
emit("load", "8 targets", 1.0, 1.0, library="deep-gemm", kernels=39)
emit("restore", "a bundle", 1.0, 1.0, library="deep-gemm", kernels=7)
emit("restore", "by the marker", 1.0, library="deep-gemm", kernels=5, cached=True)
emit("jit", "a new target", 1.0, 9.0, library="deep-gemm", kernels=0, phase="serving")
emit("step", "load weights", 1.0, 9.0)
"""
_COLLECT = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_events_are_counted_over_all_processes(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    environment = {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
        events.EVENTS: str(tmp_path / "run"),
        events.METRICS: "1",
    }
    for _ in range(2):
        run_python(_COUNT, environment=environment)
    lines = run_python(_COLLECT, environment=environment).splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == {
        'sglang_warmstart_compiles_total{library="triton",phase="startup"} 2.0',
        'sglang_warmstart_compiles_total{library="triton",phase="serving"} 2.0',
        'sglang_warmstart_compiles_total{library="deep-gemm",phase="startup"} 2.0',
        'sglang_warmstart_compiles_total{library="deep-gemm",phase="serving"} 0.0',
        'sglang_warmstart_compile_seconds_total{library="triton",phase="startup"} 5.0',
        'sglang_warmstart_compile_seconds_total{library="triton",phase="serving"} 1.0',
        'sglang_warmstart_compile_seconds_total{library="deep-gemm",phase="startup"} 8.0',
        'sglang_warmstart_compile_seconds_total{library="deep-gemm",phase="serving"} 0.0',
        'sglang_warmstart_cache_hits_total{library="triton"} 2.0',
        'sglang_warmstart_cache_hits_total{library="deep-gemm"} 12.0',
        "sglang_warmstart_kernels_planned_total 6.0",
        "sglang_warmstart_kernels_compiled_total 2.0",
        "sglang_warmstart_kernels_loaded_total 78.0",
        "sglang_warmstart_kernels_restored_total 14.0",
    }


def test_the_docs_have_each_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "features" / "start-up-events.md").read_text(encoding="utf-8")
    for name in METRICS:
        assert f"| `sglang_warmstart_{name}_total` |" in text


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a main process that is about to start its ranks."""
    for name in (events.EVENTS, events.METRICS, "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SGLANG_DG_CACHE_DIR", str(tmp_path))
    yield
    close_log()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("different", "phase"),
    [
        ({}, "startup"),
        ({"tokenizer_worker_num": 2}, "serving"),
        ({"enable_http2": True}, "serving"),
        ({"tokenizer_worker_num": 2, "node_rank": 1}, "startup"),
    ],
)
def test_a_server_whose_own_warm_up_cannot_be_seen_is_ready_when_its_ranks_are(
    different: dict[str, object], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self) -> None:
            raise AssertionError("it is an HTTP server that is started")

        @classmethod
        def _launch_scheduler_processes(
            cls, server_args: object, port_args: object, run_scheduler_process_func: object
        ) -> None: ...

        @classmethod
        def _launch_subprocesses(cls, server_args: object) -> str:
            return "launched"

    hooks = Hooks("test")
    start_up_events.install_run(hooks, SimpleNamespace(Engine=Engine, __name__="engine"))  # type: ignore[arg-type]
    start_up_events.begin_run(SimpleNamespace(enable_metrics=False))
    log = log_of_process()
    assert log is not None
    arguments = {"tokenizer_worker_num": 1, "enable_http2": False, "node_rank": 0, **different}
    assert Engine._launch_subprocesses(SimpleNamespace(**arguments)) == "launched"
    assert log.phase == phase
    hooks.undo()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("enabled", "directory"), [(True, True), (True, False), (False, True)])
def test_metrics_are_counted_where_sglang_collects_them(
    enabled: bool, directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if directory:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(
        "sglang_warmstart.base.metrics.Listener", lambda: lambda _: None
    )  # its counters are made once in a process
    start_up_events.begin_run(SimpleNamespace(enable_metrics=enabled))
    log = log_of_process()
    assert log is not None
    assert bool(log.listeners) == (events.METRICS in os.environ) == (enabled and directory)


@pytest.mark.usefixtures("environment")
def test_a_cache_that_cannot_be_written_is_said_and_ready_is_known_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_DG_CACHE_DIR", str(tmp_path / "file"))
    start_up_events.begin_run(SimpleNamespace(enable_metrics=False))
    (line,) = [line for line in caplog.messages if "warmstart" in line]
    assert "events of this run are not kept" in line and "Not a directory" in line
    log = log_of_process()
    assert log is not None
    assert log.phase == "startup"
    start_up_events.server_is_ready()
    assert log.phase == "serving"


@pytest.mark.usefixtures("environment")
def test_a_second_server_of_a_process_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["20260101-000000", "20260101-000001"])
    monkeypatch.setattr("sglang_warmstart.base.runs.time.strftime", lambda _: next(times))
    for _ in range(2):
        start_up_events.begin_run(SimpleNamespace(enable_metrics=False))
        log = log_of_process()
        assert log is not None
        assert str(log.directory) == os.environ[events.EVENTS]
        assert log.phase == "startup"
        start_up_events.server_is_ready()
