"""Caches of other libraries: where each lies, what is taken along of it, and where it would be found again.

What was seen by restoring such caches and watching what is compiled:

Triton: not relocatable. An entry is a directory; its ``__grp__`` file, written last, holds the absolute paths of the
others, each of which is renamed into place. The directory's name is a hash over Triton's own files, the kernel's
source, options and the version of ptxas, but over no path.

TileLang: relocatable. An entry is a directory; ``params.pkl`` is written last, each file is renamed into place. The
directory's name is a hash over the kernel, options, TileLang's version, and size and modification time in nanoseconds
of ``libtilelang.so``, but not over the version of CUDA's compiler.

FlashInfer and tvm-ffi (SGLang's own JIT kernels): not relocatable. Both run ninja whenever they load a kernel, and what
ninja finds out of date is compiled again, although the library is there. It is up to date if the commands are the same,
and so all paths and flags in them; ``.ninja_log``, ``.ninja_deps`` and the objects are there beside the library; the
objects have the modification times that are in ``.ninja_deps``; and no source and no header is newer than they are. pip
gives a header the time of its installation. The time of ``build.ninja`` does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from sglang_warmstart.libraries.cached import CachedFile, LibraryCache, defect_of, is_staging

Environment = Mapping[str, str]

_NOT_INSTALLED = "not installed"
_BLOCK = 1 << 20  # bytes read at once
_NINJA_LIMIT_S = 10


@dataclass(frozen=True)
class Library:
    """A library that keeps what it has compiled.

    Args:
        name: as it is asked for.
        distributions: the names under which it may be installed.
        root: where its cache lies, by the environment of the server.
        key: all that has to be the same for the cache to be found again, likewise. It imports none of the libraries.
        left_out: patterns of paths below the root that are temporary, locks, or of no use elsewhere. A star stands for
            slashes too; what is below such a path is left out as well.
    """

    name: str
    distributions: tuple[str, ...]
    root: Callable[[Environment], Path]
    key: Callable[[Environment], dict[str, str]]
    left_out: tuple[str, ...]

    @property
    def is_installed(self) -> bool:
        """Whether this Python has it."""
        return _version(*self.distributions) != _NOT_INSTALLED


@dataclass(frozen=True)
class Collected:
    """What was found in a cache.

    Args:
        cache: as it is named in the manifest; without files if there are none, or the library is not installed.
        contents: where a file with each SHA-256 lies. It may have changed since: whoever copies it checks.
        notes: a line for each file that could not be taken along.
    """

    cache: LibraryCache
    contents: dict[str, Path]
    notes: tuple[str, ...]


def parse_include(text: str) -> tuple[Library, ...]:
    """The libraries that are named.

    Args:
        text: names with commas between them, or "all".

    Raises:
        ValueError: one of them is not known, or there is none.
    """
    names = {name.strip() for name in text.split(",")}
    for name in sorted(names - {"all"}):
        if name not in LIBRARIES:
            raise ValueError(f"no library {name!r}: choose among {', '.join(LIBRARIES)}, with commas, or all")
    return tuple(library for name, library in LIBRARIES.items() if name in names or "all" in names)


def collect(library: Library, environment: Environment) -> Collected:
    """Look through a library's cache. Links are not followed; a file that vanishes meanwhile was not there.

    Args:
        library: which one.
        environment: of the server that has filled the cache.
    """
    root, files, contents, notes = library.root(environment), list[CachedFile](), dict[str, Path](), list[str]()
    for path in _walk(root, "", library.left_out, notes) if library.is_installed else ():
        defect = defect_of(path)
        if defect is not None:
            notes.append(f"{library.name}: {path!r} is left out: {defect}")
            continue
        try:
            file = _read(root, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{library.name}: {path!r} is left out: {error.strerror or error}")
            continue
        files.append(file)
        contents.setdefault(file.sha256, root / path)
    cache = LibraryCache(library.name, library.key(environment), tuple(sorted(files)))
    return Collected(cache, contents, tuple(notes))


def mismatch(library: Library, key_in_bundle: Mapping[str, str], environment: Environment) -> str | None:
    """Why a cache would not be found again here, in one line; None if it would.

    Args:
        library: whose.
        key_in_bundle: what was the same where the cache was filled.
        environment: of the server that is to use it.
    """
    if not library.is_installed:
        return "it is not installed here"
    here = library.key(environment)
    differences = [
        f"{name} was {key_in_bundle.get(name, 'not known')!r} and is {here.get(name, 'not known')!r} here"
        for name in dict.fromkeys((*here, *key_in_bundle))
        if here.get(name) != key_in_bundle.get(name)
    ]
    return "; ".join(differences) or None


def _walk(root: Path, below: str, left_out: tuple[str, ...], notes: list[str]) -> Iterator[str]:
    try:
        with os.scandir(root / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{str(root / below)!r} is left out: {error.strerror or error}")
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if any(fnmatchcase(path, pattern) for pattern in left_out) or (not below and is_staging(entry.name)):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, left_out, notes)
        elif entry.is_file(follow_symlinks=False):
            yield path


def _read(root: Path, path: str) -> CachedFile:
    digest = hashlib.sha256()
    # It may have become something else since it was listed; a pipe would be waited for.
    descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise OSError("not a file")
        while block := file.read(_BLOCK):
            digest.update(block)
        after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("it is being written")
    if not 0 <= after.st_mtime_ns < 1 << 63:
        raise OSError(f"changed at {after.st_mtime_ns} ns")
    return CachedFile(path, digest.hexdigest(), after.st_mtime_ns)


# Where each cache lies, and what it hangs on


def _triton_root(environment: Environment) -> Path:
    """Source: ``cache_knobs`` in ``triton/knobs.py``."""
    named = environment.get("TRITON_CACHE_DIR")
    return Path(named or Path(environment.get("TRITON_HOME") or _home(environment), ".triton", "cache")).absolute()


def _triton_key(environment: Environment) -> dict[str, str]:
    """Source: ``triton/runtime/cache.py``, and ``build.py`` beside it for the launchers, which are Python modules."""
    return {"triton": _version(*_TRITON.distributions), "cache": str(_triton_root(environment)), **_host()}


def _tilelang_root(environment: Environment) -> Path:
    """Source: ``Environment`` in ``tilelang/env.py``."""
    return Path(environment.get("TILELANG_CACHE_DIR") or _home(environment) / ".tilelang" / "cache").absolute()


def _tilelang_key(environment: Environment) -> dict[str, str]:
    """Source: ``KernelCache`` in ``tilelang/cache/kernel_cache.py``; the libraries are called through tvm-ffi."""
    package, library = _package("tilelang"), _NOT_INSTALLED
    if package is not None and (path := package / "lib" / "libtilelang.so").is_file():
        status = path.stat()
        library = f"{status.st_size} bytes of {status.st_mtime_ns} ns"
    return {
        "tilelang": _version("tilelang"),
        "libtilelang.so": library,
        "tvm-ffi": _version("apache-tvm-ffi"),
        "CUDA": _cuda_version(_cuda_home(environment)),
        **_host(),
    }


def _flashinfer_root(environment: Environment) -> Path:
    """Source: ``flashinfer/jit/env.py``. Each version has a directory of its own."""
    base = Path(environment.get("FLASHINFER_WORKSPACE_BASE") or _home(environment))
    return (base / ".cache" / "flashinfer" / _version("flashinfer-python")).resolve()


# Those that are in the commands which FlashInfer writes.
_FLASHINFER_SWITCHES = (
    "CC",
    "FLASHINFER_CXX_LAUNCHER",
    "FLASHINFER_EXTRA_CFLAGS",
    "FLASHINFER_EXTRA_CUDAFLAGS",
    "FLASHINFER_EXTRA_LDFLAGS",
    "FLASHINFER_JIT_DEBUG",
    "FLASHINFER_JIT_LINEINFO",
    "FLASHINFER_JIT_VERBOSE",
    "FLASHINFER_NVCC",
    "FLASHINFER_NVCC_LAUNCHER",
    "FLASHINFER_NVCC_THREADS",
)


def _flashinfer_key(environment: Environment) -> dict[str, str]:
    """Source: ``flashinfer/jit/core.py`` (``build_and_load``) and ``cpp_ext.py`` (the commands)."""
    switches = [f"{name}={environment[name]}" for name in _FLASHINFER_SWITCHES if environment.get(name)]
    return {
        "flashinfer": _version("flashinfer-python"),
        "cache": str(_flashinfer_root(environment)),
        **_headers("flashinfer", "data"),
        # Its ABI is in the commands, and the directory of Python's headers.
        "torch": _version("torch"),
        "python headers": sysconfig.get_path("include"),
        "switches": " ".join(switches) or "none",
        **_ninja_key(environment),
    }


def _tvm_ffi_root(environment: Environment) -> Path:
    """Source: ``build_inline`` in ``tvm_ffi/cpp/extension.py``."""
    named = environment.get("TVM_FFI_CACHE_DIR") or "~/.cache/tvm-ffi"
    return (_home(environment) / named[2:] if named.startswith("~/") else Path(named)).resolve()


def _tvm_ffi_key(environment: Environment) -> dict[str, str]:
    """Source: ``tvm_ffi/cpp/extension.py`` and ``sglang/jit_kernel/utils.py``, whose kernels may use these headers."""
    return {
        "cache": str(_tvm_ffi_root(environment)),
        "sglang": _version("sglang"),
        **_headers("sglang", "jit_kernel/include", "jit_kernel/csrc"),
        "flashinfer": _version("flashinfer-python"),
        **_headers("flashinfer", "data"),
        **_headers("deep_gemm", "include"),
        **_ninja_key(environment),
    }


def _ninja_key(environment: Environment) -> dict[str, str]:
    """What ninja's own answer hangs on, for a library that is called through tvm-ffi.

    The system's headers are not in it: a distribution's packages keep the times of their making.
    """
    home = _cuda_home(environment)
    compiler = environment.get("CXX") or "c++"
    found = _which(compiler, environment)
    return {
        "tvm-ffi": _version("apache-tvm-ffi"),
        **_headers("tvm_ffi", "include"),
        "CUDA_HOME": str(home),
        "CUDA": _cuda_version(home),
        # The headers of a toolkit in /usr are the system's.
        "CUDA's headers": "the system's" if home == Path("/usr") else _newest(home / "include"),
        "CXX": f"{compiler} ({found.resolve() if found else 'not there'})",
        "ninja": _ninja_version(environment),
        **_host(),
    }


def _host() -> dict[str, str]:
    """What a compiled Python module or library needs of its host."""
    return {
        "Python": str(sysconfig.get_config_var("SOABI")),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }


def _headers(package: str, *directories: str) -> dict[str, str]:
    found = _package(package)
    if found is None:
        return {f"{package}'s place": _NOT_INSTALLED}
    return {
        f"{package}'s place": str(found),
        f"{package}'s headers": _newest(*(found / directory for directory in directories)),
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


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _NOT_INSTALLED


def _package(name: str) -> Path | None:
    # The spec of a top-level name is found without importing anything.
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).resolve() if places else None


def _home(environment: Environment) -> Path:
    named = environment.get("HOME")
    if named:
        return Path(named)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("~")  # as the libraries have it, literally


def _which(program: str, environment: Environment) -> Path | None:
    found = shutil.which(program, path=environment.get("PATH", os.defpath))
    return Path(found) if found else None


def _cuda_home(environment: Environment) -> Path:
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = _which("nvcc", environment)
    return nvcc.parent.parent if nvcc else Path("/usr/local/cuda")


def _cuda_version(home: Path) -> str:
    try:
        return str(msgspec.json.decode((home / "version.json").read_bytes())["cuda"]["version"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a toolkit that is installed by pip has none
    try:
        defined = re.search(r"^#define CUDA_VERSION (\d+)", (home / "include" / "cuda.h").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        defined = None
    return defined[1] if defined else "not there"


def _ninja_version(environment: Environment) -> str:
    # Another version may have another form of the log, and would begin anew.
    ninja = _which("ninja", environment)
    if ninja is None:
        return "not there"
    try:
        done = subprocess.run([ninja, "--version"], capture_output=True, text=True, timeout=_NINJA_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "not there"
    return done.stdout.strip()


_NINJA_LEFT_OUT = ("*.o.d", "*.recompact", "*.lock")

_TRITON = Library(
    "triton",
    # The second is the name of what comes with nightly builds of torch.
    ("triton", "pytorch-triton"),
    _triton_root,
    _triton_key,
    ("*/tmp.pid_*", "*.tmp.pid_*", "*/lock", "*.lock"),
)
_FLASHINFER = Library(
    "flashinfer",
    ("flashinfer-python",),
    _flashinfer_root,
    _flashinfer_key,
    ("*/cached_ops/tmp", "*/flashinfer_jit.log", *_NINJA_LEFT_OUT),
)
_TILELANG = Library(
    "tilelang",
    ("tilelang",),
    _tilelang_root,
    _tilelang_key,
    # Python sources that are written each time, and a library that torch builds.
    ("tmp", "py-cache", "sparse_compressor", "*.lock"),
)
_TVM_FFI = Library("tvm-ffi", ("apache-tvm-ffi",), _tvm_ffi_root, _tvm_ffi_key, ("*/lock", *_NINJA_LEFT_OUT))

LIBRARIES: Mapping[str, Library] = {each.name: each for each in (_TRITON, _FLASHINFER, _TILELANG, _TVM_FFI)}
