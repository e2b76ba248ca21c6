"""The features in this process, the GPU that the features ask for, and a real model runner."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from kit.delivery import Delivery, delivered
from kit.gpu_standins import CudaOnCpu, CudaRuntime, DeepGemm, install_deep_gemm
from kit.node import Node
from kit.runner import make_runner
from kit.served_rank import ServedRank

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


@pytest.fixture(scope="module", autouse=True)
def delivery() -> Iterator[Delivery]:
    """The plugin as SGLang loads it, for the tests of one module, or what the patches have made of SGLang."""
    with delivered() as delivery:
        yield delivery


@pytest.fixture(autouse=True)
def started_anew(delivery: Delivery) -> None:
    """A process that has just been started: one that is a rank stays one."""
    delivery.start_again()


@pytest.fixture(autouse=True)
def feature_in_place(request: pytest.FixtureRequest, delivery: Delivery) -> None:
    """The feature that a module names as `FEATURE` is installed: what its tests see unchanged is so beside it."""
    name = getattr(request.module, "FEATURE", None)
    assert name is None or delivery.has(name), f"{name} is not in place"


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


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A process that has started the service. It outlives many ranks, each with a cache of its own."""
    with Node(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def rank(
    node: Node, cuda: CudaRuntime, compile_utils: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ServedRank:
    """This process as a rank that has not yet been started, with an empty cache."""
    return ServedRank(tmp_path, node, cuda, monkeypatch)


@pytest.fixture(scope="session")
def runner(tiny_model: Path) -> Iterator[ModelRunner]:
    """A real ModelRunner of a two-layer Llama on CPU. One for all tests: change it by `monkeypatch`."""
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    yield make_runner(tiny_model, server_args={"max_running_requests": 16})
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def set_attn_tp_size(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets SGLang count more attention TP ranks than there are. Nothing may be sent to them."""
    from sglang.srt.distributed import parallel_state

    def set_size(size: int) -> None:
        if not hasattr(runner, "kernel_warmup"):
            from sglang.srt.runtime_context import get_parallel

            monkeypatch.setattr(type(get_parallel()), "attn_tp_size", size, raising=False)
            return
        group = copy.copy(parallel_state.get_attn_tp_group())  # the only group there is: CP has the same one
        group.world_size = size
        monkeypatch.setattr(parallel_state, "_ATTN_TP", group)

    return set_size


@pytest.fixture
def set_cp_alignment(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets SGLang pad batches for context-parallel ranks that are not there."""

    def set_alignment(size: int) -> None:
        if hasattr(runner, "kernel_warmup") and hasattr(runner, "attn_cp_size"):
            monkeypatch.setattr(runner, "attn_cp_size", size)
        for name in ("sglang.srt.layers.cp.padding", "sglang.srt.layers.utils.cp_utils"):
            with suppress(ImportError):
                padding = importlib.import_module(name)
                if hasattr(padding, "get_cp_padding_align_size"):
                    monkeypatch.setattr(padding, "get_cp_padding_align_size", lambda: size)

    return set_alignment


@pytest.fixture
def decide(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets SGLang decide on other arguments. From 0.5.19 on they are in a context of the process."""
    with ExitStack() as stack:

        def decide(**arguments: object) -> None:
            if not hasattr(runner.server_args, "resolved_dict"):
                for name, value in arguments.items():
                    # Not by setattr, which the record refuses from 0.5.16 on.
                    monkeypatch.setitem(vars(runner.server_args), name, value)
                return
            from sglang.srt import runtime_context

            for name, value in arguments.items():
                for group in ("disagg", "spec", "parallel"):
                    with suppress(ValueError):
                        stack.enter_context(getattr(runtime_context, f"get_{group}")().override(**{name: value}))
                        break
                else:
                    raise ValueError(f"no group has {name}")

        yield decide


@pytest.fixture
def deepseek_v4(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's DeepSeek-V4 model, ready to be built from `TINY`: a runner has set up the process groups."""
    from sglang.srt.models import deepseek_v4

    monkeypatch.setattr(deepseek_v4, "_FP8_WO_A_GEMM", False)  # SGLANG_OPT_FP8_WO_A_GEMM: needs an fp8 checkpoint
    return deepseek_v4
