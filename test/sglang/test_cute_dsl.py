"""SGLang's cache of CuTe DSL's kernels (0.5.20 and later): it finds what a bundle restores, and compiles nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.environment import python_path
from kit.fork_server import ForkServer
from kit.release import is_patched, sglang_directory
from kit.restored_cache import restore
from kit.toolchain import toolchain
from kit.watched_libraries import CUTE_KERNEL, needs_cute_dsl
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.report.reading import read_run

LIBRARY = LIBRARIES["cute-dsl"]
HAS_CACHE = sglang_directory().joinpath("kernels", "jit", "cute_aot_cache.py").is_file()

if is_patched():
    pytest.skip("is about the plugin, which is not loaded into a patched SGLang", allow_module_level=True)
pytestmark = [needs_cute_dsl, pytest.mark.skipif(not HAS_CACHE, reason="this SGLang has no cache for CuTe DSL")]

KIT = Path(__file__).parents[1]
# As SGLang's attention does.
CODE = """
import sys
sys.path[:0] = {paths!r}
from kit.watched import begin, serve
begin()
import torch
import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack
from cute_under_test import add_one
from sglang.kernels.jit.cute_aot_cache import get_jit_cache
serve()
cache = get_jit_cache("fwd", source_paths=[{source!r}])
key = ("add_one", torch.float32)
if key not in cache:
    tensor = from_dlpack(torch.zeros(32), enable_tvm_ffi=True)
    cache[key] = cute.compile(add_one, tensor, options="--enable-tvm-ffi")
print("has", callable(cache[key]))
"""


def events_with(forks: ForkServer, place: Path, cache: Path) -> list[Event]:
    """What CuTe DSL compiles where SGLang's cache is somewhere."""
    source = place / "cute_under_test.py"
    source.write_text(CUTE_KERNEL)
    run = place / f"run-{cache.name}-{len(list(place.iterdir()))}"
    paths = [str(path) for path in (place, KIT, *toolchain().cute_dsl)]
    environment = {
        EVENTS: str(run),
        "CUTE_DSL_ARCH": "sm_90a",
        "SGLANG_CUTE_AOT_CACHE_DIR": str(cache),
        "PYTHONPATH": python_path(KIT),
    }
    done = forks.run(CODE.format(paths=paths, source=str(source)), environment=environment)
    assert "has True" in done.checked()
    return [event for event in read_run(run).lanes[0].events if event.library == LIBRARY.name]


def test_its_cache_may_be_restored_anywhere(forks: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (event,) = events_with(forks, tmp_path, tmp_path / "cache")
    assert (event.kind, event.phase) == ("jit", "serving")
    for path in reversed(toolchain().cute_dsl):
        monkeypatch.syspath_prepend(path)  # where its version is to be read
    before = {"SGLANG_CUTE_AOT_CACHE_DIR": str(tmp_path / "cache")}
    after = {"SGLANG_CUTE_AOT_CACHE_DIR": str(tmp_path / "elsewhere")}
    key = LIBRARY.key(before)
    assert "not installed" not in (key["cute-dsl"], key["CUDA"])
    restore(LIBRARY, before, tmp_path, tmp_path / "elsewhere")
    assert LIBRARY.mismatch(key, after) is None
    assert [path.suffix for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == [".o"]
    assert events_with(forks, tmp_path, tmp_path / "elsewhere") == []
