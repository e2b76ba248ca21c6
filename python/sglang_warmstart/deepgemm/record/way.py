"""How a rank's targets are recorded: without its GPU where that was shown to give the same kernels, else on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu import host
from sglang_warmstart.deepgemm.nogpu.build import StandInsError

ON_GPU = "sglang_warmstart.deepgemm.record.gpu"
WITHOUT_GPU = "sglang_warmstart.deepgemm.nogpu.library"


@dataclass(frozen=True)
class Way:
    """A way to record.

    Args:
        library: the module that calls DeepGEMM in recording children.
        reason: why it is not done without the GPU; empty if it is.
    """

    library: str
    reason: str = ""

    @property
    def takes_gpu(self) -> bool:
        """Whether a recording child has a CUDA context, and loads the stub."""
        return self.library != WITHOUT_GPU


def way_for(deep_gemm: Path, gpu: Gpu, environment: Mapping[str, str]) -> Way:
    """The way to record for a GPU with an installed DeepGEMM. The stand-ins are built if need be; nothing is loaded.

    Args:
        deep_gemm: the directory of the package.
        environment: says where the stand-ins are built.
    """
    try:
        known = host.fitting(deep_gemm, environment).known
    except StandInsError as error:
        return Way(ON_GPU, str(error))
    if (*gpu.capability, gpu.num_sms) not in known.same_on:
        return Way(ON_GPU, f"for sgl-deep-gemm {known.version} it was not compared with a GPU such as {gpu.name}")
    return Way(WITHOUT_GPU)
