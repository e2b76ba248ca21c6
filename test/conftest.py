"""Makes SGLang importable without a GPU, and skips what this environment cannot run."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit import environment
from kit.fork_server import ForkServer
from kit.model import write_tiny_llama
from kit.release import installed_release, is_patched

# Here and not in a fixture: test modules import SGLang at their top, while they are collected.
environment.isolate()
environment.in_process()
# Behind a shell's `&`, or nohup, it is ignored, and would be by all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is about another release, or about how the plugin gets in."""
    installed = installed_release()
    for marker in item.iter_markers("release"):
        since, before = marker.kwargs.get("since"), marker.kwargs.get("before")
        if marker.args and installed.version not in marker.args:
            pytest.skip(f"is about SGLang {' and '.join(marker.args)}; installed is {installed.version}")
        if since and not installed.since(since):
            pytest.skip(f"is about SGLang from {since} on; installed is {installed.version}")
        if before and installed.since(before):
            pytest.skip(f"is about SGLang before {before}; installed is {installed.version}")
    if is_patched() and item.get_closest_marker("by_plugin"):
        pytest.skip("is about the plugin, which is not loaded into a patched SGLang")


# They start whole servers, or import SGLang again and again. Begun last, one of them runs alone at the end.
LONGEST = (
    "test_server",
    "test_deep_gemm_rank",
    "test_series_of_sglang",
    "test_plugin",
    "test_doctor",
    "test_deep_gemm_of_the_release",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first; all else as it was collected."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@contextmanager
def environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def environment_of_the_module() -> Iterator[None]:
    """What fixtures of a module leave in this process's environment is not seen by the next module."""
    with environment_kept():
        yield


@pytest.fixture(autouse=True)
def environment_of_the_test(environment_of_the_module: None) -> Iterator[None]:
    """What a test leaves in this process's environment is not seen by the next one."""
    with environment_kept():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config of a two-layer Llama, for `--load-format dummy`."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Forks fresh processes that have imported SGLang: see `kit.fork_server`."""
    with ForkServer() as forks:
        yield forks
