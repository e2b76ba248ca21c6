"""Calls of the prenorm GEMM through SGLang's wrapper."""

from __future__ import annotations

import torch

N, K = 24, 256


class Prenorm:
    """Operands of one call through the wrapper, and what torch makes of the same ones."""

    def __init__(self, m: int, num_splits: int | None) -> None:
        self.num_splits = num_splits
        self.x = torch.randn(m, K).bfloat16()
        self.fn = torch.randn(N, K)
        leading = () if num_splits is None else (num_splits,)
        # Not zeros: a slice that is not written shows.
        self.out = torch.full((*leading, m, N), torch.nan)
        self.sqrsum = torch.full((*leading, m), torch.nan)

    def run(self) -> None:
        from sglang.srt.layers.deep_gemm_wrapper import entrypoint

        entrypoint.tf32_hc_prenorm_gemm(self.x, self.fn, self.out, self.sqrsum, self.num_splits)

    def check(self) -> None:
        x = self.x.float()
        out, sqrsum = (self.out, self.sqrsum) if self.num_splits is None else (self.out.sum(0), self.sqrsum.sum(0))
        torch.testing.assert_close(out, x @ self.fn.T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sqrsum, x.square().sum(-1), rtol=1e-4, atol=1e-3)
