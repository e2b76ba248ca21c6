"""The switch at launch: who restores is started once per node, before the service, which waits for it."""

from __future__ import annotations

import copy
import fcntl
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit.delivery import Delivery
from kit.installed import install
from kit.node import wait_until
from kit.plans import LAUNCH, identity_in, real_plan
from kit.release import is_patched
from kit.toolchain import toolchain
from sglang_warmstart.sglang.exact_warmup import warmup as exact_warmup

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# A patched SGLang knows what the service waits for; who restores is the plugin's.
pytestmark = [pytest.mark.by_plugin]

FEATURE = "bundle-restore"
BUNDLE = "SGLANG_WARMSTART_BUNDLE"
KEY = "SGLANG_WARMSTART_BUNDLE_KEY"


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BUNDLE, KEY, "SGLANG_WARMSTART", "SGLANG_JIT_DEEPGEMM_PRECOMPILE", "SGLANG_ENABLE_JIT_DEEPGEMM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(exact_warmup.RESTORING, raising=False)
    monkeypatch.delenv(exact_warmup.SERVICE, raising=False)


@pytest.fixture
def deep_gemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DeepGEMM, as SGLang would find it; and a cache of its own."""
    package = install(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("CUDA_HOME", str(toolchain().cuda_home))
    monkeypatch.setenv("SGLANG_DG_CACHE_DIR", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return package


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the service was told each time that it was started. It is not started here."""
    told: list[dict[str, Any]] = []

    class NoService:
        socket = "/nonexistent"

    def start(**options: Any) -> NoService:
        # Whether restoring has begun by then.
        path = options["restoring"]
        told.append({**options, "exists": path is not None and path.exists()})
        return NoService()

    monkeypatch.setattr(exact_warmup, "start_service", start)
    yield told


def scheduler(*arguments: Any) -> None:
    """In the place of a scheduler process."""
    arguments[-1].send({"status": "ready"})


def launch(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> None:
    """SGLang's own start of its scheduler processes."""
    from sglang.srt.entrypoints import engine

    monkeypatch.setattr(engine, "mp", multiprocessing.get_context("fork"))
    server_args = copy.copy(runner.server_args)
    server_args.device = device
    result, processes = engine.Engine._launch_scheduler_processes(server_args, None, scheduler)
    result.wait_for_ready()
    for process in processes:
        process.join()


def is_over(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def test_a_bundle_is_restored_beside_the_start_and_the_service_waits_for_it(
    runner: ModelRunner,
    deep_gemm: Path,
    services: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Not above: a patched SGLang, where this is skipped, has no zstandard.
    from kit.bundles import bundle_of, cubin
    from sglang_warmstart.deepgemm.cache import KernelCache
    from sglang_warmstart.deepgemm.marker import Markers

    plan = real_plan()
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    monkeypatch.setenv(BUNDLE, str(path))
    launch(runner, monkeypatch)
    (told,) = services
    assert told["exists"]
    assert wait_until(lambda: is_over(told["restoring"]), 30)
    cache = KernelCache(tmp_path / "cache")
    assert Markers(cache, identity_in(deep_gemm)).load(LAUNCH) is not None
    assert "2 kernels restored" in capfd.readouterr().err


def test_without_the_switch_nobody_restores_and_the_service_waits_for_nobody(
    runner: ModelRunner, deep_gemm: Path, services: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of an earlier server of this process.
    monkeypatch.setenv(exact_warmup.RESTORING, "/tmp/an old lock")
    launch(runner, monkeypatch)
    assert [told["restoring"] for told in services] == [None]
    assert exact_warmup.RESTORING not in os.environ


@pytest.mark.parametrize(
    "off",
    [
        {"device": "cpu"},
        {"SGLANG_WARMSTART": "0"},
        {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"},
        {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"},
    ],
    ids=lambda off: next(iter(off)),
)
def test_where_deep_gemm_is_not_warmed_nothing_is_restored(
    off: dict[str, str],
    runner: ModelRunner,
    deep_gemm: Path,
    services: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = off.pop("device", "cuda")
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(BUNDLE, "/a/bundle")
    launch(runner, monkeypatch, device)
    assert exact_warmup.RESTORING not in os.environ
    assert services == []


def test_where_no_process_can_be_started_the_server_starts_and_one_line_says_so(
    runner: ModelRunner,
    deep_gemm: Path,
    services: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(BUNDLE, "/a/bundle")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "is not there"))
    launch(runner, monkeypatch)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "sglang.warmstart"]
    assert line.startswith("warmstart: the bundle is not restored: ")
    assert [told["restoring"] for told in services] == [None]


def test_the_switches_are_on_envs_beside_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.environ import envs

    assert envs.SGLANG_WARMSTART_BUNDLE.get() == envs.SGLANG_WARMSTART_BUNDLE_KEY.get() == ""
    monkeypatch.setenv(BUNDLE, "s3://bucket/bundle.tar.zst")
    assert envs.SGLANG_WARMSTART_BUNDLE.get() == "s3://bucket/bundle.tar.zst"


def test_the_plugin_alone_brings_it(delivery: Delivery) -> None:
    assert not is_patched()
    assert delivery.has(FEATURE)
