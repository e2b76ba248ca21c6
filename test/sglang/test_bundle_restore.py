"""The switch at launch: who restores is started once per node, before the service, which waits for it."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit.delivery import Delivery
from kit.environment import child_environment, python_path
from kit.fork_server import ForkServer
from kit.installed import install
from kit.launched import launch, ready
from kit.node import wait_until
from kit.plans import LAUNCH, identity_in, real_plan
from kit.release import is_patched
from kit.served_rank import update_config
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
        # Whoever looks for it there is told at once, and not seconds later, in another test.
        socket = "/nonexistent/service.sock"

    def start(**options: Any) -> NoService:
        # Whether restoring has begun by then.
        path = options["restoring"]
        told.append({**options, "exists": path is not None and path.exists()})
        return NoService()

    monkeypatch.setattr(exact_warmup, "start_service", start)
    yield told


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
    launch(runner.server_args, ready)
    (told,) = services
    assert told["exists"]
    assert wait_until(lambda: is_over(told["restoring"]), 30)
    cache = KernelCache(tmp_path / "cache")
    assert Markers(cache, identity_in(deep_gemm)).load(LAUNCH) is not None
    assert "2 kernels restored" in capfd.readouterr().err


def test_with_an_empty_key_an_unsigned_bundle_is_not_restored(
    runner: ModelRunner,
    deep_gemm: Path,
    services: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from kit.bundles import bundle_of, cubin

    plan = real_plan()
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    monkeypatch.setenv(BUNDLE, str(path))
    monkeypatch.setenv(KEY, "")
    launch(runner.server_args, ready)
    (told,) = services
    assert wait_until(lambda: is_over(told["restoring"]), 30)
    assert "the bundle is not restored" in capfd.readouterr().err
    assert not (tmp_path / "cache" / "cache").exists()


# Where Triton itself looks in a server: after what SGLang does when it is imported, with another home.
TRITON = """
import importlib, subprocess, sys
import sglang.srt.environ as environ
importlib.reload(environ)
getattr(environ, "redirect_third_party_caches", lambda: None)()
ask = "from triton import knobs; print('TRITON', knobs.cache.dir)"
print(subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout)
"""
CACHES = ("TRITON_CACHE_DIR", "SGLANG_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TORCHINDUCTOR_CACHE_DIR")


def test_what_a_command_packs_of_other_libraries_is_restored_where_a_server_looks_for_it(
    forks: ForkServer,
    runner: ModelRunner,
    deep_gemm: Path,
    services: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from kit.bundles import bundle_of, cubin

    plan = real_plan()
    base, path = tmp_path / "base.tar.zst", tmp_path / "bundle.tar.zst"
    base.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    # A shell in which nothing names a cache.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environment = {**dict.fromkeys(CACHES), "HOME": str(tmp_path / "home")}
    told = forks.run(TRITON, environment=environment).checked().splitlines()
    entry = Path(next(line.split()[1] for line in told if line.startswith("TRITON "))) / "KEY" / "k.json"
    assert entry.is_relative_to(tmp_path / "home")
    entry.parent.mkdir(parents=True)
    entry.write_text("compiled")
    command = [sys.executable, "-c", "from sglang_warmstart.cli import main; main()", "bundle", "pack", "-o", str(path)]
    command += ["--from", str(base), "--include", "triton"]
    done = subprocess.run(command, env=child_environment(environment), capture_output=True, text=True)
    assert "1 files of triton's cache" in done.stdout, done.stderr
    shutil.rmtree(entry.parent)

    monkeypatch.setenv(BUNDLE, str(path))
    # As importing SGLang has done in a server with this home.
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "home" / ".cache" / "sglang"))
    defaults = getattr(importlib.import_module("sglang.srt.environ"), "third_party_cache_defaults", dict)
    for name, value in defaults().items():
        monkeypatch.setenv(name, value)
    launch(runner.server_args, ready)
    (start,) = services
    assert wait_until(lambda: is_over(start["restoring"]), 30)
    assert entry.read_text() == "compiled"


@pytest.mark.release("0.5.12")
def test_without_exact_warm_up_the_ranks_wait_for_the_bundle_and_the_main_process_opens_none(
    forks: ForkServer, deep_gemm: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from kit.bundles import bundle_of, cubin

    plan = real_plan()
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(bundle_of(plan, (cubin(name.encode()) for name in plan.kernels)).archive())
    environment = {
        BUNDLE: str(path),
        "SGLANG_WARMSTART_ONLY": "bundle-restore",
        "SGLANG_DG_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_HOME": str(toolchain().cuda_home),
        "PYTHONPATH": python_path(Path(__file__).parents[1], deep_gemm.parent),
    }
    done = forks.call("kit.launched:server_with_one_rank", str(tiny_model), environment=environment)
    said = dict(line.split(" ", 1) for line in done.checked().splitlines() if line.startswith(("kernels ", "modules ")))
    assert len(json.loads(said["kernels"])) == len(plan.kernels), done.err
    imported = {name for name in json.loads(said["modules"]) if not name.startswith("sglang.")}
    assert "sglang_warmstart.bundle.start" in imported
    unwanted = ("sglang_warmstart.bundle.", "sglang_warmstart.node.service", "zstandard", "rich", "typer")
    assert {name for name in imported if name.startswith(unwanted)} == {"sglang_warmstart.bundle.start"}


def test_a_rank_waits_for_a_bundle_for_no_longer_than_it_may(
    runner: ModelRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils
    from sglang_warmstart.bundle import start

    asked = []
    monkeypatch.setattr(compile_utils, "ENABLE_JIT_DEEPGEMM", False)  # there is no GPU to be told of
    monkeypatch.setattr(start, "WAIT_LIMIT_S", 0.2)
    lock = tmp_path / "lock"
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setenv(exact_warmup.RESTORING, str(lock))
        begin = time.monotonic()
        update_config(compile_utils, runner)
        asked.append(time.monotonic() - begin)
        assert caplog.messages[-1] == "warmstart: the bundle takes more than 0.2 s: it is not waited for"
        # Where there is a service, that waits.
        monkeypatch.setenv(exact_warmup.SERVICE, "/nowhere")
        begin = time.monotonic()
        update_config(compile_utils, runner)
        asked.append(time.monotonic() - begin)
    assert asked[0] >= 0.2 > asked[1]


def test_without_the_switch_nobody_restores_and_the_service_waits_for_nobody(
    runner: ModelRunner, deep_gemm: Path, services: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of an earlier server of this process.
    monkeypatch.setenv(exact_warmup.RESTORING, "/tmp/an old lock")
    launch(runner.server_args, ready)
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
    launch(runner.server_args, ready, device)
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
    launch(runner.server_args, ready)
    said = [each.getMessage() for each in caplog.records if each.name == "sglang.warmstart"]
    assert len([line for line in said if line.startswith("warmstart: the bundle is not restored: ")]) == 1
    assert [told["restoring"] for told in services] == [None]


def test_the_switches_are_on_envs_beside_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.environ import envs

    assert envs.SGLANG_WARMSTART_BUNDLE.get() == envs.SGLANG_WARMSTART_BUNDLE_KEY.get() == ""
    monkeypatch.setenv(BUNDLE, "s3://bucket/bundle.tar.zst")
    assert envs.SGLANG_WARMSTART_BUNDLE.get() == "s3://bucket/bundle.tar.zst"


def test_the_plugin_alone_brings_it(delivery: Delivery) -> None:
    assert not is_patched()
    assert delivery.has(FEATURE)
