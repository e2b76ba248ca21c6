"""The plugin in this process, the GPU that the features ask for, and a real model runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from kit.gpu_standins import CudaOnCpu, CudaRuntime, DeepGemm, install_deep_gemm
from kit.runner import make_runner

from sglang_warmstart import plugin as plugin_module
from sglang_warmstart.patch import mend_copies
from sglang_warmstart.plugin import Plugin
from sglang_warmstart.switches import STRICT, WARMSTART

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[Plugin]:
    """The plugin as SGLang loads it; after the module SGLang is as it was."""
    from sglang.srt.environ import Envs
    from sglang.srt.utils import common

    assert plugin_module.loaded_plugin() is None, "a test before this one left the plugin loaded"
    configure_logger = common.configure_logger
    plugin_module.register()
    loaded = plugin_module.loaded_plugin()
    assert loaded is not None
    yield loaded
    for installation in reversed(loaded.installations):
        installation.missing.clear()  # what it still waits for may be imported later
        installation.patch.undo()
    for switch in (WARMSTART, STRICT):
        delattr(Envs, switch.name)
    mend_copies(common.configure_logger, configure_logger)
    plugin_module._loaded = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaRuntime]:
    """One GPU, of 132 SMs unless a test sets another count; its tensors are on the CPU."""
    with CudaOnCpu():
        yield CudaRuntime(monkeypatch)


@pytest.fixture
def compile_utils(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's DeepGEMM warm-up as it is at start-up; what a test makes of it is forgotten."""
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils

    for name in ("_BUILTIN_M_LIST", "_DO_COMPILE_ALL", "_IS_FIRST_RANK_ON_NODE"):
        monkeypatch.setattr(compile_utils, name, getattr(compile_utils, name))
    monkeypatch.setattr(compile_utils, "_INITIALIZATION_DICT", {})
    return compile_utils


@pytest.fixture
def deep_gemm(
    cuda: CudaRuntime, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> DeepGemm:
    """DeepGEMM installed beside an SGLang that uses it, with a cache of its own."""
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    return install_deep_gemm(monkeypatch)


@pytest.fixture(scope="module")
def runner(tiny_model: Path, plugin: Plugin) -> Iterator[ModelRunner]:
    """A real ModelRunner of a two-layer Llama on CPU; one for all tests of a module: change it through `monkeypatch`."""
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    yield make_runner(tiny_model, server_args={"max_running_requests": 16})
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def deepseek_v4(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's DeepSeek-V4 model, ready to be built from `TINY`: a runner has set up the process groups."""
    from sglang.srt.models import deepseek_v4

    monkeypatch.setattr(deepseek_v4, "_FP8_WO_A_GEMM", False)  # SGLANG_OPT_FP8_WO_A_GEMM: needs an fp8 checkpoint
    return deepseek_v4
