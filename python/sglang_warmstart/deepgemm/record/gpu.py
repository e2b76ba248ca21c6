"""Call DeepGEMM in a recording child. The forkserver imports this module once, so that a child need not.

The import must not touch CUDA: a process that has initialised CUDA cannot fork a child that uses it.
"""

from __future__ import annotations

import os

import deep_gemm  # noqa: F401  (imported for the children)
import torch

from sglang_warmstart.deepgemm import gemms
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import Target


def open_device(gpu: Gpu) -> None:
    """Get a CUDA context on the rank's GPU.

    Raises:
        RuntimeError: there is none to be had.
    """
    if gpu.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.visible
    torch.cuda.set_device(gpu.ordinal)
    torch.empty(1, device="cuda")
    found = torch.cuda.get_device_properties(gpu.ordinal)
    if (found.name, found.multi_processor_count) != (gpu.name, gpu.num_sms):
        raise RuntimeError(f"device {gpu.ordinal} is {found.name}, the rank has {gpu.name}")


def prepare(target: Target, m_max: int) -> gemms.Call:
    """A function that calls DeepGEMM for an M of ``target`` on operands that need not exist."""
    return gemms.prepare(target, m_max)
