"""What the features ask of a GPU, on a CPU: the CUDA runtime, DeepGEMM, and the two TileLang kernels of mHC.

Nothing of SGLang is stood in here. DeepGEMM's stand-in computes what the library computes, with torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from sglang_warmstart.deepgemm.target import LhsScale, Target
from torch.overrides import TorchFunctionMode

from kit.release import installed_release
from kit.standin_library import Jit, kernels_of

_MEMORY = 80 << 30
# Columns, and rows of the right operand, that share a scale.
_BLOCK = 128


@dataclass
class _HostArray:
    """What numpy reads of a foreign array: like its CUDA counterpart, the shape is taken for granted."""

    __array_interface__: dict[str, Any]


class CudaOnCpu(TorchFunctionMode):
    """Tensors that are made with ``device="cuda"`` or in pinned memory are made on the CPU, as others are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.as_tensor and hasattr(args[0], "__cuda_array_interface__"):
            args = (numpy.asarray(_HostArray(args[0].__cuda_array_interface__)), *args[1:])
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class CudaRuntime:
    """The functions of ``torch.cuda`` that SGLang and the features ask, answered as by one GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = "NVIDIA H200"
        self.multi_processor_count = 132
        self.capability = (9, 0)
        self.free_memory = _MEMORY
        self.is_capturing = False
        self.synchronizations = 0
        stream = SimpleNamespace(synchronize=self._synchronize, wait_stream=lambda _: None)
        for name, answer in {
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda *_: stream,
            "empty_cache": lambda: None,
            "get_device_properties": self._properties,
            "is_current_stream_capturing": lambda: self.is_capturing,
            "mem_get_info": lambda *_: (self.free_memory, _MEMORY),
            "memory_allocated": lambda *_: 0,
            "memory_reserved": lambda *_: 0,
            "synchronize": self._synchronize,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def _properties(self, *_: object) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            multi_processor_count=self.multi_processor_count,
            is_integrated=False,
        )

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
    num_sms: int
    m: int
    num_splits: int | None = None


# An operand with its scales.
Scaled = tuple[torch.Tensor, torch.Tensor]


@dataclass
class DeepGemm:
    """A module ``deep_gemm`` of which ``module`` is the import, and a record of the calls that reached it.

    Args:
        directory: of the package.
        jit: what has the kernel of each call built before the call; without it there are none.
    """

    directory: Path = Path("/nonexistent")
    jit: Jit | None = None
    module: ModuleType = field(default_factory=lambda: ModuleType("deep_gemm"))
    calls: list[Gemm] = field(default_factory=list)
    compile_mode: int = 0
    num_sms: int = 132
    alignment: int = 128
    # Raised by the next GEMM instead of computing.
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.module.__spec__ = ModuleSpec("deep_gemm", None)
        self.module.__file__ = str(self.directory / "__init__.py")
        for function in (
            self.tf32_hc_prenorm_gemm,
            self.bf16_gemm_nt,
            self.fp8_gemm_nt,
            self.fp8_fp4_gemm_nt,
            self.m_grouped_fp8_gemm_nt_contiguous,
            self.fp8_m_grouped_gemm_nt_masked,
            self.m_grouped_bf16_gemm_nt_contiguous,
            self.m_grouped_bf16_gemm_nt_masked,
            self.get_compile_mode,
            self.set_compile_mode,
            self.get_num_sms,
            self.set_num_sms,
            self.get_mk_alignment_for_contiguous_layout,
        ):
            # A function as the library exports it: nobody can tell that it has a `self`.
            setattr(self.module, function.__name__, _plain(function))

    def get_compile_mode(self) -> int:
        return self.compile_mode

    def set_compile_mode(self, mode: int) -> None:
        self.compile_mode = mode

    def get_num_sms(self) -> int:
        return self.num_sms

    def set_num_sms(self, num_sms: int) -> None:
        self.num_sms = num_sms

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return self.alignment

    def fp8_gemm_nt(self, a: Scaled, b: Scaled, d: torch.Tensor, **words: Any) -> None:
        """``d = a @ b.T``"""
        self._record("fp8_gemm_nt", *a, *b, d)
        (m, k), n = a[0].shape, b[0].shape[0]
        block = words.get("recipe", (1, _BLOCK, _BLOCK))[-1]
        _check_scales(a, b, block)
        assert b[0].shape == (n, k) and d.shape == (m, n)
        d.copy_(_dequantized(a, 1, block) @ _dequantized(b, block, block).T)

    def fp8_fp4_gemm_nt(self, a: Scaled, b: Scaled, d: torch.Tensor, **words: Any) -> None:
        """``d = a @ b.T`` with a scale for each row and block of columns of either."""
        self._record("fp8_fp4_gemm_nt", *a, *b, d)
        left, right = (_dequantized(each, *words[name]) for each, name in ((a, "recipe_a"), (b, "recipe_b")))
        d.copy_(left @ right.T)

    def m_grouped_fp8_gemm_nt_contiguous(
        self, a: Scaled, b: Scaled, d: torch.Tensor, m_indices: torch.Tensor, **words: Any
    ) -> None:
        """``d = a @ b[m_indices].T``, row by row."""
        self._record("m_grouped_fp8_gemm_nt_contiguous", *a, *b, d, m_indices)
        (m, k), (num_groups, n, _) = a[0].shape, b[0].shape
        _check_scales(a, b)
        assert b[0].shape == (num_groups, n, k) and d.shape == (m, n)
        assert m_indices.shape == (m,) and m_indices.dtype == torch.int32
        for group in m_indices.unique().tolist():
            rows = m_indices == group
            d[rows] = (_dequantized(a, 1)[rows] @ _dequantized((b[0][group], b[1][group]), _BLOCK).T).to(d.dtype)

    def fp8_m_grouped_gemm_nt_masked(
        self, a: Scaled, b: Scaled, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int, **words: Any
    ) -> None:
        """``d[i] = a[i] @ b[i].T`` for the first masked_m[i] rows of each group."""
        self._record("fp8_m_grouped_gemm_nt_masked", *a, *b, d, masked_m, expected_m=expected_m)
        (num_groups, m, k), n = a[0].shape, b[0].shape[1]
        _check_scales(a, b)
        assert b[0].shape == (num_groups, n, k) and d.shape == (num_groups, m, n)
        assert masked_m.shape == (num_groups,) and masked_m.dtype == torch.int32
        for group, rows in enumerate(masked_m.tolist()):
            if rows:
                left, right = (a[0][group, :rows], a[1][group, :rows]), (b[0][group], b[1][group])
                d[group, :rows] = (_dequantized(left, 1) @ _dequantized(right, _BLOCK).T).to(d.dtype)

    def m_grouped_bf16_gemm_nt_contiguous(
        self, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, grouped_layout: torch.Tensor
    ) -> None:
        """``d = a @ b[grouped_layout].T``, row by row."""
        self._record("m_grouped_bf16_gemm_nt_contiguous", a, b, d, grouped_layout)
        for group in grouped_layout.unique().tolist():
            rows = grouped_layout == group
            d[rows] = (a[rows].float() @ b[group].float().T).to(d.dtype)

    def m_grouped_bf16_gemm_nt_masked(
        self, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int
    ) -> None:
        """``d[i] = a[i] @ b[i].T`` for the first masked_m[i] rows of each group."""
        self._record("m_grouped_bf16_gemm_nt_masked", a, b, d, masked_m, expected_m=expected_m)
        for group, rows in enumerate(masked_m.tolist()):
            if rows:
                d[group, :rows] = (a[group, :rows].float() @ b[group].float().T).to(d.dtype)

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

    def _record(
        self, name: str, *tensors: torch.Tensor, expected_m: int | None = None, num_splits: int | None = None
    ) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        m = shapes[0][0] if expected_m is None else expected_m
        if self.jit is not None:
            self._build_kernels(self.jit, name, tensors, m)
        self.calls.append(Gemm(name, shapes, dtypes, size, self.compile_mode, self.num_sms, m, num_splits))

    def _build_kernels(self, jit: Jit, name: str, tensors: tuple[torch.Tensor, ...], m: int) -> None:
        lhs, rhs, scale = tensors[0], tensors[2 if "fp8" in name else 1], tensors[1] if "fp8" in name else None
        called = Target(
            kernel_type=name,
            n=rhs.shape[-2],
            k=lhs.shape[-1],
            num_groups=1,
            num_sms=self.num_sms,
            m_max=m,
            lhs_scale="" if scale is None else _layout(scale),
        )
        for kernel in kernels_of(called, m):
            jit.build(kernel)


def _layout(lhs_scale: torch.Tensor) -> LhsScale:
    return "tma" if lhs_scale.stride(-2) == 1 and lhs_scale.stride(-1) % 4 == 0 else "k"


def _check_scales(lhs: Scaled, rhs: Scaled, block: int = _BLOCK) -> None:
    (*leading, m, k), n = lhs[0].shape, rhs[0].shape[-2]
    assert lhs[0].dtype == rhs[0].dtype == torch.float8_e4m3fn
    assert lhs[1].dtype == rhs[1].dtype == torch.float32
    assert lhs[1].shape == (*leading, m, -(-k // block))
    assert rhs[1].shape == (*rhs[0].shape[:-2], -(-n // block), -(-k // block))


def _dequantized(operand: Scaled, rows: int, block: int = _BLOCK) -> torch.Tensor:
    values, scales = operand
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(block, 1)
    return values.float() * spread[: values.shape[0], : values.shape[1]]


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    function.__name__ = method.__name__
    return function


def install_deep_gemm(monkeypatch: pytest.MonkeyPatch, deep_gemm: DeepGemm | None = None) -> DeepGemm:
    """Let ``import deep_gemm`` find the stand-in, and SGLang's DeepGEMM wrapper run as on a GPU that has it."""
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, configurer, entrypoint

    deep_gemm = deep_gemm or DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm.module)
    monkeypatch.setattr(configurer, "ENABLE_JIT_DEEPGEMM", True)
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
    mhc = mhc_module()
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


def mhc_module() -> Any:
    """SGLang's functions of mHC, which are elsewhere from 0.5.16 on."""
    moved = installed_release().since("0.5.16")
    return importlib.import_module("sglang.kernels.ops.layernorm.mhc" if moved else "sglang.srt.layers.mhc")
