"""What TileLang, tvm-ffi and FlashInfer build is seen: the libraries themselves, with their own compilers.

Short cases are in test/libraries/test_watch_libraries.py.
"""

from __future__ import annotations

from pathlib import Path

from kit.watched_libraries import needs, needs_ninja, run_flashinfer, run_tilelang, run_tvm_ffi


@needs("tilelang")
def test_tilelang_a_compile_is_an_event_and_one_from_the_cache_is_none(tmp_path: Path) -> None:
    first = run_tilelang("serve()\ncompile()", tmp_path, "first")
    assert first.status == 0, first.said
    (event,) = first.of("tilelang")
    assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
    assert event.shape == "a: (1024), b: (1024)"
    assert 0.1 < event.seconds < 120
    assert "WARNING warmstart: JIT while serving: tilelang compiled add_one for a: (1024), b: (1024) in" in first.said
    assert run_tilelang("serve()\ncompile()", tmp_path, "again").of("tilelang") == []


@needs("tilelang")
def test_tilelang_it_is_refused(tmp_path: Path) -> None:
    code = "serve()\ntry: compile()\nexcept RuntimeError as error: print('refused:', error)"
    watched = run_tilelang(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
    assert "refused: JIT while serving: tilelang needs add_one" in watched.said


@needs_ninja
@needs("tvm_ffi")
def test_tvm_ffi_a_build_is_an_event_and_a_hit_is_another(tmp_path: Path) -> None:
    first = run_tvm_ffi("serve()\nassert compile() == 2", tmp_path, "first")
    assert first.status == 0, first.said
    (event,) = first.of("tvm-ffi")
    assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
    assert 0.1 < event.seconds < 120
    assert "JIT while serving: tvm-ffi compiled add_one in" in first.said
    again = run_tvm_ffi("serve()\nassert compile() == 2", tmp_path, "again")
    (hit,) = again.of("tvm-ffi")
    assert (hit.kind, hit.cached) == ("load", True)
    assert "JIT" not in again.said


@needs_ninja
@needs("tvm_ffi")
def test_tvm_ffi_what_does_not_compile_is_an_event_with_its_error(tmp_path: Path) -> None:
    code = "load_inline('wrong', cpp_sources='int add(', functions='add')"
    watched = run_tvm_ffi(code, tmp_path, "run")
    assert watched.status != 0
    (event,) = watched.of("tvm-ffi")
    assert event.error
    assert "JIT" not in watched.said


@needs_ninja
@needs("tvm_ffi")
def test_tvm_ffi_what_does_not_compile_fails_by_itself(tmp_path: Path) -> None:
    code = (
        "serve()\ntry: load_inline('wrong', cpp_sources='int add(', functions='add')\n"
        "except RuntimeError as error: print(error)"
    )
    watched = run_tvm_ffi(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
    assert "WARNING warmstart: JIT while serving: tvm-ffi failed to compile wrong in" in watched.said
    assert "ninja" in watched.said


@needs_ninja
@needs("tvm_ffi")
def test_tvm_ffi_it_is_refused(tmp_path: Path) -> None:
    code = "serve()\ntry: compile()\nexcept RuntimeError as error: print('refused:', error)"
    watched = run_tvm_ffi(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
    assert "refused: JIT while serving: tvm-ffi needs add_one" in watched.said


@needs_ninja
@needs("tvm_ffi")
def test_flashinfer_a_build_is_an_event_and_a_hit_is_another(tmp_path: Path) -> None:
    first = run_flashinfer("serve()\nbuild()", tmp_path, "first")
    assert first.status == 0, first.said
    (event,) = first.of("flashinfer")
    assert (event.kind, event.name, event.phase) == ("jit", "add_one", "serving")
    assert "JIT while serving: flashinfer compiled add_one in" in first.said
    (hit,) = run_flashinfer("serve()\nbuild()", tmp_path, "again").of("flashinfer")
    assert (hit.kind, hit.cached) == ("load", True)


@needs_ninja
@needs("tvm_ffi")
def test_flashinfer_it_is_refused(tmp_path: Path) -> None:
    code = "serve()\ntry: build()\nexcept RuntimeError as error: print('refused:', error)"
    watched = run_flashinfer(code, tmp_path, "run", SGLANG_WARMSTART_JIT_MONITOR="error")
    assert "refused: JIT while serving: flashinfer needs add_one" in watched.said
