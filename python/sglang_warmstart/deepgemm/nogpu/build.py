"""Compile the stand-ins, once per version of their source, with the C compiler of this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.base import files, trust
from sglang_warmstart.base.errors import first_line
from sglang_warmstart.deepgemm.record.child import LibraryError

SOURCE = Path(__file__).with_name("standins.c")

_LIMIT_S = 60.0


class StandInsError(LibraryError):
    """The stand-ins cannot be had or do not fit, in one line."""


@dataclass(frozen=True)
class StandIn:
    """One library.

    Args:
        file: its name, by which the loader knows it.
        parts: of the source.
        version: the version of its symbols, if they have one.
    """

    file: str
    parts: tuple[str, ...]
    version: str = ""


_CUDART = StandIn("libcudart.so.13", ("CUDART", "TENSOR_MAKER"), "libcudart.so.13")
_CUDA = StandIn("libcuda.so.1", ("CUDA",))
_NVRTC = StandIn("libnvrtc.so.13", ("NVRTC",), "libnvrtc.so.13")

# Where torch is a build for the CPU: all that DeepGEMM is linked to and that is not there.
BESIDE_CPU_TORCH = (
    _CUDA,
    _CUDART,
    _NVRTC,
    StandIn("libcublasLt.so.13", ("CUBLASLT",), "libcublasLt.so.13"),
    StandIn("libcublas.so.13", ("CUBLAS",), "libcublas.so.13"),
    StandIn("libc10_cuda.so", ("C10_CUDA",)),
    StandIn("libtorch_cuda.so", ("TORCH_CUDA",)),
)
# Where it is a build for CUDA, its libraries are there. What would look for a GPU in them stands before them.
BESIDE_CUDA_TORCH = (
    _CUDA,
    _NVRTC,
    StandIn("libwarmstart_nogpu.so", ("CUDART", "TENSOR_MAKER", "C10_CUDA", "TORCH_CUDA", "CUBLASLT")),
)


def build(stand_ins: tuple[StandIn, ...], environment: Mapping[str, str]) -> Path:
    """The directory with the stand-ins. They are compiled if no earlier call has.

    Args:
        environment: ``CC`` names the compiler, else it is cc, gcc or clang. ``XDG_CACHE_HOME`` or ``HOME`` say where
            they are kept.

    Raises:
        StandInsError: there is no C compiler, it fails, or they cannot be written, or others could have written them.
    """
    named = environment.get("CC")
    found = [
        shutil.which(name, path=environment.get("PATH")) for name in ([named] if named else ["cc", "gcc", "clang"])
    ]
    compiler = next(filter(None, found), None)
    key = hashlib.sha256(SOURCE.read_bytes() + repr(stand_ins).encode()).hexdigest()[:16]
    directory = _cache(environment) / "nogpu" / key
    try:
        trust.check((directory.parent.parent, directory.parent, directory), environment)
    except trust.UntrustedError as error:
        raise StandInsError(str(error)) from error
    if directory.is_dir():
        return directory
    if compiler is None:
        raise StandInsError(
            f"recording without a GPU needs a C compiler once, and {f'CC={named}' if named else 'cc'} is not there: "
            "install gcc, or set CC"
        )

    def compile_all(place: Path) -> None:
        for each in stand_ins:
            _compile(compiler, each, place)

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        files.publish(directory, compile_all, directory.parent / "tmp")
    except OSError as error:
        raise StandInsError(
            f"{directory}: {error.strerror or error}: {files.hint(error)}, or set XDG_CACHE_HOME"
        ) from error
    return directory


def _compile(compiler: str, stand_in: StandIn, place: Path) -> None:
    command = [compiler, "-w", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(place / stand_in.file), "-ldl"]
    command += [f"-DSTANDS_FOR_{part}" for part in stand_in.parts]
    command += [f"-Wl,-soname,{stand_in.file}"]
    if stand_in.version:
        versions = place / f"{stand_in.file}.map"
        versions.write_text(f"{stand_in.version} {{ global: *; }};\n", encoding="utf-8")
        command += [f"-Wl,--version-script={versions}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise StandInsError(f"{compiler}: {error}") from error
    if done.returncode != 0:
        raise StandInsError(f"{compiler} cannot compile the stand-ins: {first_line(done.stderr)}")


def _cache(environment: Mapping[str, str]) -> Path:
    # os.path: Path.expanduser raises where there is no home.
    root = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(root) / "sglang-warmstart"
