"""The lists for first starts: each entry is still in its release's source, and a launch gets what belongs to it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from kit.environment import child_environment
from kit.node import Node, wait_until
from kit.release import installed_release
from kit.toolchain import toolchain
from kit.watched import run_watched
from kit.watched_libraries import BEGIN, flashinfer_settings, needs, needs_ninja, run_flashinfer, run_tilelang
from sglang_warmstart.base.switches import SERVICE
from sglang_warmstart.libraries import build_plan, calls, machine
from sglang_warmstart.libraries.build_plan import BuildPlan, Part
from sglang_warmstart.libraries.recipe import BuildError, Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.sglang import first_start
from sglang_warmstart.sglang.ahead import known_of
from sglang_warmstart.sglang.caches import DEEP_GEMM_CACHE
from sglang_warmstart.sglang.first_start import Features, FirstStarts

RELEASES = sorted(path.name.removesuffix(first_start.SUFFIX) for path in first_start.LISTS.iterdir())
OF_RELEASE = first_start.of_release(machine.version("sglang"))
SERVE = ["python", "-m", "sglang.launch_server", "--model-path"]


def entries() -> Iterator[Recipe]:
    for group in OF_RELEASE.groups.values():
        yield from group


def source_of(module: str) -> ast.Module:
    """What a module of the installed release says, which is not imported."""
    package, *names = module.split(".")
    if package == "flashinfer":
        place = toolchain().flashinfers["0.7.2" if installed_release().since("0.5.23") else "0.6.11"] / package
    else:
        found = importlib.util.find_spec(package)
        assert found is not None and found.submodule_search_locations
        place = Path(found.submodule_search_locations[0])
    path = Path(place, *names)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def function(module: str, name: str) -> ast.FunctionDef:
    (found,) = (each for each in ast.walk(source_of(module)) if isinstance(each, ast.FunctionDef) and each.name == name)
    return found


def parameters(of: ast.FunctionDef) -> list[str]:
    return [each.arg for each in (*of.args.posonlyargs, *of.args.args, *of.args.kwonlyargs)]


@pytest.mark.parametrize("recipe", entries(), ids=lambda recipe: f"{recipe.library}-{recipe.name}")
def test_what_a_list_has_is_in_the_source_of_its_release(recipe: Recipe) -> None:
    form: dict[str, Any] = recipe.form
    assert recipe.name and recipe.seconds > 0 and bool(recipe.made) == (recipe.library != "tilelang")
    if recipe.library == "tilelang":
        # It is the traced form of this function, with its arguments in place.
        assert function("sglang.kernels.ops.layernorm.mhc", recipe.name)
        assert recipe.name in form["function"] and form["target"].endswith('"arch":"sm_90a"}')
    elif recipe.library == "triton":
        found = function(form["module"], form["function"])
        assert parameters(found) == [name for name, _ in form["signature"]]
    elif recipe.library == "sglang-jit":
        package = machine.package("sglang")
        files = [path for path in form["spec"]["cuda_files"] if path.startswith("@{package.sglang}/")]
        assert package is not None and files == form["spec"]["cuda_files"]
        sources = [Path(package, path.removeprefix("@{package.sglang}/")).read_text("utf-8") for path in files]
        # A wrapper is "Kernel<ARGUMENTS>::run" or "run<ARGUMENTS>" of one of its files, or of what they include.
        for _, kernel in form["spec"]["cuda_wrappers"]:
            assert any(re.match(r"\w+", kernel)[0] in source for source in sources)  # type: ignore[index]
    else:
        module, _, name = form["call"].partition(":")
        found = function(module, name)
        assert len(form.get("arguments", ())) == len(parameters(found)) - len(found.args.defaults)
        if "within" in form:
            manager, _, name = form["within"][0].partition(":")
            assert parameters(function(manager, name))[:2] == ["major", "minor"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_list_holds_no_path_of_the_machine_that_it_was_made_on(release: str) -> None:
    text = zstandard.decompress((first_start.LISTS / f"{release}{first_start.SUFFIX}").read_bytes()).decode()
    assert not re.findall(r"[\"' =](/(?:opt|tmp|usr|root|home|work)/[^\"]*)", text)
    known = first_start.of_release(release)
    assert known.groups["any"]
    assert {recipe.library for group in known.groups.values() for recipe in group} <= LIBRARIES.keys()


def test_a_release_without_a_list_of_its_own_has_what_all_have() -> None:
    known = first_start.of_release("0.5.16")
    assert [(recipe.library, recipe.name) for recipe in known.groups["any"]] == [("flashinfer", "norm")]
    # It is in the list of every release, so in that of the next.
    for release in RELEASES:
        assert ("flashinfer", "norm") in [
            (each.library, each.name) for each in first_start.of_release(release).groups["any"]
        ]


def model(place: Path, **config: object) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


DEEPSEEK_V4 = ["DeepseekV4ForCausalLM", "DeepseekV4ForCausalLM 4096"]
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 512,
    "n_routed_experts": 256,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize(
    ("config", "words", "features"),
    [
        (DEEPSEEK, [], ["any", "DeepseekV3ForCausalLM", "mla", "moe", "fp8"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, [], ["any", "Qwen3MoeForCausalLM", "moe"]),
        ({"architectures": ["DeepseekV4ForCausalLM"], "hidden_size": 4096}, [], ["any", *DEEPSEEK_V4]),
        ({}, ["--attention-backend", "triton"], ["any", "attention-triton"]),
        ({}, ["--attention-backend=fa3", "--attention-backend=triton"], ["any", "attention-triton"]),
        ({"quantization_config": None}, ["--tp", "8"], ["any"]),
        ({"quantization_config": "fp8", "architectures": 7}, [], ["any"]),
    ],
)
def test_what_a_launch_is_like_is_in_its_words_and_its_models_configuration(
    config: dict[str, object], words: list[str], features: list[str], tmp_path: Path
) -> None:
    command = [*SERVE, str(model(tmp_path / "model", **config)), *words]
    assert Features(command, {}).all == features


def test_a_model_is_also_found_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    for number, revision in enumerate(("older", "newer")):
        place = model(tmp_path / "hub" / "models--deepseek-ai--V3" / "snapshots" / revision, architectures=[revision])
        os.utime(place / "config.json", (number, number))
    for variables in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert Features([*SERVE, "deepseek-ai/V3"], variables).all == ["any", "newer"]
    assert Features([*SERVE, "deepseek-ai/V4"], {"HF_HOME": str(tmp_path)}).all == ["any"]
    gone = tmp_path / "hub" / "models--deepseek-ai--V3" / "snapshots" / "gone"
    gone.mkdir()
    (gone / "config.json").symlink_to(tmp_path / "blob")
    assert Features([*SERVE, "deepseek-ai/V3"], {"HF_HOME": str(tmp_path)}).all == ["any", "newer"]
    (tmp_path / "config.json").write_text("[")
    assert Features([*SERVE, str(tmp_path)], {}).all == ["any"]


LIST = FirstStarts(
    "9.0",
    {"triton": "3.6.0"},
    {
        "any": (Recipe("flashinfer", "norm", {"call": "flashinfer.jit.norm:gen_norm_module"}, "norm/*.so"),),
        "moe": (Recipe("triton", "fused_moe", {"module": "a"}, "KEY/*"),),
        "mla": (Recipe("triton", "rope", {"module": "b"}, "OTHER/*"),),
    },
)


def write_guesses(ahead: Path, command: list[str], gpus: Collection[tuple[int, int]] = ((9, 0),)) -> Path | None:
    return first_start.write_guesses(ahead, Features(command, {}), gpus)


def test_launches_that_are_alike_have_one_file_of_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_start, "of_release", lambda _: LIST)
    ahead = tmp_path / "kernels" / "warmstart" / "ahead"
    command = [*SERVE, str(model(tmp_path / "model", **DEEPSEEK))]
    plan = write_guesses(ahead, command)
    assert plan is not None and not build_plan.NAME.fullmatch(plan.name)
    parts = build_plan.load(plan).parts
    assert {name: [each.name for each in part.recipes] for name, part in parts.items()} == {
        "flashinfer": ["norm"],
        "triton": ["rope", "fused_moe"],
    }
    assert {name: part.versions for name, part in parts.items()} == {"flashinfer": {}, "triton": {"triton": "3.6.0"}}
    written = plan.stat().st_mtime_ns
    assert write_guesses(ahead, [*command, "--port", "1"]) == plan
    assert write_guesses(ahead, [*SERVE, str(tmp_path)]) != plan
    assert plan.stat().st_mtime_ns == written and len(list(ahead.iterdir())) == 2


def test_a_cache_that_cannot_be_written_gets_no_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_start, "capabilities", lambda: {(9, 0)})
    (tmp_path / "file").touch()
    assert known_of([*SERVE, "m"], {DEEP_GEMM_CACHE: str(tmp_path / "file")}) == {}
    assert list(known_of([*SERVE, "m"], {DEEP_GEMM_CACHE: str(tmp_path / "kernels")})) == ["finder", "guesses"]


def test_without_a_list_or_with_nothing_in_it_there_is_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_model = FirstStarts("9.0", {}, {"DeepseekV3ForCausalLM": LIST.groups["any"]})
    for known, gpus in ((other_model, {(9, 0)}), (LIST, {(9, 0), (10, 0)})):
        monkeypatch.setattr(first_start, "of_release", lambda _, known=known: known)
        assert write_guesses(tmp_path, [*SERVE, "m"], gpus) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "gpus"), [(["--help"], True), (["-h"], True), (["--device", "cpu"], True), ([], False)]
)
def test_nothing_is_known_of_what_is_no_server_on_a_gpu(
    words: list[str], gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_start, "of_release", lambda _: LIST)
    monkeypatch.setattr(first_start, "capabilities", lambda: {(9, 0)} if gpus else set())
    assert known_of([*SERVE, "m", *words], {DEEP_GEMM_CACHE: str(tmp_path)}) == {}
    assert list(tmp_path.iterdir()) == []


@needs_ninja
@pytest.mark.skipif(installed_release().since("0.5.13"), reason="the call is that of 0.5.12")
def test_a_module_of_the_list_is_built_by_sglangs_own_function(tmp_path: Path) -> None:
    """As the service builds it; the other process finds it by the same name, and compiles nothing."""
    (recipe,) = (each for each in entries() if "clamp_position" in each.name)
    home = toolchain().cuda_home
    # It is linked against this, whatever it is.
    subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(tmp_path / "libcudart.so")], check=True)
    variables = {
        **child_environment(),
        "TVM_FFI_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_HOME": str(home),
        "LIBRARY_PATH": str(tmp_path),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    plan = tmp_path / "kernels" / "warmstart" / "ahead" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(build_plan.encode(BuildPlan({"tvm-ffi": Part({}, "", (recipe,))})))
    with Node(tmp_path, guesses=plan, **variables) as node:
        assert wait_until(lambda: list((tmp_path / "cache").glob(recipe.made)) or "not built" in node.log, 120)
        assert "not built" not in node.log


@needs("tilelang")
def test_what_a_list_has_built_is_the_plan_of_the_next_start(tmp_path: Path) -> None:
    """A list cannot know where TileLang's kernels will be, and a rank not how what it finds was made."""
    code, home = "import sglang.srt.environ\ncompile()\nimport time; time.sleep(2)", toolchain().cuda_home
    plan = tmp_path / "kernels" / "warmstart" / "ahead" / "plan.json"
    with Node(tmp_path) as node:
        node.client().build_planned(plan, {})
        first = run_tilelang(code, tmp_path, "first", **{SERVICE: str(node.socket)})
        assert [event.cached for event in first.of("tilelang")] == [False], first.said
        assert node.end() == 0
    (known,) = build_plan.load(plan).parts["tilelang"].recipes
    plan.unlink()
    shutil.rmtree(tmp_path / "cache")

    guessed = msgspec.structs.replace(known, made="", seconds=14.0)
    guesses = plan.with_name("guesses-1.json")
    guesses.write_bytes(build_plan.encode(BuildPlan({"tilelang": Part({}, "", (guessed,))})))
    variables = {"TILELANG_CACHE_DIR": str(tmp_path / "cache"), "CUDA_HOME": str(home)}
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with Node(tmp_path, guesses=guesses, PATH=path, **variables) as node:
        assert wait_until(lambda: list(tmp_path.glob("cache/**/params.pkl")) or "not built" in node.log, 60)
        node.client().build_planned(plan, {})
        second = run_tilelang(code, tmp_path, "second", **{SERVICE: str(node.socket)})
        assert second.of("tilelang") == [], second.said
        assert node.end() == 0
    assert build_plan.load(plan).parts["tilelang"].recipes == (msgspec.structs.replace(known, seconds=14.0),)


