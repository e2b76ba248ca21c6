"""What `make test-matrix` installs for a release of SGLang, beside its source: the DeepGEMM that it pins."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from kit.release import installed_release

_ROOT = Path(__file__).parents[2] / ".releases"
_MAKE = "run `make matrix-{}`, which installs it"


def pinned_deep_gemm() -> str:
    """The version of sgl-deep-gemm that the SGLang at hand requires."""
    required = "\n".join(importlib.metadata.requires("sglang") or ())
    found = re.search(r"^sgl-deep-gemm\s*==\s*([\w.]+)", required, re.MULTILINE)
    assert found is not None, "SGLang pins no DeepGEMM"
    return found[1]


def deep_gemm_of_the_release() -> Path:
    """The directory of the package, as SGLang's own wheel asks for it."""
    version = installed_release().version
    return _there(_ROOT / version / "deep-gemm" / "deep_gemm", version)


def torch_2_11() -> Path:
    """Where Python finds the torch that the libraries up to 0.1.5.post1 fit; see `kit.torch_without_cuda`."""
    return _there(_ROOT / "torch-2.11", installed_release().version)


def _there(path: Path, version: str) -> Path:
    assert path.is_dir(), f"{path} is not there: {_MAKE.format(version)}"
    return path
