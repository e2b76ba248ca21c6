"""The GPUs that can be planned for without one.

What selects a kernel is the number of SMs and the compute capability. A test fills every other property with nonsense,
and the same kernels are recorded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sglang_warmstart.deepgemm.identity import Gpu

# Name as its driver says it, SMs, compute capability. Source: NVIDIA's data sheets and architecture white papers.
GPUS: Mapping[str, tuple[str, int, tuple[int, int]]] = {
    "h20": ("NVIDIA H20", 78, (9, 0)),
    "h100": ("NVIDIA H100 80GB HBM3", 132, (9, 0)),
    "h100-pcie": ("NVIDIA H100 PCIe", 114, (9, 0)),
    "h200": ("NVIDIA H200", 132, (9, 0)),
    "gh200": ("NVIDIA GH200 480GB", 132, (9, 0)),
    "b200": ("NVIDIA B200", 148, (10, 0)),
    "gb200": ("NVIDIA GB200", 152, (10, 0)),
    "b300": ("NVIDIA B300", 148, (10, 3)),
    "gb300": ("NVIDIA GB300", 152, (10, 3)),
    "rtx-pro-6000": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, (12, 0)),
}


class UnknownGpuError(Exception):
    """A GPU that is not in the table, in one line that names those that are."""


def gpu_called(name: str) -> Gpu | None:
    """The GPU that its driver calls so; None if it is not in the table."""
    found = (Gpu(*each, 0) for each in GPUS.values() if each[0] == name)
    return next(found, None)


def gpu_of(word: str) -> Gpu:
    """The GPU of ``NAME`` or ``NAME:SMS``, such as ``h200`` or ``b200:146``.

    Raises:
        UnknownGpuError: it is not in the table, or the number is none.
    """
    name, colon, sms = word.strip().lower().partition(":")
    if name not in GPUS:
        raise UnknownGpuError(f"there is no GPU {word!r}, but {', '.join(GPUS)} (NAME:SMS for another number of SMs)")
    driver_name, num_sms, capability = GPUS[name]
    if colon:
        if not re.fullmatch(r"[1-9]\d{0,3}", sms):
            raise UnknownGpuError(f"{word!r}: the number of SMs is from 1 to 9999")
        num_sms = int(sms)
    return Gpu(driver_name, num_sms, capability, 0)
