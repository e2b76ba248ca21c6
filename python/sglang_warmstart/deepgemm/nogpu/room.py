"""Where the tensors of a call lie if there is no GPU: in address space that has no memory behind it."""

from __future__ import annotations

import math
import mmap

import torch

_SPACE = 1 << 40
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: Python has no name for it


class CpuRoom:
    """Operands of any shape over address space; only stubs may run on them."""

    def __init__(self) -> None:
        space = mmap.mmap(-1, _SPACE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        self._buffer = torch.frombuffer(space, dtype=torch.uint8)

    def operand(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """See :class:`sglang_warmstart.deepgemm.gemms.Room`."""
        return self._buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def touched(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See :class:`sglang_warmstart.deepgemm.gemms.Room`."""
        return torch.empty(shape, dtype=dtype)

    def claimed(self) -> CpuRoom:
        """See :class:`sglang_warmstart.deepgemm.gemms.Room`."""
        return self
