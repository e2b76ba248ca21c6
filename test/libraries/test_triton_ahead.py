"""Triton's kernels by recipe: what another process builds from JSON is what the original call finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit import triton_calls
from kit.watched_libraries import run_triton


@pytest.mark.parametrize("which", ["sglang", "own"])
def test_what_is_built_from_a_recipe_is_found_by_the_call(which: str, tmp_path: Path) -> None:
    said = triton_calls.recorded(which, tmp_path)
    assert said["notes"] == []
    calls = said["calls"]
    # A function inside another is found by no name.
    undescribed = ["local"] if which == "own" else []
    assert [name for name, call in calls.items() if not call["recipes"]] == undescribed
    recipes = [recipe for call in calls.values() for recipe in call["recipes"]]
    assert len(recipes) == said["misses"] - len(undescribed) >= 5
    assert said["built"]["made"] == [made for _, _, made, _ in recipes]
    # Of those it is told where they were found.
    assert sorted(said["found"]) == sorted(["triton", name, made] for name, _, made, _ in recipes)
    built, first = said["second"], said["first"]
    # The name of an entry is the hash of all that decides.
    assert {name: first[name] for name in built} == built
    assert len(built) == len(recipes) == len(first) - len(undescribed)
    # The last call is that of the local function.
    assert said["hits"] == [True] * len(recipes) + [False] * len(undescribed)
    assert said["third"] == first
    for name, form, made, seconds in recipes:
        entry, _, last = made.partition("/")
        assert last == f"__grp__{name}.json" and last in built[entry]
        assert form["target"] == {"backend": "cuda", "arch": 90, "warp_size": 32}
        # Nothing in it is of this machine.
        assert str(tmp_path) not in json.dumps(form) and "site-packages" not in json.dumps(form)
        assert 0.01 < seconds < 60


def test_a_form_is_what_it_was_after_json(tmp_path: Path) -> None:
    triton_calls.run_in(tmp_path, "triton_calls.go_round()")


_FORM: dict[str, Any] = {
    "module": "own_kernels",
    "function": "by_gpu",
    "signature": [["x", "*fp32"], ["y", "*fp32"], ["BLOCK", "constexpr"]],
    "constants": [[[2], 64]],
    "attrs": [[[0], [["tt.divisibility", 16]]]],
    "options": {"num_warps": 4},
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
}
_HOSTILE: dict[str, Any] = {
    "no object": [],
    "nothing": {},
    "no such module": {**_FORM, "module": "nowhere.at_all"},
    "a module's name that is code": {**_FORM, "module": "__import__('os').system('true')"},
    "a module that cannot be imported": {**_FORM, "module": "kit.nogpu_poisoned.nothing"},
    "a relative name": {**_FORM, "module": ".own_kernels"},
    "a number for a name": {**_FORM, "module": 7},
    "a function that is none of Triton's": {**_FORM, "module": "os", "function": "system"},
    "a function that is not there": {**_FORM, "function": "nothing"},
    "a function below a function": {**_FORM, "function": "by_gpu.fn.__globals__"},
    "a function that is no kernel": {**_FORM, "function": "twice"},
    "arguments of another function": {**_FORM, "signature": [["x", "*fp32"]]},
    "a type that is a number": {**_FORM, "signature": [["x", 7], ["y", "*fp32"], ["BLOCK", "constexpr"]]},
    "a type that is nonsense": {**_FORM, "signature": [["x", "*what"], ["y", "*fp32"], ["BLOCK", "constexpr"]]},
    "a signature that is text": {**_FORM, "signature": "x"},
    "a path that is text": {**_FORM, "constants": [["x", 64]]},
    "a path that leads nowhere": {**_FORM, "constants": [[[99], 64]]},
    "a constant of no type": {**_FORM, "constants": [[[2], {"pickle": "gASV"}]]},
    "a dtype that is none": {**_FORM, "constants": [[[2], {"dtype": "fp7"}]]},
    "a constant that is a function of the system": {**_FORM, "constants": [[[2], {"function": ["os", "system"]}]]},
    "options that are a list": {**_FORM, "options": []},
    "options out of range": {**_FORM, "options": {"num_warps": 3}},
    "a library that is not there": {**_FORM, "options": {"extern_libs": {"tuple": [{"tuple": ["a", "/nowhere"]}]}}},
    "arguments of a program": {**_FORM, "options": {"ptx_options": "-o /tmp/elsewhere"}},
    "a file in place of what is compiled": {**_FORM, "options": {"ir_override": "/tmp/elsewhere.ptx"}},
    "another GPU": {**_FORM, "target": {"backend": "cuda", "arch": 100, "warp_size": 32}},
    "a GPU of another maker": {**_FORM, "target": {"backend": "hip", "arch": "gfx942", "warp_size": 64}},
    "an arch that is text": {**_FORM, "target": {"backend": "cuda", "arch": "90; true", "warp_size": 32}},
}


def test_a_form_that_is_none_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "forms.json").write_text(json.dumps([_FORM, *_HOSTILE.values()]))
    said = json.loads(triton_calls.run_in(tmp_path, "triton_calls.refuse_all('forms.json')"))
    prepared, built = said[::2], said[1::2]
    assert (prepared[0], built[0]) == ("", "")
    refused = dict(zip(_HOSTILE, built[1:], strict=True))
    assert [name for name, line in refused.items() if not line or len(line.splitlines()) != 1] == []
    assert all(len(line.splitlines()) <= 1 for line in prepared)
    assert refused["no such module"] == "ModuleNotFoundError: No module named 'nowhere'"
    assert refused["a function that is none of Triton's"] == "os.system is no kernel of Triton's"
    assert refused["another GPU"] == "this process builds for sm_90, not for sm_100"
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if any(path.glob("__grp__*")))
    assert (entry / "by_gpu.cubin").is_file()


def test_a_listener_that_fails_does_no_harm_to_a_compile(tmp_path: Path) -> None:
    code = "from sglang_warmstart.libraries import recipe\nrecipe.listen(lambda made: made.nothing)\n"
    watched = run_triton(f"{code}compile(64)\nprint('compiled')", tmp_path, SGLANG_WARMSTART_STRICT="0")
    assert watched.status == 0, watched.said
    assert "compiled" in watched.said.splitlines()
    assert [event.kind for event in watched.of("triton")] == ["jit"]
