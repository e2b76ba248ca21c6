"""As `sglang_warmstart.deepgemm.nogpu.library`, with a GPU whose other properties are all nonsense."""

import os

from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.nogpu import library
from sglang_warmstart.deepgemm.nogpu.library import prepare

__all__ = ["open_device", "prepare"]


def open_device(gpu: Gpu) -> None:
    """Be this GPU, and `WARMSTART_TEST_OTHER_BYTES` in every byte that is not described."""
    library._host.describe(gpu, int(os.environ["WARMSTART_TEST_OTHER_BYTES"]))
