"""What the features ask of a GPU, on a CPU: the CUDA runtime, DeepGEMM, and the two TileLang kernels of mHC.

Nothing of SGLang is stood in here. DeepGEMM's stand-in computes what the library computes, with torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

_MEMORY = 80 << 30


class CudaOnCpu(TorchFunctionMode):
    """Tensors that are made with ``device="cuda"`` or in pinned memory are made on the CPU, as others are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class CudaRuntime:
    """The functions of ``torch.cuda`` that SGLang and the features ask, answered as by one GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.multi_processor_count = 132
        self.free_memory = _MEMORY
        self.synchronizations = 0
        stream = SimpleNamespace(synchronize=self._synchronize, wait_stream=lambda _: None)
        for name, answer in {
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda *_: stream,
            "empty_cache": lambda: None,
            "get_device_properties": self._properties,
            "mem_get_info": lambda *_: (self.free_memory, _MEMORY),
            "synchronize": self._synchronize,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def _properties(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=self.multi_processor_count, is_integrated=False)

    def _synchronize(self, *_: object) -> None:
        self.synchronizations += 1


@dataclass(frozen=True)
class Gemm:
    """One call of a GEMM: the shape and dtype of each tensor, in the order of the arguments."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    bytes: int
    compile_mode: int
    num_splits: int | None = None

    @property
    def m(self) -> int:
        """Rows of the left operand."""
        return self.shapes[0][0]


@dataclass
class DeepGemm:
    """A module ``deep_gemm`` of which ``module`` is the import, and a record of the calls that reached it."""

    module: ModuleType = field(default_factory=lambda: ModuleType("deep_gemm"))
    calls: list[Gemm] = field(default_factory=list)
    compile_mode: int = 0
    # Raised by the next GEMM instead of computing.
    failure: Exception | None = None

    def __post_init__(self) -> None:
        for function in (self.tf32_hc_prenorm_gemm, self.bf16_gemm_nt, self.get_compile_mode, self.set_compile_mode):
            # A function as the library exports it: nobody can tell that it has a `self`.
            setattr(self.module, function.__name__, _plain(function))

    def get_compile_mode(self) -> int:
        return self.compile_mode

    def set_compile_mode(self, mode: int) -> None:
        self.compile_mode = mode

    def bf16_gemm_nt(self, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        """``d = a @ b.T``"""
        self._record("bf16_gemm_nt", a, b, d)
        d.copy_(a.float() @ b.float().T)

    def tf32_hc_prenorm_gemm(
        self, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, sqr_sum: torch.Tensor, num_splits: int | None = None
    ) -> None:
        """``d = a @ b.T`` and the sums of squares of a's rows; with splits, each slice of d sums its part of k."""
        self._record("tf32_hc_prenorm_gemm", a, b, d, sqr_sum, num_splits=num_splits)
        assert a.shape[0] > 0, "the library refuses an empty left operand"
        assert all(tensor.is_contiguous() for tensor in (a, b, d, sqr_sum))
        (m, k), n, leading = a.shape, b.shape[0], () if num_splits is None else (num_splits,)
        assert b.shape == (n, k) and d.shape == (*leading, m, n) and sqr_sum.shape == (*leading, m)
        assert (a.dtype, b.dtype, d.dtype, sqr_sum.dtype) == (torch.bfloat16, *[torch.float32] * 3)
        for i, part in enumerate(torch.arange(k).tensor_split(num_splits or 1)):
            x = a[:, part].float()
            d.view(-1, m, n)[i] = x @ b[:, part].T
            sqr_sum.view(-1, m)[i] = x.square().sum(-1)

    def _record(self, name: str, *tensors: torch.Tensor, num_splits: int | None = None) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.calls.append(Gemm(name, shapes, dtypes, size, self.compile_mode, num_splits))


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    function.__name__ = method.__name__
    return function


def install_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    """Let ``import deep_gemm`` find the stand-in, and SGLang's DeepGEMM wrapper run as on a GPU that has it."""
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint

    deep_gemm = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm.module)
    for module in (compile_utils, entrypoint):
        monkeypatch.setattr(module, "ENABLE_JIT_DEEPGEMM", True)
        monkeypatch.setattr(module, "deep_gemm", deep_gemm.module, raising=False)
    return deep_gemm


@dataclass(frozen=True)
class FusedPrenorm:
    """One launch of the kernel that follows the prenorm GEMM."""

    gemm_out: torch.Tensor
    sqrsum: torch.Tensor
    residual: torch.Tensor
    norm_weight: torch.Tensor
    num_splits: int
    inference_mode: bool


def install_mhc_kernels(monkeypatch: pytest.MonkeyPatch) -> list[FusedPrenorm]:
    """Record the launches of mHC's fused kernel, and give ``hc_split_sinkhorn`` weights that follow its input."""
    from sglang.srt.layers import mhc

    launches: list[FusedPrenorm] = []

    def fused(*args: Any) -> None:
        (
            gemm_out,
            sqrsum,
            _,
            _,
            residual,
            *_,
        ) = args
        launches.append(FusedPrenorm(gemm_out, sqrsum, residual, args[8], args[16], torch.is_inference_mode_enabled()))

    def sinkhorn(
        mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, hc_mult: int, iterations: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pre, post, comb = mixes.split([hc_mult, hc_mult, hc_mult * hc_mult], dim=-1)
        return pre, post, comb.unflatten(-1, (hc_mult, hc_mult))

    def not_for_a_cpu(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel of TileLang that has no stand-in: compiling it without a GPU ends the process")

    for name in ("mhc_pre_big_fuse_tilelang", "mhc_pre_gemm_sqrsum_tilelang", "mhc_pre_gemm_sqrsum_splitk_kernel"):
        monkeypatch.setattr(mhc, name, not_for_a_cpu)
    monkeypatch.setattr(mhc, "mhc_pre_big_fuse_with_norm_tilelang", fused)
    monkeypatch.setattr(mhc, "hc_split_sinkhorn", sinkhorn)
    return launches
