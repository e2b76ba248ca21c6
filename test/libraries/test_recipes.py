"""What a library has compiled is built again by its recipe, in another process and an empty cache; it finds it then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kit.environment import child_environment, python_path
from kit.toolchain import toolchain
from kit.watched import Watched
from kit.watched_libraries import (
    needs,
    needs_ninja,
    run_flashinfer,
    run_sglang_jit,
    run_tilelang,
    run_tvm_ffi,
)
from sglang_warmstart.libraries.recipe import BuildError, Recipe
from sglang_warmstart.libraries.table import LIBRARIES

# Before the library compiles: each recipe becomes a line of a file.
LISTEN = """
import msgspec, os
from sglang_warmstart.libraries import recipe as recipes

def keep(recipe):
    with open({file!r}, "ab") as file:
        file.write(msgspec.json.encode([recipe, dict(os.environ)]) + b"\\n")
recipes.listen(keep)
"""
# As a builder does it, but for the fork.
BUILD = """
import importlib, os, shutil, sys
import msgspec
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES, build_variables

for line in sys.stdin:
    recipe, environment = msgspec.json.decode(line, type=tuple[Recipe, dict[str, str]])
    os.environ.update(build_variables(environment), CUDA_VISIBLE_DEVICES="")
    library = LIBRARIES[recipe.library]
    root = library.root(os.environ)
    assert library.is_made(recipe, os.environ), recipe.made
    # The machine's own paths are in none of it, but for the variables.
    assert str(root) not in msgspec.json.encode(recipe.form).decode()
    shutil.rmtree(root)
    assert not library.is_made(recipe, os.environ)
    ahead = importlib.import_module(library.ahead)
    ahead.prepare(recipe.form)
    ahead.build(recipe.form, root, os.environ)
    assert library.is_made(recipe, os.environ), recipe.made
"""

_NINJA = [needs_ninja, needs("tvm_ffi")]
_FLASHINFERS = [
    pytest.param(partial(run_flashinfer, version=version), "build()", id=f"flashinfer {version}", marks=_NINJA)
    for version in toolchain().flashinfers
]


@pytest.mark.parametrize(
    ("run", "call"),
    [
        pytest.param(run_tvm_ffi, "compile()", id="tvm-ffi", marks=_NINJA),
        *_FLASHINFERS,
        pytest.param(run_tilelang, "compile()", id="tilelang", marks=needs("tilelang")),
        pytest.param(run_sglang_jit, "compile()", id="sglang-jit", marks=[needs_ninja, needs("sglang.kernels")]),
    ],
)
def test_a_module_is_built_again_by_its_recipe_and_found(
    run: Callable[..., Watched], call: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = LIBRARIES[request.node.callspec.id.split()[0]]
    listen = LISTEN.format(file=str(tmp_path / "recipes"))
    first = run(f"{listen}\n{call}", tmp_path, "first")
    assert first.status == 0, first.said
    assert [event.cached for event in first.of(library.name)] == [False]
    lines = (tmp_path / "recipes").read_bytes().splitlines()
    recipes = [msgspec.json.decode(line, type=tuple[Recipe, dict[str, str]])[0] for line in lines]
    # SGLang's is told before it looks into its cache, and again when it has been built.
    assert len({recipe.key for recipe in recipes}) == 1
    recipe = recipes[-1]
    assert recipe.seconds > 0.01 and "add_one" in recipe.name
    version = request.node.callspec.id.split()[-1]
    _build(lines[-1], *(path for name, path in toolchain().flashinfers.items() if name == version))
    again = run(call, tmp_path, "again")
    assert again.status == 0, again.said
    assert [event.kind for event in again.of(library.name) if not event.cached] == []


def _build(line: bytes, *places: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        input=line.decode() + "\n",
        env=child_environment({"PYTHONPATH": python_path(Path(__file__).parents[1], *places)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _ninja(**changes: Any) -> dict[str, Any]:
    return {"directory": "m", "file": "m/build.ninja", "text": "", "sources": {}, "lock": "m/lock", **changes}


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({}, "missing required field"),
        (_ninja(directory="../m"), "is no path below the cache"),
        (_ninja(file="/etc/passwd"), "is no path below the cache"),
        (_ninja(sources={"out/a.cu": ""}), "leads out of the cache"),
        (_ninja(text="@{package.nothing}"), "there is no package.nothing here"),
        (_ninja(text=7), "Expected `str`"),
        (_ninja(more=1), "unknown field"),
    ],
)
def test_a_form_that_is_none_is_refused_and_writes_nothing(form: dict[str, Any], why: str, tmp_path: Path) -> None:
    from sglang_warmstart.libraries import ninja_ahead

    root = tmp_path / "cache"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(BuildError, match=why):
        ninja_ahead.build(form, root, os.environ)
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "out"]
