"""Each call of SGLang on Blackwell is recorded by each JIT of DeepGEMM, on each of its architectures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from kit.nogpu import BLACKWELL, RELEASES, Recorder
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of


@pytest.mark.parametrize("name", BLACKWELL)
@pytest.mark.parametrize(("gpu", "prefix"), [("b200", "&sm100_"), ("b300", "&sm100_"), ("rtx-pro-6000", "&sm120_")])
@pytest.mark.parametrize("version", RELEASES)
def test_the_kernel_is_of_the_types_and_blocks_of_the_target(
    tmp_path: Path, version: str, gpu: str, prefix: str, name: str
) -> None:
    target, seen = BLACKWELL[name]
    device = gpu_of(gpu)
    kernels = Recorder(version, tmp_path).record(msgspec.structs.replace(target, num_sms=device.num_sms), device)
    # Releases break lines differently.
    sources = [" ".join(kernel.source.split()) for kernel in kernels if "gemm_" in kernel.directory]
    assert sources
    for source in sources:
        assert prefix in source
        assert gpu == "rtx-pro-6000" or all(each in source for each in seen), source
