"""Parts of cache keys: the properties of this machine that a compiled kernel may depend on.

This module imports none of the libraries. That would take seconds, or need a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import msgspec

Environment = Mapping[str, str]

NOT_INSTALLED = "not installed"
_PROGRAM_LIMIT_S = 10


def host() -> dict[str, str]:
    """What a compiled Python module or library needs of its host."""
    return {
        "Python": str(sysconfig.get_config_var("SOABI")),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }


def headers(name: str, *directories: str) -> dict[str, str]:
    """Where a package lies, and when the newest file in these directories of it was changed."""
    found = package(name)
    if found is None:
        return {f"{name}'s place": NOT_INSTALLED}
    return {
        f"{name}'s place": str(found),
        f"{name}'s headers": _newest(*(found / directory for directory in directories)),
    }


def _newest(*directories: Path) -> str:
    newest = 0
    for directory in directories:
        for below, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):
                    # Layers of container images keep whole seconds.
                    newest = max(newest, int(Path(below, name).stat().st_mtime))
    return f"changed at {newest} s" if newest else "not there"


def version(*distributions: str) -> str:
    """The version of the first of these that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return NOT_INSTALLED


def package(name: str) -> Path | None:
    """The directory of a package that this Python would import."""
    # The spec of a top-level name is found without importing anything.
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).resolve() if places else None


def home(environment: Environment) -> Path | None:
    """The user's home, as ``os.path.expanduser`` has it: an empty ``HOME`` is the root; None if nothing names one."""
    named = environment.get("HOME")
    if named is not None:
        return Path(named or "/")
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def expanded(path: str, environment: Environment) -> Path | None:
    """A path whose "~" is the user's home; None if that is not known. "~somebody" is taken as it is."""
    first, _, rest = path.partition("/")
    if first != "~":
        return Path(path)
    directory = home(environment)
    return None if directory is None else directory / rest


def resolved(path: Path) -> Path | None:
    """A path without links; None if it leads nowhere (a loop, or a relative one in a directory that is gone)."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None


def absolute(path: Path) -> Path | None:
    """An absolute path; None for a relative one in a directory that is gone."""
    try:
        return path.absolute()
    except OSError:
        return None


def which(program: str, environment: Environment) -> Path | None:
    """Where a program lies on the PATH of an environment."""
    found = shutil.which(program, path=environment.get("PATH", os.defpath))
    return Path(found) if found else None


def cuda_home(environment: Environment) -> Path:
    """The CUDA toolkit, as TileLang, FlashInfer and tvm-ffi look for it: an empty variable is as none."""
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = which("nvcc", environment)
    return nvcc.parent.parent if nvcc else Path("/usr/local/cuda")


def cuda_version(home: Path) -> str:
    """The version of the toolkit in a directory."""
    try:
        return str(msgspec.json.decode((home / "version.json").read_bytes())["cuda"]["version"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a toolkit that is installed by pip has none
    try:
        defined = re.search(r"^#define CUDA_VERSION (\d+)", (home / "include" / "cuda.h").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        defined = None
    return defined[1] if defined else "not there"


def ninja_key(environment: Environment) -> dict[str, str]:
    """What ninja's own answer hangs on, for a library that is called through tvm-ffi.

    The system's headers are not in it: a distribution's packages keep the times of their making.
    """
    home = cuda_home(environment)
    compiler = environment.get("CXX", "c++")
    found = which(compiler, environment)
    return {
        "tvm-ffi": version("apache-tvm-ffi"),
        **headers("tvm_ffi", "include"),
        "CUDA_HOME": str(home),
        "CUDA": cuda_version(home),
        # The headers of a toolkit in /usr are the system's.
        "CUDA's headers": "the system's" if home == Path("/usr") else _newest(home / "include"),
        "CXX": f"{compiler} ({found.resolve() if found else 'not there'})",
        # Another version may have another form of the log, and would begin anew.
        "ninja": program_version("ninja", environment),
        **host(),
    }


def program_version(program: str, environment: Environment) -> str:
    """What a program says of itself for ``--version``."""
    found = which(program, environment)
    if found is None:
        return "not there"
    command = [str(found), "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "not there"
    return " ".join(done.stdout.split())
