"""Let the linear layers of a model on CPU call SGLang's DeepGEMM wrapper, as they do on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang_warmstart.deepgemm.target import Target

from kit.release import installed_release
from kit.wrapped_gemms import (
    BF16,
    CONTIGUOUS,
    DENSE,
    MASKED,
    PRENORM,
    bf16,
    contiguous,
    dense,
    masked,
    prenorm,
    target,
)

if TYPE_CHECKING:
    import pytest

# (n, k) of the tiny Llama's layers: two of each, with the same shapes.
QKV, OUT, GATE_UP, DOWN = (192, 64), (64, 64), (256, 64), (64, 128)
SPLITS = 4


def _grouped(m: int, n: int, k: int) -> torch.Tensor:
    """As expert layers choose: by whether any rank extends."""
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    if get_is_extend_in_batch():
        return contiguous(m=128 * -(-m // 128), n=n, k=k)[:m]
    return masked(n=n, k=k)[0, :m]


def _calls_prenorm() -> bool:
    return installed_release().version == "0.5.12"


def _with_prenorm(m: int, n: int, k: int) -> torch.Tensor:
    if _calls_prenorm():
        prenorm(m=m, n=n, k=k, num_splits=SPLITS)
    return bf16(m=m, n=n, k=k)


@dataclass
class _Through:
    """In the place of a linear layer's method."""

    gemm: Callable[[int, int, int], torch.Tensor]
    outputs: list[torch.Tensor]

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        n, k = layer.weight.shape
        self.outputs.append(self.gemm(x.shape[0], n, k))
        return self.outputs[-1].to(x.dtype)


@dataclass
class DeepGemmModel:
    """A model whose linear layers call the wrapper, and what they got: numbers of no meaning."""

    outputs: list[torch.Tensor] = field(default_factory=list)

    def install(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> DeepGemmModel:
        """Change a tiny Llama; of a pipeline stage, the layers that it has."""
        for layer in model.model.layers:
            for path, gemm in _GEMMS.items():
                linear = layer
                for name in path.split("."):
                    linear = getattr(linear, name, None)
                if linear is not None:
                    monkeypatch.setattr(linear, "quant_method", _Through(gemm, self.outputs))
        return self


_GEMMS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "self_attn.qkv_proj": _with_prenorm,
    "self_attn.o_proj": lambda m, n, k: dense(m, n, k, lhs_scale="tma"),
    "mlp.gate_up_proj": _grouped,
    "mlp.down_proj": dense,
}


def targets_of_a_forward(extend: bool) -> list[Target]:
    """The targets that a forward calls, in the order of their first calls."""
    qkv, out, gate_up, down = ({"n": n, "k": k} for n, k in (QKV, OUT, GATE_UP, DOWN))
    return [
        *([target(PRENORM, num_groups=SPLITS, **qkv)] if _calls_prenorm() else []),
        target(BF16, **qkv),
        target(DENSE, lhs_scale="tma", **out),
        target(CONTIGUOUS if extend else MASKED, **gate_up),
        target(DENSE, **down),
    ]


def calls_of_a_forward() -> int:
    """Those of two layers, in which the prenorm comes beside the first GEMM."""
    return 2 * (len(_GEMMS) + _calls_prenorm())
