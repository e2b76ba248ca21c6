"""We look for DeepGEMM's cache where SGLang and DeepGEMM themselves keep it, on this release and in any environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.fork_server import ForkServer
from kit.release import is_patched
from kit.toolchain import toolchain

if is_patched():
    pytest.skip("caches do not depend on the patches", allow_module_level=True)

# SGLang sets DeepGEMM's variable when the module is imported. An empty one DeepGEMM takes for none: ~/.deep_gemm
# (csrc/jit/compiler.hpp).
ASK = """
import importlib, os, sys
import sglang.srt.environ
from sglang.srt.layers.deep_gemm_wrapper import compile_utils
importlib.reload(sglang.srt.environ)  # 0.5.23 reads some of it when it is imported
os.environ.pop("DG_JIT_CACHE_DIR", None)
importlib.reload(compile_utils)
theirs = os.environ["DG_JIT_CACHE_DIR"] or os.path.expanduser("~/.deep_gemm")
from sglang_warmstart.sglang.caches import deep_gemm_cache
print("caches", os.path.abspath(theirs), os.path.abspath(deep_gemm_cache(os.environ)))
del sys.modules["sglang.srt.environ"]
print("unimported", os.path.abspath(deep_gemm_cache(os.environ)))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SGLANG_DG_CACHE_DIR": "/a/cache"},
        {"SGLANG_DG_CACHE_DIR": ""},
        {"SGLANG_CACHE_DIR": "/all/caches"},
        {"SGLANG_CACHE_DIR": "/all/caches", "SGLANG_DG_CACHE_DIR": ""},
        {"HOME": ""},
    ],
    ids=str,
)
def test_it_is_where_sglang_keeps_it(forks: ForkServer, tmp_path: Path, environment: dict[str, str]) -> None:
    unset = {"SGLANG_DG_CACHE_DIR": None, "SGLANG_CACHE_DIR": None, "DG_JIT_CACHE_DIR": None}
    said = forks.run(ASK, environment={"HOME": str(tmp_path), **unset, **environment}, directory=tmp_path).checked()
    words = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("caches", "unimp"))}
    theirs, ours = words["caches"]
    assert ours == theirs
    assert words["unimported"] == [theirs], "a command that has not imported SGLang finds the same"


def test_for_a_user_without_a_home_it_raises_nothing(forks: ForkServer, tmp_path: Path) -> None:
    code = "import os, pwd\ndef nobody(_): raise KeyError\npwd.getpwuid = nobody\n" + ASK
    done = forks.run(code, environment={"HOME": None, "SGLANG_DG_CACHE_DIR": None}, directory=tmp_path)
    theirs, ours = next(line for line in done.checked().splitlines() if line.startswith("caches")).split()[1:]
    assert ours == theirs


def test_of_several_roots_it_is_the_one_that_is_written_if_this_deep_gemm_has_several(forks: ForkServer) -> None:
    code = """
import os, sys
sys.path.insert(0, os.environ["PLACE"])
from sglang_warmstart.sglang.caches import deep_gemm_cache
print("root", deep_gemm_cache(os.environ))
"""
    roots = "/writable:/read/only"
    for version, expected in {"0.2.5": "/writable", "0.1.7": roots}.items():
        place = str(toolchain().deep_gemm_of(version).parent)
        said = forks.run(code, environment={"SGLANG_DG_CACHE_DIR": roots, "PLACE": place}).checked()
        assert f"root {expected}\n" in said
