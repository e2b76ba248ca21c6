"""Load DeepGEMM's host library on top of the stand-ins. A process that has done so is of no other use.

What is loaded is bounded. A library is loaded only if it is known to the byte, this torch is one that it was tried
with, and every symbol of CUDA that it asks for has a stand-in.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_warmstart.base.errors import first_line
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu import build, symbols
from sglang_warmstart.deepgemm.nogpu.build import BESIDE_CPU_TORCH, BESIDE_CUDA_TORCH, StandIn, StandInsError
from sglang_warmstart.deepgemm.nogpu.symbols import SymbolsError

LIBRARY = "_C.so"
# Of a process that records: where DeepGEMM is, if this Python would not import it.
PLACE = "SGLANG_WARMSTART_NOGPU_DEEP_GEMM"
# Of the properties that select no kernel; see standins.c.
_L2_BYTES, _SHARED_BYTES = 50 << 20, 232448


@dataclass(frozen=True)
class Known:
    """A library that was tried.

    Args:
        version: of DeepGEMM.
        torch: releases of torch with which it was loaded and recorded from. Which releases were compared with a GPU:
            docs/bundles.md.
        door: how tensors get in: by tvm-ffi; by tvm-ffi, and they are asked whether they are CUDA's; or by operators
            registered with torch, and they are asked.
        same_on: GPUs (capability and SMs) on which it recorded the same kernels as here, to the byte:
            test/gpu/results/nogpu.json.
    """

    version: str
    torch: tuple[str, ...]
    door: Literal["tvm-ffi", "tvm-ffi, asked", "operators"]
    same_on: tuple[tuple[int, int, int], ...] = ()


# H100 and H200: the same to DeepGEMM.
_HOPPER = ((9, 0, 132),)


# By the first digits of the library's SHA-256. `test/soak/deepgemm/test_every_release.py` tries each.
KNOWN: Mapping[str, Known] = {
    "b644ec8d0c997607": Known("0.1.0", ("2.11",), "tvm-ffi", _HOPPER),
    "4418d9e97b18b080": Known("0.1.2", ("2.11",), "tvm-ffi"),
    "28b5714810482090": Known("0.1.3", ("2.11",), "tvm-ffi"),
    "0901459aa5687df5": Known("0.1.4", ("2.11",), "tvm-ffi"),
    "cd8beab174071777": Known("0.1.4.post1", ("2.11",), "tvm-ffi", _HOPPER),
    "ab8dc0accf34adbd": Known("0.1.5.post1", ("2.11",), "tvm-ffi", _HOPPER),
    "515c88f93d5d663f": Known("0.1.5.post2", ("2.13",), "tvm-ffi"),
    "05595c48dc5c481c": Known("0.1.5.post3", ("2.13",), "tvm-ffi"),
    "e0bda11c32f2657b": Known("0.1.6", ("2.13",), "tvm-ffi, asked"),
    "481a85fa593cf1f5": Known("0.1.7", ("2.13",), "tvm-ffi, asked"),
    "22497d838d7f1c18": Known("0.2.0", ("2.13",), "tvm-ffi, asked"),
    "973f431d3bc47502": Known("0.2.1", ("2.13",), "tvm-ffi, asked"),
    "6b49a6012725f4f6": Known("0.2.1.post1", ("2.13",), "tvm-ffi, asked"),
    "07577179e26167d7": Known("0.2.2", ("2.13",), "tvm-ffi, asked"),
    "45664874e1f5e5e3": Known("0.2.3", ("2.13",), "operators"),
    "481bbb33419a4ddd": Known("0.2.3.post2", ("2.13", "2.14"), "operators", _HOPPER),
    "d4ca02ed2a448211": Known("0.2.5", ("2.13",), "operators"),
}


def known_at(deep_gemm: Path, torch_version: str) -> Known:
    """What is known of an installed DeepGEMM.

    Args:
        deep_gemm: the directory of the package.
        torch_version: of the torch that it would be loaded into.

    Raises:
        StandInsError: it is not there, not known, or was not tried with that torch.
    """
    library = deep_gemm / LIBRARY
    try:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise StandInsError(f"{library}: {error.strerror}: this DeepGEMM has no host library") from error
    known = KNOWN.get(digest)
    if known is None:
        raise StandInsError(
            f"{library} (SHA-256 {digest}...) is none of the releases of sgl-deep-gemm that were tried without a GPU: "
            f"{', '.join(each.version for each in KNOWN.values())}"
        )
    release = ".".join(torch_version.split(".")[:2])
    if release not in known.torch:
        raise StandInsError(
            f"sgl-deep-gemm {known.version} was tried without a GPU with torch {' and '.join(known.torch)}, "
            f"and this is torch {torch_version}"
        )
    return known


@dataclass(frozen=True)
class Fit:
    """A DeepGEMM that can be loaded on top of the stand-ins.

    Args:
        known: of it.
        stand_ins: those that torch's build leaves out.
        directory: where they are.
    """

    known: Known
    stand_ins: tuple[StandIn, ...]
    directory: Path


def fitting(deep_gemm: Path, environment: Mapping[str, str]) -> Fit:
    """Check a DeepGEMM against torch and the stand-ins, which are built if need be. Nothing is loaded.

    Args:
        deep_gemm: the directory of the package.
        environment: says where the stand-ins are built.

    Raises:
        StandInsError: it cannot be loaded on top of them.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise StandInsError("recording without a GPU needs torch, and it is not installed")
    beside_cuda = (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").is_file()
    known = known_at(deep_gemm, importlib.metadata.version("torch"))
    stand_ins = BESIDE_CUDA_TORCH if beside_cuda else BESIDE_CPU_TORCH
    directory = build.build(stand_ins, environment)
    _check_symbols(deep_gemm / LIBRARY, [directory / each.file for each in stand_ins], _OURS if beside_cuda else "")
    return Fit(known, stand_ins, directory)


class Host:
    """DeepGEMM in this process, on top of the stand-ins.

    Args:
        deep_gemm: the directory of the package; the parent is put on the path of this process.
        environment: says where the stand-ins are built.

    Raises:
        StandInsError: it cannot be had; this process is as it was, or is to end.
    """

    def __init__(self, deep_gemm: Path, environment: Mapping[str, str]) -> None:
        fit = fitting(deep_gemm, environment)
        beside_cuda = fit.stand_ins is BESIDE_CUDA_TORCH
        if "torch" in sys.modules and beside_cuda:
            raise StandInsError("torch is loaded: the stand-ins have to be before it")
        known, stand_ins, directory = fit.known, fit.stand_ins, fit.directory
        # Those of torch itself come after it, because they ask for nothing and it might look for them.
        late = ("libc10_cuda.so", "libtorch_cuda.so")
        mode = os.RTLD_NOW | (os.RTLD_GLOBAL if beside_cuda else os.RTLD_LOCAL)
        loaded = {each.file: _load(directory / each.file, mode) for each in stand_ins if each.file not in late}
        maker = next(each for each in loaded.values() if hasattr(each, "warmstart_describe"))
        self._describe = maker.warmstart_describe
        self.describe(Gpu("", 132, (9, 0), 0))
        try:
            importlib.import_module("torch")
            for each in stand_ins:
                if each.file in late:
                    _load(directory / each.file, mode)
            if str(deep_gemm.parent) not in sys.path:
                sys.path.insert(0, str(deep_gemm.parent))
            self.deep_gemm: Any = importlib.import_module("deep_gemm")
        except (ImportError, OSError) as error:
            reason = first_line(error.__cause__ or error)
            raise StandInsError(f"sgl-deep-gemm {known.version} cannot be loaded: {reason}") from error
        if known.door != "tvm-ffi":
            self._open(known, maker)

    def _open(self, known: Known, maker: ctypes.CDLL) -> None:
        from sglang_warmstart.deepgemm.nogpu.marked import Door, MarkError, Marks, OnCpu

        try:
            marks = Marks()
        except MarkError as error:
            raise StandInsError(str(error)) from error
        self._kept: list[object] = [OnCpu(marks)]
        if known.door == "operators":
            self._kept.append(Door("deep_gemm", marks))
        else:
            maker.warmstart_mark(
                ctypes.c_long(marks.keys_at), ctypes.c_uint64(marks.bits), ctypes.c_long(marks.device_at)
            )

    def describe(self, gpu: Gpu, other_bytes: int = 0) -> None:
        """Be this GPU from now on. DeepGEMM asks once, at its first call.

        Args:
            other_bytes: fills what no kernel depends on.
        """
        major, minor = gpu.capability
        self._describe(gpu.num_sms, major, minor, _L2_BYTES, _SHARED_BYTES, other_bytes)


@functools.cache
def _host(deep_gemm: Path) -> Host | StandInsError:
    try:
        return Host(deep_gemm, os.environ)
    except StandInsError as error:
        return error


def host_of(deep_gemm: Path) -> Host:
    """That of this process, which can load it once: a second try would fail for what the first one has left.

    Raises:
        StandInsError: it cannot be had.
    """
    found = _host(deep_gemm)
    if isinstance(found, StandInsError):
        raise found
    return found


# Beside a torch for CUDA, the other libraries that DeepGEMM is linked to are there; these have to be stood in for.
_OURS = r"cuda[A-Z]|_ZNK?3c104cuda|aoti_"


def _check_symbols(library: Path, stand_ins: list[Path], only: str) -> None:
    try:
        asked = {name for name in symbols.undefined(library) if re.match(only, name)}
        offered = set().union(*map(symbols.defined, stand_ins))
    except SymbolsError as error:
        raise StandInsError(str(error)) from error
    if missing := sorted(asked - offered):
        raise StandInsError(f"{library} asks for {missing[0]}, which has no stand-in ({len(missing)} in all)")


def _load(path: Path, mode: int) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise StandInsError(f"a stand-in cannot be loaded: {error}") from error
