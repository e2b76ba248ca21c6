"""Triton's cache is one place from the start of a server to its end."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from kit.confined import run_python
from kit.fork_server import ForkServer
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.triton import Triton
from sglang_warmstart.sglang.caches import server_environment
from sglang_warmstart.sglang.triton_cache import TRITON_CACHE, install_one_place, usual_root

BEFORE_0_5_18 = ModuleType("sglang.srt.environ")


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hooks:
    for name in (TRITON_CACHE, "TRITON_HOME", "SGLANG_WARMSTART_BUILD_AHEAD"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Hooks("bundle-restore")


@pytest.mark.parametrize("variables", [{}, {"TRITON_HOME": "/tmp"}, {"TRITON_HOME": ""}], ids=str)
def test_it_is_where_triton_and_bundles_look_without_us(
    hooks: Hooks, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = Triton().root(os.environ)
    install_one_place(hooks, BEFORE_0_5_18)
    assert os.environ[TRITON_CACHE] == str(before)
    assert Triton().root(os.environ) == before
    assert hooks.changed == ["os.environ.TRITON_CACHE_DIR"] and hooks.notes == []
    hooks.undo()
    assert TRITON_CACHE not in os.environ


def test_what_somebody_else_has_named_stays(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("/somewhere", ""):
        monkeypatch.setenv(TRITON_CACHE, named)
        install_one_place(hooks, BEFORE_0_5_18)
        hooks.undo()
        assert os.environ[TRITON_CACHE] == named
    monkeypatch.delenv(TRITON_CACHE)
    install_one_place(hooks, BEFORE_0_5_18)
    monkeypatch.setenv(TRITON_CACHE, "/later")
    hooks.undo()
    assert os.environ[TRITON_CACHE] == "/later"


def test_nothing_is_named_where_sglang_does_or_a_switch_says_no(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    later = ModuleType("sglang.srt.environ")
    later.third_party_cache_defaults = dict  # type: ignore[attr-defined]
    install_one_place(hooks, later)
    monkeypatch.setenv("SGLANG_WARMSTART_BUILD_AHEAD", "0")
    install_one_place(hooks, BEFORE_0_5_18)
    assert TRITON_CACHE not in os.environ and hooks.changed == []


def test_nothing_is_named_without_a_home_or_where_nothing_can_be_written(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda *_: False)
        assert usual_root(os.environ) is None
    monkeypatch.setattr(machine, "home", lambda _: None)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_HOME"}
    assert usual_root(environment) is None
    assert usual_root({**environment, "TRITON_HOME": str(tmp_path)}) == tmp_path / ".triton" / "cache"


# torch's own code: what makes the autotuner of each Triton kernel of Inductor. It needs no GPU.
INDUCTOR = """
import os
from unittest.mock import MagicMock
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

before = os.environ.get("TRITON_CACHE_DIR")
meta = {"device": MagicMock(index=0, type="cuda"), "signature": {}}
kernel = {"fn": MagicMock(), "configs": [MagicMock(pre_hook=None)], "inductor_meta": {"kernel_name": "kernel"}}
try:
    CachingAutotuner(
        triton_meta=meta, save_cache_hook=None, mutated_arg_names=[], optimize_mem=False, heuristic_type=None, **kernel
    )
except Exception as error:
    print("later:", error)  # it is a kernel of nothing
print("INDUCTOR", before, os.environ.get("TRITON_CACHE_DIR"))
"""


def inductor_moves(environment: dict[str, str], tmp_path: Path) -> tuple[str, str]:
    """The variable before and after Inductor has made a kernel."""
    out = run_python(INDUCTOR, environment={"HOME": str(tmp_path), **environment})
    (line,) = [line for line in out.splitlines() if line.startswith("INDUCTOR ")]
    _, before, after = line.split(" ")
    return before, after


@pytest.mark.usefixtures("hooks")
def test_torchs_inductor_moves_tritons_cache_and_leaves_one_alone_that_is_named(tmp_path: Path) -> None:
    before, after = inductor_moves({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}, tmp_path)
    assert before == "None" and Path(after).is_relative_to(tmp_path / "inductor"), "else this step may go"
    root = str(Triton().root({"HOME": str(tmp_path)}))
    assert inductor_moves({TRITON_CACHE: root}, tmp_path) == (root, root)


LOADED = """
import os
from sglang.srt.plugins import load_plugins
load_plugins()
print("PLACE", os.environ.get("TRITON_CACHE_DIR"))
"""


@pytest.mark.by_plugin
@pytest.mark.release(before="0.5.18")
def test_a_process_that_loads_the_plugin_and_a_bundle_of_its_caches_have_one_place(
    forks: ForkServer, tmp_path: Path
) -> None:
    home = {"HOME": str(tmp_path)}
    # The process of the tests has loaded the plugin itself.
    unset: dict[str, str | None] = {**home, TRITON_CACHE: None}
    said = forks.run(LOADED, environment=unset).checked()
    place = str(tmp_path / ".triton" / "cache")
    assert f"PLACE {place}\n" in said
    assert str(Triton().root(server_environment({**home, "PATH": os.environ["PATH"]}))) == place
    off = forks.run(LOADED, environment={**unset, "SGLANG_WARMSTART_BUILD_AHEAD": "0"}).checked()
    assert "PLACE None\n" in off
