"""DeepGEMM as it is installed where a server runs: in a directory of its own, with the build of the toolchain."""

from __future__ import annotations

from pathlib import Path

from kit.toolchain import toolchain


def install(site: Path) -> Path:
    """Put the toolchain's DeepGEMM into a directory of a Python path. Returns the directory of the package."""
    site.mkdir(parents=True)
    package = site / "deep_gemm"
    for path in (toolchain().deep_gemm, *toolchain().root.glob("sgl_deep_gemm-*.dist-info")):
        (site / path.name).symlink_to(path)
    return package
