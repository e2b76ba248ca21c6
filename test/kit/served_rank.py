"""A rank in this process: SGLang's wrapper, the plugin's hooks, a real service, and a stand-in for DeepGEMM."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec
import pytest
from sglang_warmstart.deepgemm.marker import Marker
from sglang_warmstart.deepgemm.target import Target

from kit.arguments import with_values
from kit.fake_nvcc import FakeNvcc
from kit.gpu_standins import CudaRuntime, DeepGemm, install_deep_gemm
from kit.node import Node
from kit.release import installed_release
from kit.standin_library import Jit, kernels_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

SERVICE = "SGLANG_WARMSTART_SERVICE"


class ServedRank:
    """All that a rank has, and what becomes of it.

    Args:
        directory: for the cache and the compiler.
        node: whose service the rank asks.
        cuda: the GPU.
    """

    def __init__(self, directory: Path, node: Node, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.layers.deep_gemm_wrapper import compile_utils

        self.cuda = cuda
        self.cache = directory / "kernels"
        self.nvcc = FakeNvcc(directory / "nvcc")
        self._compile_utils: ModuleType = compile_utils
        self._monkeypatch = monkeypatch
        for name, value in {
            SERVICE: str(node.socket),
            "DG_JIT_CACHE_DIR": str(self.cache),
            "DG_JIT_NVCC_COMPILER": str(self.nvcc.path),
        }.items():
            monkeypatch.setenv(name, value)
        package = directory / "deep_gemm"
        (package / "include" / "deep_gemm").mkdir(parents=True)  # what shows its dialect
        self.deep_gemm = install_deep_gemm(monkeypatch, DeepGemm(package, Jit(os.environ)))

    def connect(
        self, runner: ModelRunner, chunked_prefill_size: int = 8192, gpu_id: int = 0, node_rank: int = 0
    ) -> None:
        """What SGLang does when a model runner starts: from here on this process is a rank, if it can be one."""
        update_config(self._compile_utils, runner, chunked_prefill_size, gpu_id, node_rank)
        # What SGLang itself would sweep: a list of thousands is no different, and takes its time.
        self._compile_utils._BUILTIN_M_LIST = [1, 2, 3]

    @property
    def markers(self) -> list[Marker]:
        """The markers in the cache."""
        paths = self.cache.glob("warmstart/markers/*/*.json")
        return [msgspec.json.decode(path.read_bytes(), type=Marker) for path in sorted(paths)]

    @property
    def warmed(self) -> set[Target]:
        """The targets of all markers."""
        return {each.target for marker in self.markers for each in marker.targets}

    @property
    def calls(self) -> list[tuple[str, int]]:
        """The GEMMs that reached DeepGEMM: function and M."""
        return [(call.name, call.m) for call in self.deep_gemm.calls]


def update_config(
    compile_utils: ModuleType,
    runner: ModelRunner,
    chunked_prefill_size: int = 8192,
    gpu_id: int = 0,
    node_rank: int = 0,
) -> None:
    """What SGLang calls in a rank before it loads weights, where it has DeepGEMM."""
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    update = (entrypoint if compile_utils.ENABLE_JIT_DEEPGEMM else compile_utils).update_deep_gemm_config
    if not installed_release().since("0.5.19"):
        settings = {"chunked_prefill_size": chunked_prefill_size, "base_gpu_id": 0, "node_rank": node_rank}
        update(gpu_id, with_values(runner.server_args, **settings))
        return
    from sglang.srt.runtime_context import get_context

    settings = {"model_path": runner.server_args.model_path, "chunked_prefill_size": chunked_prefill_size}
    with get_context().override_server_args(**settings, base_gpu_id=0, node_rank=node_rank):
        update(gpu_id)


def compiled_for(*targets: Target) -> Counter[str]:
    """What a compiler has compiled if it has compiled each kernel of the targets once."""
    sources = {kernel.source for target in targets for m in target.m_values for kernel in kernels_of(target, m)}
    return Counter(source.splitlines()[0] for source in sources)


def representatives_of(target: Target) -> list[int]:
    """The Ms that load all kernels of a target."""
    first: dict[object, int] = {}
    for m in target.m_values:
        for kernel in kernels_of(target, m):
            first.setdefault(kernel, m)
    return sorted(set(first.values()))
