"""We look for caches where SGLang and the libraries themselves keep them, on this release and in any environment."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from kit.environment import child_environment
from kit.fork_server import ForkServer
from kit.release import is_patched
from kit.toolchain import toolchain
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.sglang import caches
from sglang_warmstart.sglang.caches import server_environment

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


# The other libraries' caches

VARIABLES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TILELANG_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "CUDA_CACHE_PATH",
    "SGLANG_CACHE_DIR",
    "SGLANG_CUTE_AOT_CACHE_DIR",
    "SGLANG_JIT_CACHE_DIR",
)
# What importing SGLang does, in a process that has imported it; and what SGLang's own caches are.
THEIRS = """
import importlib, json, os
import sglang.srt.environ as environ
importlib.reload(environ)  # it reads HOME when it is imported
getattr(environ, "redirect_third_party_caches", lambda: None)()
cute = getattr(environ.envs, "SGLANG_CUTE_AOT_CACHE_DIR", None)
if cute is not None:
    os.environ["SGLANG_CUTE_AOT_CACHE_DIR"] = cute.get()
"""
SAY = f"print('SAID', json.dumps({{name: os.environ[name] for name in {VARIABLES} if name in os.environ}}))"


def said(out: str) -> dict[str, str]:
    (line,) = [line for line in out.splitlines() if line.startswith("SAID ")]
    found: dict[str, str] = json.loads(line.removeprefix("SAID "))
    return found


ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"SGLANG_CACHE_DIR": "~/caches"},
    {"TRITON_CACHE_DIR": "/t", "FLASHINFER_WORKSPACE_BASE": ""},
    {"SGLANG_CUTE_AOT_CACHE_DIR": ""},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_a_command_finds_the_caches_of_a_server(
    forks: ForkServer, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    unset = dict.fromkeys(VARIABLES)
    wanted = {**unset, "HOME": str(tmp_path), **environment}
    theirs = said(forks.run(THEIRS + SAY, environment=wanted).checked())
    ours = server_environment({"HOME": str(tmp_path), **environment})
    assert {name: ours[name] for name in VARIABLES if name in ours} == theirs


def test_in_a_server_they_are_those_of_its_environment(forks: ForkServer, tmp_path: Path) -> None:
    ask = """
from sglang_warmstart.sglang.caches import server_environment
os.environ.update(server_environment(os.environ))
"""
    wanted = {**dict.fromkeys(VARIABLES), "HOME": str(tmp_path)}
    theirs = said(forks.run(THEIRS + SAY, environment=wanted).checked())
    # SGLang has set what it sets; its own cache it looks for when it uses it.
    code = THEIRS + "os.environ.pop('SGLANG_CUTE_AOT_CACHE_DIR', None)\n" + ask + SAY
    assert said(forks.run(code, environment=wanted).checked()) == theirs


def test_to_ask_for_them_does_not_import_sglang() -> None:
    code = (
        "import sys; from sglang_warmstart.sglang.caches import server_environment as ask; import os; ask(os.environ)"
    )
    code += "; sys.exit('sglang' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True)


def test_all_caches_that_the_release_has_in_one_place_are_found_there(tmp_path: Path) -> None:
    if not hasattr(importlib.import_module("sglang.srt.environ"), "third_party_cache_defaults"):
        pytest.skip("this release leaves the libraries where they are")
    ours = server_environment({"HOME": str(tmp_path)})
    below = tmp_path / ".cache" / "sglang"
    for name in ("triton", "flashinfer", "inductor", "sglang-jit"):
        root = LIBRARIES[name].root(ours)
        assert root is not None and root.is_relative_to(below), name


def test_a_release_that_does_not_say_where_they_are_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "environ.py"
    broken.write_text("def third_party_cache_defaults(): raise RuntimeError")
    monkeypatch.setattr(caches, "_source_of_environ", lambda: broken)
    with pytest.raises(OSError, match=r"SGLang does not say where its caches are: .*environ.py"):
        server_environment({"HOME": str(tmp_path)})


def test_without_sglang_the_environment_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_source_of_environ", lambda: None)
    assert server_environment({"HOME": "/h"}) == {"HOME": "/h"}
