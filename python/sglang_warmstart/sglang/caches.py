"""Where SGLang keeps what is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def deep_gemm_cache(environment: Mapping[str, str]) -> Path:
    """The root of DeepGEMM's cache of a server with this environment.

    Source: ``layers/deep_gemm_wrapper/compile_utils.py`` of SGLang.
    """
    named = environment.get("SGLANG_DG_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "deep_gemm"
