"""The SGLang releases that the tests know how to start without a GPU, and what differs between them."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_STANDINS = Path(__file__).parent / "standins"


@dataclass(frozen=True)
class Release:
    """Everything about one SGLang release that a caller of the kit would otherwise have to branch on."""

    version: str
    standins: tuple[Path, ...]
    # The prefill graph needs a GPU; the switch that turns it off got a new name.
    server_args: Mapping[str, object]
    # How the model's config.json names its dtype: follows the transformers that the release is pinned to.
    dtype_key: str
    environment: Mapping[str, str] = field(default_factory=dict)


def _one_core_per_stage() -> str:
    """Two stages on one NUMA node: 0.5.23 insists on one node per rank unless the cores are given."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[1 % len(cores)]}"


SGLANG_0_5_12 = Release(
    version="0.5.12",
    standins=(_STANDINS / "common", _STANDINS / "sgl_kernel_only"),
    server_args={"disable_piecewise_cuda_graph": True},
    dtype_key="torch_dtype",
)

SGLANG_0_5_23 = Release(
    version="0.5.23",
    standins=(_STANDINS / "common",),
    server_args={"disable_prefill_cuda_graph": True},
    dtype_key="dtype",
    environment={"SGLANG_CPU_OMP_THREADS_BIND": _one_core_per_stage()},
)

RELEASES: Mapping[str, Release] = {release.version: release for release in (SGLANG_0_5_12, SGLANG_0_5_23)}


def installed_release() -> Release:
    """The release of the SGLang that is installed beside the tests."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("SGLang is not installed in this environment: `make test` makes one that has it") from None
    if version not in RELEASES:
        known = " and ".join(RELEASES)
        raise RuntimeError(f"the tests know how to start SGLang {known} without a GPU, but {version} is installed")
    return RELEASES[version]


def sglang_directory() -> Path:
    """Where the installed SGLang is. It is not imported."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def is_patched() -> bool:
    """Whether patches bring the features to the installed SGLang. Those for 0.5.23 leave that to the plugin."""
    module = sglang_directory() / "srt" / "layers" / "deep_gemm_wrapper" / "compile_utils.py"
    return module.is_file() and "EXACT_WARMUP" in module.read_text(encoding="utf-8")
