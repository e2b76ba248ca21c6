"""What each library compiles is seen: the libraries themselves. Their real builds: test/soak/libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from kit.toolchain import toolchain
from kit.watched import Watched, run_watched
from kit.watched_libraries import (
    BEGIN,
    TRITON,
    TRITON_KERNEL,
    needs,
    needs_cute_dsl,
    needs_ninja,
    run_cute_dsl,
    run_flashinfer,
    run_inductor,
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


_NINJA = [needs_ninja, needs("tvm_ffi")]
_TRITON = pytest.param(run_triton, "compile(64)", id="triton")
_TVM_FFI = pytest.param(run_tvm_ffi, "compile()", id="tvm-ffi", marks=_NINJA)
_TILELANG = pytest.param(run_tilelang, "compile()", id="tilelang", marks=needs("tilelang"))
_CUTE_DSL = pytest.param(run_cute_dsl, "compile()", id="cute-dsl", marks=needs_cute_dsl)
_INDUCTOR = pytest.param(run_inductor, "compile()", id="inductor")
# Its form of before 0.6.17, and both later ones.
_FLASHINFER, _FLASHINFER_0_6_17, _FLASHINFER_0_7 = (
    pytest.param(partial(run_flashinfer, version=version), "build()", id=f"flashinfer {version}", marks=_NINJA)
    for version in toolchain().flashinfers
)


def _built(place: Path) -> list[Path]:
    """What a compiler has left below a directory."""
    made = {".o", ".so", ".cubin", ".py"}
    ours = {"libcuda.so", "libcudart.so", "kernels_under_test.py", "cute_under_test.py", "code.py", "graph.py"}
    return [path for path in place.rglob("*") if path.suffix in made and path.name not in ours]


@pytest.mark.parametrize(
    ("run", "call"), [_TRITON, _TVM_FFI, _FLASHINFER, _FLASHINFER_0_7, _TILELANG, _CUTE_DSL, _INDUCTOR]
)
def test_a_compile_is_refused_before_it_begins_in_the_call_that_needs_it(
    run: Callable[..., Watched], call: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = request.node.callspec.id.split()[0]
    code = f"serve()\ntry: {call}\nexcept Exception as error: print('refused:', error)"
    watched = run(code, tmp_path, **{MONITOR: "error"})
    assert watched.status == 0, watched.said
    # Some put it into an error of their own, and break its lines.
    said = " ".join(watched.said.partition("refused:")[2].split())
    assert f"JIT while serving: {library} needs " in said
    assert f"refused before it was compiled: {MONITOR}=error; " in said
    assert f"bundle pack --include {library}" in said
    (event,) = [each for each in watched.of(library) if each.kind == "jit"]
    assert "add_one" in event.name
    assert (event.phase, event.error) == ("serving", f"refused before it was compiled: {MONITOR}=error")
    assert _built(tmp_path) == []


@pytest.mark.parametrize(
    ("run", "call"),
    [
        _TRITON,
        pytest.param(*_TVM_FFI.values, id="tvm-ffi", marks=[*_NINJA, pytest.mark.long]),
        pytest.param(*_FLASHINFER_0_7.values, id="flashinfer 0.7", marks=[*_NINJA, pytest.mark.long]),
    ],
)
def test_what_a_cache_has_is_not_refused(
    run: Callable[..., Watched], call: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = request.node.callspec.id.split()[0]
    first = run(call, tmp_path, "first", **{MONITOR: "error"})
    assert first.status == 0, first.said
    assert [(each.kind, each.phase) for each in first.of(library)] == [("jit", "startup")]
    assert _built(tmp_path) != []
    again = run(f"serve()\n{call}", tmp_path, "again", **{MONITOR: "error"})
    assert again.status == 0, again.said
    assert "JIT" not in again.said.replace("Building JIT module", "")
    assert [each.kind for each in again.of(library) if not each.cached] == []


@pytest.mark.parametrize(("run", "call"), [_FLASHINFER_0_6_17, _CUTE_DSL])
def test_what_is_compiled_while_serving_is_an_event_and_a_warning(
    run: Callable[..., Watched], call: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = request.node.callspec.id.split()[0]
    watched = run(f"serve()\n{call}", tmp_path)
    assert watched.status == 0, watched.said
    (event,) = watched.of(library)
    assert (event.kind, event.phase, event.error) == ("jit", "serving", "")
    assert "add_one" in event.name and event.seconds > 0.01
    assert f"WARNING warmstart: JIT while serving: {library} compiled {event.name}" in watched.said


@pytest.mark.long
def test_a_graph_is_named_after_the_function_that_it_is_of(tmp_path: Path) -> None:
    # The second size needs no other code: dynamic=True.
    watched = run_inductor("serve()\ncompile(8)\ncompile(16)", tmp_path)
    (event,) = watched.of("inductor")
    assert event.name == "add_one (graph.py:6)"
    assert event.shape.count("(") == 2 and "16" not in event.shape
    assert f"WARNING warmstart: JIT while serving: inductor compiled {event.name} for {event.shape} in" in watched.said


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
