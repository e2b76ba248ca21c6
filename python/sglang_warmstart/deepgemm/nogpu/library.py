"""Call DeepGEMM in a recording child that touches no GPU. :mod:`sglang_warmstart.deepgemm.record.gpu` does.

The forkserver imports this module once, and each child describes its own GPU.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu.build import StandInsError
from sglang_warmstart.deepgemm.nogpu.host import PLACE, host_of
from sglang_warmstart.deepgemm.target import Target


def _place() -> Path:
    if named := os.environ.get(PLACE):
        return Path(named)
    spec = importlib.util.find_spec("deep_gemm")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else Path("deep_gemm")


_loaded = _place()
_host = host_of(_loaded)

from sglang_warmstart.deepgemm import gemms  # noqa: E402  (torch is loaded now)
from sglang_warmstart.deepgemm.nogpu.room import CpuRoom  # noqa: E402

# DeepGEMM keeps memory on the GPU for cuBLASLt, which no kernel of its JIT uses, unless this is set.
_NO_WORKSPACE = "DG_USE_TEMP_CUBLASLT_WORKSPACE"


def open_device(gpu: Gpu) -> None:
    """Be this GPU."""
    os.environ[_NO_WORKSPACE] = "1"
    _host.describe(gpu)


def prepare(target: Target, m_max: int) -> gemms.Call:
    """A function that calls DeepGEMM for an M of ``target`` on operands that do not exist.

    Raises:
        StandInsError: this process has loaded another DeepGEMM than the one that is wanted.
    """
    if _place() != _loaded:
        raise StandInsError(f"this process has loaded the DeepGEMM in {_loaded}, and not that in {_place()}")
    return gemms.prepare(target, m_max, CpuRoom())
