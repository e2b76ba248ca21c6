"""The environment in which SGLang imports and runs without a GPU: for this process, and for a child."""

import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kit.release import Release, installed_release, is_patched

_CACHES = (
    "DG_JIT_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "SGLANG_CACHE_DIR",
    "SGLANG_CUTE_AOT_CACHE_DIR",
    "SGLANG_DG_CACHE_DIR",
    "SGLANG_JIT_CACHE_DIR",
    "TILELANG_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TVM_FFI_CACHE_DIR",
    "XDG_CACHE_HOME",
)

# Names a plugin that is not there, and so none.
NO_PLUGIN = {"SGLANG_PLUGINS": "none"}


def _settings(release: Release) -> dict[str, str]:
    # A machine may have a libnccl that SGLang would find and load; without a GPU that ends in an error.
    settings = {"SGLANG_NCCL_SO_PATH": "/nonexistent", **release.environment}
    # The package is there for the last patch to call, and what is tested is what the patches do without the plugin.
    return {**settings, **NO_PLUGIN} if is_patched() else settings


@functools.cache
def _cache() -> str:
    """A cache of this process and its children: each start of a server leaves its events there."""
    directory = tempfile.mkdtemp(prefix="warmstart-test-cache-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def python_path(*first: object) -> str:
    """A PYTHONPATH for a child: these places, and then where this process's own children look."""
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(place) for place in first if place] + [inherited] * bool(inherited))


def child_environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment plus what a child needs to run SGLang on CPU; a value of None removes a variable."""
    release = installed_release()
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    standins = [str(path) for path in release.standins]
    settings: dict[str, str | None] = {
        "SGLANG_DG_CACHE_DIR": _cache(),
        **os.environ,
        **_settings(release),
        "PYTHONPATH": os.pathsep.join(standins + [path for path in inherited if path not in standins]),
        "CUDA_VISIBLE_DEVICES": "",  # what is tested on CPU is the same on a machine that has a GPU
        **(extra or {}),
    }
    return {name: value for name, value in settings.items() if value is not None}


def isolate() -> None:
    """Give this process, and its children, a home and a place for temporary files that no other test process has.

    Every cache that is not placed by a variable of its own is below HOME; variables that place one are dropped.
    """
    # Short: the path of a Unix socket below it has 107 characters at the most.
    own = tempfile.mkdtemp(prefix="wt-", dir="/tmp")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp")):
        os.environ[variable] = str(Path(own, name))
        Path(own, name).mkdir()
    tempfile.tempdir = None
    for variable in _CACHES:
        os.environ.pop(variable, None)


def in_process() -> None:
    """Let this process import SGLang. Before the first `import sglang`: SGLang reads all of it while it is imported.

    GPUs stay visible here, unlike in a child, because the tests that need one run in this process.
    """
    release = installed_release()
    sys.path[:0] = [str(path) for path in release.standins if str(path) not in sys.path]
    os.environ.update(_settings(release))
    # Children of this process that are not started by the kit find the stand-ins too.
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
