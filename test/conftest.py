"""Makes SGLang importable without a GPU, and skips what this environment cannot run."""

from pathlib import Path

import pytest
from kit import environment
from kit.model import write_tiny_llama
from kit.release import installed_release

# Here and not in a fixture: test modules import SGLang at their top, while they are collected.
environment.in_process()

_HOPPER = (9, 0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    _skip_on_other_release(item)
    _skip_without_gpu(item)


def _skip_on_other_release(item: pytest.Item) -> None:
    installed = installed_release().version
    wanted = [version for marker in item.iter_markers("release") for version in marker.args]
    if wanted and installed not in wanted:
        pytest.skip(f"is about SGLang {' and '.join(wanted)}; installed is {installed}")


def _skip_without_gpu(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # takes seconds, so only where the answer is needed

    if not torch.cuda.is_available():
        pytest.skip("needs a Hopper or newer GPU; torch finds no GPU here")
    if torch.cuda.get_device_capability() < _HOPPER:
        pytest.skip(f"needs a Hopper or newer GPU; here is {torch.cuda.get_device_name()}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config of a two-layer Llama, for `--load-format dummy`."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
