"""What each library compiles is seen: the libraries themselves. Their real builds: test/soak/libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kit.watched import Watched, run_watched
from kit.watched_libraries import (
    BEGIN,
    TRITON,
    TRITON_KERNEL,
    needs,
    needs_ninja,
    run_flashinfer,
    run_tilelang,
    run_triton,
    run_tvm_ffi,
)

MONITOR = "SGLANG_WARMSTART_JIT_MONITOR"


def test_what_triton_compiles_is_an_event_and_while_serving_a_warning(tmp_path: Path) -> None:
    # Its own listener, if there is one, hears too.
    heard = "import triton\ntriton.knobs.compilation.listener = lambda **told: print('heard', told['cache_hit'])\n"
    (tmp_path / "kernels_under_test.py").write_text(TRITON_KERNEL)
    code = heard + BEGIN + TRITON.format(place=str(tmp_path)) + "compile(64)\nserve()\ncompile(128)\ncompile(64)"
    watched = run_watched(code, tmp_path / "run", {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert watched.status == 0, watched.said
    first, second, hit = watched.of("triton")
    assert (first.kind, first.name, first.phase, first.cached) == ("jit", "add_one", "startup", False)
    assert first.shape == "x: *fp32, y: *fp32; BLOCK=64, num_warps=4, num_stages=3"
    assert 0.01 < first.seconds < 60
    assert (second.kind, second.phase) == ("jit", "serving")
    assert (hit.kind, hit.name, hit.cached) == ("load", "add_one", True)
    assert hit.seconds < first.seconds
    (warning,) = [line for line in watched.said.splitlines() if "JIT" in line]
    assert warning.startswith("WARNING warmstart: JIT while serving: triton compiled add_one for x: *fp32, ")
    assert "BLOCK=128" in warning and "bundle pack --include triton" in warning
    assert [line for line in watched.said.splitlines() if "heard" in line] == [
        "heard False",
        "heard False",
        "heard True",
    ]


def test_without_the_hook_it_is_said_that_triton_is_not_watched(tmp_path: Path) -> None:
    code = "import triton\ndel type(triton.knobs.compilation).listener\n" + BEGIN
    watched = run_watched(code, tmp_path / "run")
    expected = "the JIT monitor does not watch triton: triton.knobs.compilation.listener: not there"
    assert f"WARNING warmstart: {expected}" in watched.said


def test_off_watches_nothing(tmp_path: Path) -> None:
    watched = run_triton("serve()\ncompile(64)", tmp_path, SGLANG_WARMSTART_JIT_MONITOR="off")
    assert watched.status == 0, watched.said
    assert watched.events == []
    assert "JIT" not in watched.said


@pytest.mark.parametrize(
    ("run", "call"),
    [
        pytest.param(run_triton, "compile(64)", id="triton"),
        pytest.param(run_tvm_ffi, "compile()", id="tvm-ffi", marks=[needs_ninja, needs("tvm_ffi")]),
        pytest.param(run_flashinfer, "build()", id="flashinfer", marks=[needs_ninja, needs("tvm_ffi")]),
    ],
)
def test_a_compile_is_refused_in_the_call_that_needs_it(
    run: Callable[..., Watched], call: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = request.node.callspec.id
    code = f"serve()\ntry: {call}\nexcept RuntimeError as error: print('refused:', error)"
    watched = run(code, tmp_path, **{MONITOR: "error"})
    assert watched.status == 0, watched.said
    assert f"refused: JIT while serving: {library} compiled add_one" in watched.said
    (event,) = [each for each in watched.of(library) if each.kind == "jit"]
    assert (event.name, event.phase) == ("add_one", "serving")


@needs("tilelang")
def test_a_compile_of_tilelang_is_seen_also_where_it_fails(tmp_path: Path) -> None:
    # As fast as it gets: there is no compiler.
    watched = run_tilelang("serve()\ncompile()", tmp_path, CUDA_HOME="/nowhere", PATH="/nowhere")
    assert watched.status != 0
    (event,) = watched.of("tilelang")
    assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
    assert event.shape == "a: (1024), b: (1024)"
    assert event.error
    assert "WARNING warmstart: JIT while serving: tilelang failed to compile add_one for a: (1024)" in watched.said
