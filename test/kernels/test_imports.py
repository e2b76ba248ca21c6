"""The pipeline knows nothing of SGLang, and needs torch and DeepGEMM only where it calls them."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest
import sglang_warmstart.kernels

# It is what a recording child calls DeepGEMM with.
CALLS_DEEP_GEMM = "deep_gemm_library"

MODULES = [each.name for each in pkgutil.iter_modules(sglang_warmstart.kernels.__path__)]

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sglang", "torch", "deep_gemm"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
__import__(sys.argv[1])
"""


@pytest.mark.by_plugin
@pytest.mark.parametrize("module", [name for name in MODULES if name != CALLS_DEEP_GEMM])
def test_a_module_of_the_pipeline_is_imported_without_sglang_torch_and_deep_gemm(module: str) -> None:
    command = [sys.executable, "-c", WITHOUT, f"sglang_warmstart.kernels.{module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
