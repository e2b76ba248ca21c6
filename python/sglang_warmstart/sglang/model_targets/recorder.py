"""A stand-in for DeepGEMM that notes which GEMMs are called, and calls none."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_warmstart.deepgemm.door import answer_with_zeros, check_names, named
from sglang_warmstart.deepgemm.gemms import FUNCTIONS, Gemm, UnsupportedCallError, gemm_of_call
from sglang_warmstart.deepgemm.identity import Gpu
from sglang_warmstart.deepgemm.target import Target

# Rows of a group in the contiguous layout, and the columns that TMA wants scales padded to.
_ALIGNMENT = 128
_TMA_BYTES = 16
_HOPPER = 9


@dataclass
class Recorder:
    """What a rank calls of DeepGEMM.

    Args:
        gpu: of the rank.
        m_max: the largest number of rows.
    """

    gpu: Gpu
    m_max: int = 0
    targets: dict[Target, None] = field(default_factory=dict)
    # GEMMs of the call under way that no target can say.
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_sms = self.gpu.num_sms

    def met(self, gemm: Gemm, arguments: dict[str, Any]) -> None:
        """A GEMM is called."""
        answer_with_zeros(gemm, arguments)
        try:
            check_names(gemm, arguments)
            target = gemm.target(arguments, self.num_sms, self.m_max, _ALIGNMENT)
        except UnsupportedCallError as error:
            self.unknown.append(f"{gemm.function}: {error}")
        else:
            self.targets.setdefault(target)

    def modules(self) -> dict[str, types.ModuleType]:
        """What SGLang imports as ``deep_gemm``, by name."""
        library = _Library("deep_gemm", self)
        found = {name: types.ModuleType(name) for name in ("deep_gemm.utils", "deep_gemm.utils.layout")}
        found = {"deep_gemm": library, **found}
        for name, module in found.items():
            vars(module).update(_HELPERS, __path__=[])
            if self.gpu.capability[0] == _HOPPER:
                vars(module).update(_HELPERS_ON_HOPPER)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(found[parent], last, module)
        return found


class _Library(types.ModuleType):
    """``deep_gemm``: the GEMMs that are known, and any other name as a function that is noted as unknown."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        super().__init__(name)
        self._recorder = recorder
        for function in FUNCTIONS:
            setattr(self, function, self._noting(function))

    def get_num_sms(self) -> int:
        return self._recorder.num_sms

    def set_num_sms(self, num_sms: int) -> None:
        self._recorder.num_sms = num_sms

    def _noting(self, function: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            gemm = gemm_of_call(function, kwargs.get("recipe"))
            self._recorder.met(gemm, named(gemm, args, kwargs))

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*_args: Any, **_kwargs: Any) -> None:
            self._recorder.unknown.append(f"{name}: no target is known for it")

        return call


def _tma_aligned_size(size: int, element_size: int) -> int:
    step = _TMA_BYTES // element_size
    return -(-size // step) * step


def _tma_aligned(scale: Any) -> Any:
    """The scales, M-major with padded columns. Source: ``csrc/apis/layout.hpp`` of DeepGEMM, as the next one."""
    *groups, rows, columns = scale.shape
    aligned = _tma_aligned_size(rows, scale.element_size())
    padded = scale.new_empty((*groups, columns, aligned))
    return padded.transpose(-1, -2)[..., :rows, :]


def _packed(scale: Any) -> Any:
    """The same with the exponents of four scales in one number."""
    import torch

    *groups, rows, columns = scale.shape
    return _tma_aligned(scale.new_empty((*groups, rows, -(-columns // 4)), dtype=torch.int32))


# Functions of DeepGEMM that launch no GEMM: SGLang lays out scales with them, or says how kernels are launched.
_HELPERS = {
    "set_pdl": lambda *_: None,
    "get_mk_alignment_for_contiguous_layout": lambda: _ALIGNMENT,
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": _packed,
    "get_mn_major_tma_aligned_tensor": _tma_aligned,
    "get_tma_aligned_size": _tma_aligned_size,
}
# On Blackwell the number of rows decides it, so a target of one alignment would not say it.
_HELPERS_ON_HOPPER = {
    "get_theoretical_mk_alignment_for_contiguous_layout": lambda *_args, **_kwargs: _ALIGNMENT,
    "set_mk_alignment_for_contiguous_layout": lambda _alignment: None,
}
