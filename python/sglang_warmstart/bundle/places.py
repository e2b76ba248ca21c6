"""Where things are if nobody names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sglang_warmstart.bundle import toolchain
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.restore import Place


def default_cache(environment: Mapping[str, str]) -> Path:
    """The root of DeepGEMM's cache of a server with this environment.

    Source: ``layers/deep_gemm_wrapper/compile_utils.py`` of SGLang.
    """
    named = environment.get("SGLANG_DG_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "deep_gemm"


def place_of(environment: Mapping[str, str], cache: Path | None, deep_gemm: Path | None) -> Place:
    """Where a bundle is unpacked for a server with this environment.

    Args:
        cache: root of DeepGEMM's cache, if it was named.
        deep_gemm: the directory of the package, if it was named.

    Raises:
        BundleError: DeepGEMM is not installed, and nobody says where it will be.
    """
    package = deep_gemm or toolchain.installed_deep_gemm()
    if package is None:
        raise BundleError(
            "DeepGEMM is not installed here: name the directory that the server will import it from with --deep-gemm"
        )
    # A relative path would come into the names of kernels as it is, and DeepGEMM's own is absolute.
    return Place((cache or default_cache(environment)).absolute(), package.absolute(), environment)