def test_only_makers_of_modules_are_called(tmp_path: Path) -> None:
    for call in ("os:system", "flashinfer_not:x", "subprocess:run"):
        with pytest.raises(BuildError, match="is not called"):
            calls.build({"call": call, "arguments": ["true"]})
    with pytest.raises(BuildError, match="ValidationError"):
        calls.build({"call": "flashinfer.jit.norm:gen_norm_module", "and": 1})


# In nvcc's place: what it makes can be linked.
NVCC = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -MF) : > "$2" ;; esac
  shift
done
echo "$out" >> {log}
c++ -x c++ -c /dev/null -o "$out"
"""


@needs_ninja
@pytest.mark.parametrize("version", ["0.6.11", "0.7.2"])
def test_flashinfer_builds_what_is_called_and_finds_it_later(version: str, tmp_path: Path) -> None:
    log, nvcc = tmp_path / "log", tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(log=log))
    nvcc.chmod(0o755)
    form = {"call": "flashinfer.jit.norm:gen_norm_module", "variables": {"FLASHINFER_CUDA_ARCH_LIST": "9.0a"}}
    # The toolchain has FlashInfer's Python alone.
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("norm.cu", "flashinfer_norm_binding.cu"):
        (sources / name).touch()
    place = (
        f"from pathlib import Path\nfrom flashinfer.jit import env\nenv.FLASHINFER_CSRC_DIR = Path({str(sources)!r})\n"
    )
    # FlashInfer reads which GPU it is to compile for when it is imported: else it asks this machine's, by CUDA.
    code = f"{BEGIN}from sglang_warmstart.libraries import calls\ncalls.prepare({form})\n{place}calls.build({form})"
    settings = {**flashinfer_settings(tmp_path, version), "FLASHINFER_NVCC": str(nvcc)}
    first = run_watched(code, tmp_path / "first", settings)
    assert first.status == 0, first.said
    assert [path.name for path in tmp_path.glob(".cache/flashinfer/*/90a/cached_ops/norm/*.so")] == ["norm.so"]
    compiled = log.read_text()
    then = f"{place}from flashinfer.jit.norm import gen_norm_module\ngen_norm_module().build(False, True)"
    again = run_flashinfer(then, tmp_path, "again", version, FLASHINFER_NVCC=str(nvcc))
    assert again.status == 0, again.said
    assert log.read_text() == compiled and [event.cached for event in again.of("flashinfer")] == [True]


def test_what_flashinfer_has_compiled_in_a_package_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    class Spec:
        is_aot = True

        def build(self, *words: object) -> None:
            built.append(words)

    monkeypatch.setattr(calls, "_function", lambda _: lambda: Spec())
    form = msgspec.to_builtins(calls.Call("flashinfer.jit.norm:gen_norm_module"))
    calls.build(form)
    assert built == []
    Spec.is_aot = False
    calls.build(form)
    assert built == [(False, True)]
