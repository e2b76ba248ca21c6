"""Tensors in the CPU's memory that say they are CUDA's.

DeepGEMM 0.1.6 and later asks each tensor whether it is CUDA's. torch answers that by the tensor's device, and chooses
an operator's kernel by bits of its set of dispatch keys. Both are changed when a tensor goes in at DeepGEMM's door: by
the stand-in that makes tensors (standins.c), or from 0.2.3 on, where DeepGEMM registers operators with torch, at each
operator. There they are changed back when the tensor comes out.

The bits become those of ``PrivateUse1``, which torch keeps free for others. So operators that DeepGEMM calls in between
come to a fallback here, which has the CPU's kernels do them. By the bits of CUDA they would come to CUDA's own kernels,
where torch is built with them.

The alternative, a dispatch mode in Python, sees every operator and takes ten times as long.

Source: ``c10/core/TensorImpl.h`` and ``c10/core/DispatchKeySet.h`` of torch. Where keys and device lie in a tensor is
looked for, not known, and tried before it is used.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_FREE = "PrivateUse1"
_BYTES = 256  # of a tensor's implementation that are looked at
_CPU_DEVICE, _CUDA_DEVICE, _META_DEVICE = (bytes((kind, index)) for kind, index in ((0, 255), (1, 0), (14, 255)))


class MarkError(Exception):
    """A tensor cannot be marked in this torch, in one line."""


class Marks:
    """Marks tensors of this process.

    Args (attributes):
        bits: of the dispatch keys that are changed.
        keys_at, device_at: where the keys and the device lie in a tensor's implementation.

    Raises:
        MarkError: the bit is not found where a tensor is expected to have it.
    """

    def __init__(self) -> None:
        keys = torch._C.DispatchKeySet
        cpu, free = (keys(getattr(torch._C.DispatchKey, each)).raw_repr() for each in ("CPU", _FREE))
        self.bits, self._free_bits = cpu ^ free, free & ~cpu
        probe, other = torch.empty(2), torch.empty(2, device="meta")
        here, there = _bytes_of(probe), _bytes_of(other)
        own = torch._C._dispatch_keys(probe).raw_repr().to_bytes(8, "little")
        self.keys_at = here.find(own)
        places = [
            at for at in range(_BYTES - 1) if (here[at : at + 2], there[at : at + 2]) == (_CPU_DEVICE, _META_DEVICE)
        ]
        if self.keys_at < 0 or len(places) != 1:
            raise MarkError(f"torch {torch.__version__}: a tensor's dispatch keys are not where they are expected")
        self.device_at = places[0]
        self.toggle(probe)
        marked = probe.is_cuda and probe.device == torch.device("cuda", 0)
        self.toggle(probe)
        if not marked or probe.is_cuda or probe.device.type != "cpu" or torch.add(probe, 1).shape != probe.shape:
            raise MarkError(f"torch {torch.__version__}: a tensor cannot be marked as CUDA's")

    def is_marked(self, tensor: torch.Tensor) -> bool:
        """Whether torch takes a tensor to the fallback.

        Not asked by its device: a view of a marked tensor in another dtype has its keys, and the device of the memory.
        """
        # This is on the path of every operator, and the first answer is the quicker one.
        return tensor.is_cuda or bool(
            ctypes.c_uint64.from_address(tensor._cdata + self.keys_at).value & self._free_bits
        )

    def toggle(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a tensor, or take the mark away. Returns it."""
        place = tensor._cdata
        word = ctypes.c_uint64.from_address(place + self.keys_at)
        word.value ^= self.bits
        device = (ctypes.c_char * 2).from_address(place + self.device_at)
        device.raw = _CUDA_DEVICE if word.value & self._free_bits else _CPU_DEVICE
        return tensor


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor._cdata, _BYTES)


class OnCpu:
    """Has operators of torch work on marked tensors, with the CPU's kernels, as long as it lives."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._all = torch.library.Library("_", "IMPL")
        self._all.fallback(self._call, _FREE)
        self._some = torch.library.Library("aten", "IMPL")
        # The one operator in use whose kernel is the same for all devices, and asks for the device itself.
        self._implement("copy_", torch.ops.aten.copy_.default, _FREE)
        # Those that make a tensor for a device, which is CUDA's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._implement("empty.memory_format", torch.ops.aten.empty.memory_format, "CUDA")
            self._implement("empty_strided", torch.ops.aten.empty_strided.default, "CUDA")

    def _implement(self, name: str, operator: Any, key: str) -> None:
        self._some.impl(name, partial(self._call, operator), key)

    def _call(self, operator: Any, *arguments: Any, **named: Any) -> Any:
        toggle, is_marked = self._marks.toggle, self._marks.is_marked
        marked = [each for each in arguments if isinstance(each, torch.Tensor) and is_marked(each)]
        if "out" in named:
            output = named["out"]  # it may be an input too
            marked += [output] * (is_marked(output) and all(output is not each for each in marked))
            arguments = _as_declared(operator, arguments)
        for each in marked:
            toggle(each)
        try:
            result = operator(*map(_here, arguments), **{name: _here(each) for name, each in named.items()})
        finally:
            for each in marked:
                toggle(each)
        # An operator that works in place gives back what it got, which bears its mark again.
        if isinstance(result, torch.Tensor) and not self._marks.is_marked(result):
            toggle(result)
        return result


class Door:
    """Lets the CPU's tensors in at the operators of a library, marked, as long as it lives.

    Args:
        namespace: of its operators, such as ``deep_gemm``.
    """

    def __init__(self, namespace: str, marks: Marks) -> None:
        self._marks = marks
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        self._operators = torch.library.Library(namespace, "IMPL")
        for full in torch._C._dispatch_get_all_op_names():
            if full.startswith(f"{namespace}::") and torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA"):
                name, _, overload = full.removeprefix(f"{namespace}::").partition(".")
                operator = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
                self._operators.impl(name, self._entrance(operator), "CPU")

    def _entrance(self, operator: Any) -> Callable[..., Any]:
        redispatch, toggle, keys = operator.redispatch, self._marks.toggle, self._keys

        def enter(*arguments: Any) -> Any:
            marked = [toggle(each) for each in arguments if isinstance(each, torch.Tensor)]
            try:
                return redispatch(keys, *arguments)
            finally:
                for each in marked:
                    toggle(each)

        return enter


def _as_declared(operator: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch hands a number on as such where the operator wants it as a tensor."""
    return tuple(
        torch.tensor(each) if type(each) is int and str(declared.type) == "Tensor" else each
        for each, declared in zip(arguments, operator._schema.arguments, strict=False)
    )


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value
