"""The place where a bundle is unpacked, if nobody names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sglang_warmstart.bundle import toolchain
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.restore import Place


def place_of(environment: Mapping[str, str], cache: Path, deep_gemm: Path | None) -> Place:
    """Where a bundle is unpacked for a server with this environment.

    Args:
        cache: root of DeepGEMM's cache.
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
    return Place(cache.absolute(), package.absolute(), environment)
