"""Take a library's cache along and put it somewhere else, as a bundle does; and what ninja makes of it there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from sglang_warmstart.bundle.entries import Published, publish
from sglang_warmstart.libraries.collect import collect
from sglang_warmstart.libraries.library import Library
from sglang_warmstart.libraries.table import LIBRARIES

needs_ninja = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")), reason="ninja or a C++ compiler is not there"
)


def write(root: Path, paths: Iterable[str]) -> None:
    """Make files whose contents are their paths."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def restore(library: Library, environment: Mapping[str, str], place: Path, root: Path) -> None:
    """Take a cache along, have it vanish, and put it where another root is."""
    collected = collect(library, environment)
    assert collected.notes == ()
    contents = place / "contents"
    contents.mkdir()
    for sha256, path in collected.contents.items():
        (contents / sha256).write_bytes(path.read_bytes())
    before = library.root(environment)
    assert before is not None
    before.rename(place / "the cache that was")
    files = collected.cache.files
    assert publish(root, files, contents) == Published(len(files), 0)
    assert files


_TRITON = """
import sys
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) * 2)

said = []
knobs.compilation.listener = lambda **told: said.append(told["cache_hit"])
source = ASTSource(fn=kernel, signature={"x": "*fp32", "n": "constexpr"}, constexprs={"n": 128})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(said, len(compiled.asm["cubin"]))
"""


def triton_finds_what_is_restored(place: Path, moved: bool) -> None:
    """Compile a kernel with Triton, restore its cache (elsewhere if ``moved``), and compile it again.

    Args:
        place: an empty directory.
    """
    (place / "kernel.py").write_text(_TRITON)

    def compile_in(root: Path) -> list[str]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(root)}
        command = [sys.executable, str(place / "kernel.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    root = place / "cache"
    new, size = compile_in(root)
    assert new == "[False]"
    library, environment = LIBRARIES["triton"], {"TRITON_CACHE_DIR": str(root)}
    key, after = library.key(environment), place / "moved" if moved else root
    restore(library, environment, place, after)
    assert any(path.name.startswith("__grp__") for path in after.rglob("*"))

    # Its `__grp__` files have absolute paths.
    difference = f"cache was '{root}' and is '{after}' here" if moved else None
    assert library.mismatch(key, {"TRITON_CACHE_DIR": str(after)}) == difference
    assert compile_in(after) == ["[False]" if moved else "[True]", size]
