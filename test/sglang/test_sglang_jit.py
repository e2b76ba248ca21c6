"""What SGLang's own JIT builds is seen, refused and restored: its own modules, ninja and a C++ compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.environment import python_path
from kit.fork_server import Done, ForkServer
from kit.release import is_patched
from kit.restored_cache import needs_ninja, restore
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.report.reading import read_run

LIBRARY = LIBRARIES["sglang-jit"]

if is_patched():
    pytest.skip("is about the plugin, which is not loaded into a patched SGLang", allow_module_level=True)
pytestmark = [needs_ninja, pytest.mark.skipif(not LIBRARY.is_installed, reason="this SGLang has no JIT of its own")]

KIT = Path(__file__).parents[1]
# A module that is only C++ needs no CUDA.
BUILD = """
import sys
sys.path.insert(0, {kit!r})
from kit.watched import begin, serve
begin()
from sglang.kernels.jit.utils.compile import load_jit

def build():
    assert load_jit("add_one", cpp_files=[{source!r}], cpp_wrappers=[("add", "::add_one")]).add(1) == 2
"""
EXPECTED = "sgl_kernel_jit_add_one"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "add_one.cpp").write_text("int add_one(int x) { return x + 1; }\n")
    return tmp_path


def run(
    forks: ForkServer, place: Path, code: str, *, mode: str = "warn", cache: str = "cache"
) -> tuple[Done, list[Event]]:
    """Run code in a process that is watched as a rank is: how it ended, and its events of SGLang's JIT."""
    events = place / f"run-{len(list(place.iterdir()))}"
    environment = {
        EVENTS: str(events),
        "SGLANG_WARMSTART_JIT_MONITOR": mode,
        "SGLANG_JIT_CACHE_DIR": str(place / cache),
        "PYTHONPATH": python_path(KIT),
    }
    head = BUILD.format(kit=str(KIT), source=str(place / "add_one.cpp"))
    done = forks.run(head + code, environment=environment)
    return done, [event for event in read_run(events).lanes[0].events if event.library == LIBRARY.name]


def test_what_it_builds_is_an_event_and_while_serving_a_warning(forks: ForkServer, place: Path) -> None:
    done, events = run(forks, place, "serve()\nbuild()")
    said = done.checked()
    (event,) = events
    assert (event.kind, event.name, event.phase, event.error) == ("jit", EXPECTED, "serving", "")
    assert event.seconds > 0.1
    assert f"WARNING warmstart: JIT while serving: sglang-jit compiled {EXPECTED} in " in said
    assert "bundle pack --include sglang-jit" in said


def test_it_is_refused_before_it_is_built_and_what_its_cache_has_is_not(forks: ForkServer, place: Path) -> None:
    code = "serve()\ntry: build()\nexcept RuntimeError as error: print('refused:', error)"
    done, events = run(forks, place, code, mode="error")
    said = done.checked()
    assert f"refused: JIT while serving: sglang-jit needs {EXPECTED}; refused before it was compiled: " in said
    assert [event.phase for event in events] == ["serving"]
    assert not list((place / "cache").rglob("*.so"))
    # Before the server is ready it is built. Later it is found.
    done, events = run(forks, place, "build()", mode="error")
    assert [(event.phase, event.error) for event in events] == [("startup", "")], done.err
    done, events = run(forks, place, "serve()\nbuild()", mode="error")
    assert (done.status, events) == (0, [])


@pytest.mark.parametrize("moved", [False, True])
def test_it_finds_what_a_bundle_restores_anywhere(forks: ForkServer, place: Path, moved: bool) -> None:
    run(forks, place, "build()")[0].checked()
    after = "elsewhere" if moved else "cache"
    before = {"SGLANG_JIT_CACHE_DIR": str(place / "cache"), "PATH": os.environ["PATH"]}
    key = LIBRARY.key(before)
    restore(LIBRARY, before, place, place / after)
    assert LIBRARY.mismatch(key, {**before, "SGLANG_JIT_CACHE_DIR": str(place / after)}) is None
    # No objects and no locks.
    assert {path.suffix for path in (place / after).rglob("*") if path.is_file()} == {".json", ".so", ".ninja", ".cpp"}
    done, events = run(forks, place, "serve()\nbuild()", cache=after)
    assert events == []
    assert "JIT while serving" not in done.checked()


@pytest.mark.parametrize(
    "variables",
    [{}, {"SGLANG_JIT_CACHE_DIR": ""}, {"SGLANG_JIT_CACHE_DIR": "~/c"}, {"SGLANG_CACHE_DIR": "/all"}],
    ids=str,
)
def test_its_cache_is_where_sglang_has_it(forks: ForkServer, tmp_path: Path, variables: dict[str, str]) -> None:
    ask = (
        "from sglang.kernels.jit.utils.compile.cache import build_key_dir\n"
        "print(build_key_dir(module_name='m', build_key='k'))"
    )
    environment = {"HOME": str(tmp_path), **variables}
    said = forks.run(ask, environment={"SGLANG_JIT_CACHE_DIR": None, "SGLANG_CACHE_DIR": None, **environment})
    # TARGET/MODULE/build-KEY
    assert Path(said.checked().splitlines()[-1]).parents[2] == LIBRARY.root(environment)


def test_what_it_compiles_by_is_in_its_key(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    before = LIBRARY.key(environment)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho another\n")
    compiler.chmod(0o755)
    after = LIBRARY.key({**environment, "CXX": str(compiler)})
    assert after == {**before, "CXX": "another"}


PREPARE = """
import sys
from sglang_warmstart.libraries import sglang_jit_ahead
sglang_jit_ahead.prepare({})
loader = sys.modules["sglang.kernels.jit.utils.compile.loader"]
print(loader.load_jit.__name__, sorted({"transformers", "torch._dynamo"} & sys.modules.keys()))
"""


def prepared(first: Path | None = None) -> str:
    """What a process says that has prepared to build, in which this directory is the first of the path."""
    environment = {**os.environ, "PYTHONPATH": python_path(first)}
    done = subprocess.run([sys.executable, "-c", PREPARE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_builds_ahead_imports_the_loader_and_neither_transformers_nor_a_compiler_of_models() -> None:
    assert prepared() == "load_jit []\n"


def test_a_loader_that_needs_more_of_sglang_has_it_all(tmp_path: Path) -> None:
    place = tmp_path / "sglang" / "kernels" / "jit" / "utils" / "compile"
    place.mkdir(parents=True)
    for directory in (place, *list(place.parents)[:4]):
        (directory / "__init__.py").touch()
    (tmp_path / "sglang" / "__init__.py").write_text("name = 'by the package'\n")
    (place / "loader.py").write_text("import sglang\ndef load_jit(): ...\nload_jit.__name__ = sglang.name\n")
    assert prepared(tmp_path) == "by the package []\n"
