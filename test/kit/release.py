"""The SGLang releases that the tests know how to start without a GPU, and what differs between them."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """Everything about one SGLang release that a caller of the kit would otherwise have to branch on."""

    version: str

    def since(self, version: str) -> bool:
        """Whether this is that release or a later one."""
        return _numbers(self.version) >= _numbers(version)

    @property
    def standins(self) -> tuple[Path, ...]:
        """What it imports on every device, and a machine without a GPU does not have."""
        standins = Path(__file__).parent / "standins"
        # The later ones look whether there is a sgl_kernel, and would call it.
        return (standins / "common",) if self.since("0.5.20") else (standins / "common", standins / "sgl_kernel_only")

    @property
    def server_args(self) -> Mapping[str, object]:
        """The prefill graph needs a GPU; the switch that turns it off got a new name."""
        return {"disable_prefill_cuda_graph" if self.since("0.5.14") else "disable_piecewise_cuda_graph": True}

    @property
    def dtype_key(self) -> str:
        """How the model's config.json names its dtype: follows the transformers that it runs with."""
        return "dtype" if self.since("0.5.20") else "torch_dtype"

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables without which it does not start here."""
        return {"SGLANG_CPU_OMP_THREADS_BIND": _one_core_per_stage()} if self.since("0.5.19") else {}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _one_core_per_stage() -> str:
    """Two stages on one NUMA node: SGLang insists on one node per rank unless the cores are given."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[1 % len(cores)]}"


# Those of `make test-matrix`. Between two of them, no release moved anything that a feature touches.
VERSIONS = ("0.5.12", "0.5.13", "0.5.14", "0.5.17", "0.5.18", "0.5.19", "0.5.21", "0.5.23")
RELEASES: Mapping[str, Release] = {version: Release(version) for version in VERSIONS}


def installed_release() -> Release:
    """The release of the SGLang that the tests run on: installed beside them, or before that on the Python path."""
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
