"""DeepGEMM's targets are in the plan of a launch too, and warmed at its next start before a rank asks."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from kit.fake_nvcc import cubin_of
from kit.node import STANDIN, Node, Place, wait_until
from kit.nogpu import TARGETS, call_on
from kit.standin_library import FLAGS, SIGNATURE
from kit.toolchain import toolchain
from sglang_warmstart.deepgemm import further
from sglang_warmstart.deepgemm.digest import directory_of
from sglang_warmstart.deepgemm.marker import Marker
from sglang_warmstart.deepgemm.nogpu.devices import gpu_of
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.node import service
from sglang_warmstart.node.known_kernels import Known
from sglang_warmstart.node.planned_targets import PlannedTargets, recipe_of, wanted_by
from sglang_warmstart.node.protocol import Hello, Warmed, Welcome

VERSION = "0.2.3.post2"
PLENTY = 80 << 30
FIRST, SECOND = (
    Target(kernel_type="GEMM_NT_F8F8BF16", n=n, k=7168, num_groups=1, num_sms=132, m_max=150) for n in (512, 2112)
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test has left here a service would have, and its rank would not."""
    for variable in [each for each in os.environ if each.startswith(("DG_", "DJ_"))]:
        monkeypatch.delenv(variable)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (place.deep_gemm / "__init__.py").touch()  # the service looks for it
    return place


def plan_of(root: Path) -> Path:
    return root / "warmstart" / "ahead" / f"words-{'0' * 32}.json"


def empty_but_for(plan: Path, root: Path) -> None:
    data = plan.read_bytes()
    shutil.rmtree(root)
    plan.parent.mkdir(parents=True)
    plan.write_bytes(data)


def planned(place: Place, name: str, plan: Path) -> Node:
    """A service that has a plan from its start, and the DeepGEMM of a place."""
    (place.directory / name).mkdir()
    return Node(place.directory / name, modules=place.deep_gemm.parent, build_plan=plan)


def served(place: Place, *targets: Target, hello: Hello | None = None) -> Path:
    """Leave the plan of a start in which a rank asked for targets, and nothing else."""
    root = place.cache.root
    plan = plan_of(root)
    with planned(place, "served", plan) as node:
        place.rank(node, hello).warm(targets, PLENTY, 30, searched=True)
        assert node.end() == 0 and node.left() == []
    empty_but_for(plan, root)
    return plan


def outcomes_of_an_image(
    place: Place, recipes: Sequence[Recipe], monkeypatch: pytest.MonkeyPatch
) -> dict[Target | Known, str]:
    """What becomes of recipes for an image, whose service is in this process."""
    monkeypatch.syspath_prepend(str(place.deep_gemm.parent))
    monkeypatch.setattr(service.compilers, "end_all_runs", lambda: None)  # those of this process run on

    async def build() -> dict[Target | Known, str]:
        builder = service.Service(place.directory, STANDIN)
        try:
            await builder.build(recipes, place.cache.root, lambda recipe, reason: None)
            return builder.outcomes
        finally:
            builder.stop()
            await builder.end(place.directory)

    return asyncio.run(build())


def all_sources_in(plan: Path) -> list[str]:
    """Of DeepGEMM's kernels in a plan, with their flags."""
    forms = [recipe.form for recipe in build_plan.load(plan).parts["deep-gemm"].recipes]
    return [f"{kernel['source']} {kernel['flags']}" for form in forms for kernel in form["known"]["kernels"]]


def test_kernels_are_compiled_before_deepgemm_has_said_which(place: Place) -> None:
    plan = plan_of(place.cache.root)
    with planned(place, "served", plan) as node:
        answer = place.rank(node).warm([FIRST, SECOND], PLENTY, 30, searched=True)
        assert node.end() == 0
    names = {use.directory for each in answer.targets for use in each.kernels}
    assert len(all_sources_in(plan)) >= len(names) > 1
    empty_but_for(plan, place.cache.root)
    place.nvcc.on_each_kernel("sleep 0.5")
    (place.directory / "again").mkdir()
    modules = place.deep_gemm.parent
    # What would ask DeepGEMM is not there, and so never ends.
    with Node(place.directory / "again", library="kit.there_is_none", modules=modules, build_plan=plan) as node:
        assert wait_until(lambda: all(place.cache.has(name) for name in names), 20), node.log
        assert not list(place.cache.own.glob("markers/*/*.json")), "nobody knows whether these are all"
    # A start that finds all in the cache asks nobody for sources, and the plan keeps them.
    before = all_sources_in(plan)
    with planned(place, "third", plan) as node:
        assert place.rank(node).restore().known
        assert node.end() == 0
    with planned(place, "fourth", plan) as node:
        assert place.rank(node).restore().known
        assert node.end() == 0
    assert sorted(all_sources_in(plan)) == sorted(before)


@pytest.mark.parametrize("waiting", [0, 1])
def test_what_a_rank_waits_for_is_compiled_before_what_another_will(waiting: int, place: Place) -> None:
    root, plan = place.cache.root, plan_of(place.cache.root)
    hellos = [place.hello(launch={"rank": rank}) for rank in "01"]
    with planned(place, "served", plan) as node:
        answers = [
            place.rank(node, hello).warm([target], PLENTY, 30, searched=True)
            for hello, target in zip(hellos, (FIRST, SECOND), strict=True)
        ]
        assert node.end() == 0
    wanted, others = ({use.directory for use in answers[each].targets[0].kernels} for each in (waiting, 1 - waiting))
    empty_but_for(plan, root)
    gate, before = place.directory / "gate", sum(place.nvcc.compiled.values())
    place.nvcc.on_each_kernel(f"until [ -e {gate} ]; do sleep 0.05; done; sleep 0.02")
    (place.directory / "again").mkdir()
    one = {"SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS": "1"}
    with Node(place.directory / "again", modules=place.deep_gemm.parent, build_plan=plan, **one) as node:
        assert wait_until(lambda: sum(place.nvcc.compiled.values()) > before)
        rank = place.rank(node, hellos[waiting])
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(rank.restore)
            time.sleep(0.7)  # for it to be asked, and for all kernels to wait
            gate.touch()
            assert answer.result().known
        assert wait_until(lambda: all(place.cache.has(name) for name in wanted | others))
    under_way, *then = sorted(wanted | others, key=lambda name: place.cache.path(name).stat().st_mtime_ns)
    rest = wanted - {under_way}
    assert len(rest) > 1 and set(then[: len(rest)]) == rest


def test_real_kernels_are_there_before_the_rank_comes_and_it_need_not_search(tmp_path: Path) -> None:
    deep_gemm, cache = toolchain().deep_gemm_of(VERSION), tmp_path / "cache"
    target, plan = msgspec.structs.replace(TARGETS[-1], m_max=32), plan_of(cache)
    words = Hello(
        cache=str(cache),
        environment={"CUDA_HOME": str(toolchain().cuda_home)},
        deep_gemm=str(deep_gemm),
        gpu=gpu_of("h200"),
        launch={"model": "DeepSeek-V4", "rank": "0"},
        workers=2,
    )
    environment = {"CUDA_HOME": str(toolchain().cuda_home)}
    with Node(tmp_path, library="", modules=deep_gemm.parent, build_plan=plan, **environment) as node:
        rank = node.client()
        assert rank.hello(words) == Welcome()
        (warmed,) = rank.warm([target], PLENTY, 100, searched=True).targets
        assert warmed.error == ""
        assert node.end() == 0 and node.left() == []
    empty_but_for(plan, cache)
    with Node(tmp_path, library="", modules=deep_gemm.parent, build_plan=plan, **environment) as node:
        assert wait_until(lambda: list(cache.glob("warmstart/markers/*/*.json")), 100), node.log
        rank = node.client()
        assert rank.hello(words) == Welcome()
        answer = rank.restore()
    assert (answer.known, answer.targets) == (True, (Warmed(target, warmed.kernels),))
    assert call_on(str(cache), VERSION, [target], tmp_path) == []


def test_a_rank_that_comes_meanwhile_waits_and_nothing_is_compiled_twice(place: Place) -> None:
    plan = served(place, FIRST, SECOND)
    before = place.nvcc.compiled
    place.nvcc.on_each_kernel("sleep 1")
    with planned(place, "again", plan) as node:
        assert wait_until(lambda: place.nvcc.compiled != before)
        answer = place.rank(node).restore()
    assert answer.known and {each.target for each in answer.targets} == {FIRST, SECOND}
    assert place.nvcc.compiled == {name: 2 * count for name, count in before.items()}


def test_a_start_that_ended_before_its_search_leaves_that_to_the_next(place: Place) -> None:
    # As one that is killed when mHC's targets are there, and no dry forward has run.
    root = place.cache.root
    with planned(place, "first", plan_of(root)) as node:
        place.rank(node).warm([FIRST], PLENTY, 30)
        assert node.end() == 0 and node.left() == []
    empty_but_for(plan_of(root), root)
    with planned(place, "again", plan_of(root)) as node:
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
        rank = place.rank(node)
        answer = rank.restore()
        assert (answer.known, [each.target for each in answer.targets]) == (False, [FIRST])
        rank.warm([SECOND], PLENTY, 30, searched=True)
        assert node.end() == 0 and node.left() == []
    empty_but_for(plan_of(root), root)
    with planned(place, "then", plan_of(root)) as node:
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
        assert place.rank(node).restore().known


def test_each_rank_has_its_own(place: Place) -> None:
    words = [place.hello(launch={"model": "DeepSeek-V3", "rank": str(rank)}) for rank in (0, 1)]
    root = place.cache.root
    with planned(place, "first", plan_of(root)) as node:
        for hello, targets in zip(words, ([FIRST], [FIRST, SECOND]), strict=True):
            place.rank(node, hello).warm(targets, PLENTY, 30, searched=True)
        assert node.end() == 0 and node.left() == []
    empty_but_for(plan_of(root), root)
    with planned(place, "again", plan_of(root)) as node:
        assert wait_until(lambda: len(list(place.cache.own.glob("markers/*/*.json"))) == 2)
        found = [place.rank(node, hello).restore() for hello in words]
    assert [{each.target for each in answer.targets} for answer in found] == [{FIRST}, {FIRST, SECOND}]


def test_with_all_kernels_there_a_restart_compiles_none(place: Place) -> None:
    plan = served(place, FIRST)
    with planned(place, "filled", plan):
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
    runs = place.nvcc.runs
    with planned(place, "again", plan) as node:
        assert place.rank(node).restore().known
        assert node.end() == 0 and node.left() == []
    assert place.nvcc.runs == runs


def test_one_that_cannot_be_had_leaves_the_search_to_the_rank(place: Place) -> None:
    killed = msgspec.structs.replace(FIRST, kernel_type="a GEMM that is killed at 40")
    plan = served(place, FIRST, killed)
    kept = build_plan.load(plan)
    (part,) = kept.parts.values()
    odd = Recipe("deep-gemm", "odd", {"rank": "nobody", "target": 7})
    parts = {"deep-gemm": msgspec.structs.replace(part, recipes=(odd, *part.recipes))}
    plan.write_bytes(build_plan.encode(msgspec.structs.replace(kept, parts=parts)))
    with planned(place, "again", plan) as node:
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
        answer = place.rank(node).restore()
        assert "not warmed by a plan: odd: " in node.log
        assert (answer.known, [each.target for each in answer.targets]) == (False, [FIRST])
        # It searches, and cannot have it either: the next start need not search once more.
        (failed,) = place.rank(node).warm([killed], PLENTY, 30, searched=True).targets
        assert failed.error
        assert place.rank(node).restore().known


def test_where_nobody_searches_what_failed_is_not_tried_again_before_it_is_called(place: Place) -> None:
    """As with a speculative algorithm: each target is asked for when it is first called."""
    root = place.cache.root
    killed = msgspec.structs.replace(FIRST, kernel_type="a GEMM that is killed at 40")
    with planned(place, "first", plan_of(root)) as node:
        rank = place.rank(node)
        for target in (FIRST, killed):
            rank.warm([target], PLENTY, 30)
        assert node.end() == 0 and node.left() == []
    (part,) = build_plan.load(plan_of(root)).parts.values()
    assert [recipe.name for recipe in part.recipes] == [str(FIRST)]
    compiled = place.nvcc.compiled
    with planned(place, "again", plan_of(root)) as node:
        rank = place.rank(node)
        answer = rank.restore()
        assert (answer.known, [each.target for each in answer.targets]) == (False, [FIRST])
        rank.warm([], PLENTY, 30, searched=True)
        assert node.end() == 0 and node.left() == []
    with planned(place, "then", plan_of(root)) as node:
        assert place.rank(node).restore().known
    assert place.nvcc.compiled == compiled


def test_targets_that_differ_in_layout_alone_are_two(place: Place) -> None:
    other = msgspec.structs.replace(FIRST, rhs_major="mn")
    assert str(other) == str(FIRST)
    plan = served(place, FIRST, other)
    with planned(place, "again", plan) as node:
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
        answer = place.rank(node).restore()
    assert answer.known and {each.target for each in answer.targets} == {FIRST, other}


def test_those_that_are_not_ready_in_time_leave_the_search_to_the_next_start(place: Place) -> None:
    with planned(place, "slow", plan_of(place.cache.root)) as node:
        rank = place.rank(node)
        assert rank.warm([FIRST], PLENTY, 30).targets[0].kernels
        place.nvcc.on_each_kernel("sleep 2")
        first, second = rank.warm([FIRST, SECOND], PLENTY, 0.1, searched=True).targets
        assert first.kernels and second.not_ready
        assert not rank.restore().known


def test_where_all_has_failed_each_start_searches(place: Place) -> None:
    """As with a compiler that is broken: once it is mended, nothing is to remain of that."""
    plan = plan_of(place.cache.root)
    place.nvcc.on_each_kernel("exit 7")
    for name in ("first", "second", "third"):
        with planned(place, name, plan) as node:
            rank = place.rank(node)
            assert not rank.restore().known
            assert rank.warm([FIRST], PLENTY, 30, searched=True).targets[0].error
            assert node.end() == 0 and node.left() == []
    place.nvcc.on_each_kernel("")
    with planned(place, "mended", plan) as node:
        assert wait_until(lambda: list(place.cache.own.glob("markers/*/*.json")))
        assert [each.target for each in place.rank(node).restore().targets] == [FIRST]


def test_for_an_image_it_is_not_enough_that_an_earlier_start_knew_no_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan may have grown since."""
    for targets in ([FIRST], [FIRST, SECOND]):
        recipes = [recipe_of(place.hello(), target, True) for target in targets]
        assert outcomes_of_an_image(place, recipes, monkeypatch) == dict.fromkeys(targets, "")
    with planned(place, "server", plan_of(place.cache.root)) as node:
        answer = place.rank(node).restore()
    assert answer.known and {each.target for each in answer.targets} == {FIRST, SECOND}


def test_kernels_of_nvrtc_are_warmed_in_their_own_cache(place: Place) -> None:
    cache = str(place.cache.root / "nvrtc")
    here = msgspec.structs.replace(place.hello(kind="nvrtc"), cache=cache)
    recipe = recipe_of(here, FIRST, True)
    assert recipe.key != recipe_of(place.hello(), FIRST, True).key
    ranks: list[Hello] = []

    class Noting:
        async def warm_planned(
            self, hello: Hello, targets: Mapping[Target, Known | None], searched: bool, further: Sequence[Known]
        ) -> None:
            ranks.append(hello)

    for root in (place.cache.root, place.directory / "elsewhere"):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(place.deep_gemm.parent))
            asyncio.run(PlannedTargets(Noting()).begin([recipe], root))
    assert [hello.cache for hello in ranks] == [cache, str(place.directory / "elsewhere" / "nvrtc")]


def compiled_by_a_rank(place: Place, node: Node, source: str = "// attention logits") -> str:
    """What DeepGEMM leaves in its cache when a rank of a service compiles a kernel of no target."""
    directory = directory_of("attention_logits", SIGNATURE, FLAGS, source)
    place.cache.publish(directory, source, cubin_of(source, FLAGS))
    (place.cache.path(directory) / further.FLAGS).write_text(f"{FLAGS}\n{node.socket}\n")
    return directory


def further_in(place: Place) -> set[str]:
    """What the one marker has of kernels of no target."""
    (path,) = place.cache.own.glob("markers/*/*.json")
    return {each.directory for each in msgspec.json.decode(path.read_bytes(), type=Marker).further}


def recipes_in(plan: Path) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in build_plan.load(plan).parts["deep-gemm"].recipes}


def test_a_kernel_of_no_target_that_a_rank_has_compiled_is_there_at_the_next_start(place: Place) -> None:
    root, plan = place.cache.root, plan_of(place.cache.root)
    with planned(place, "first", plan) as node:
        place.rank(node).warm([FIRST], PLENTY, 30, searched=True)
        kernel = compiled_by_a_rank(place, node)
        assert node.end() == 0 and node.left() == []
    assert set(recipes_in(plan)) == {str(FIRST), "1 further kernel"}
    # No rank compiles it in the second start, and the third has it all the same.
    for name in ("second", "third"):
        empty_but_for(plan, root)
        with planned(place, name, plan) as node:
            assert wait_until(lambda: place.cache.has(kernel), 20), node.log
            answer = place.rank(node).restore()
            assert (answer.known, [each.target for each in answer.targets]) == (True, [FIRST])
            assert node.end() == 0 and node.left() == []
        assert further_in(place) == {kernel}
    # A restart compiles nothing.
    runs = place.nvcc.runs
    with planned(place, "warm", plan) as node:
        assert place.rank(node).restore().known
        other = compiled_by_a_rank(place, node, "// for another batch")
        assert node.end() == 0
    assert place.nvcc.runs == runs
    # One recipe has them all.
    assert set(recipes_in(plan)) == {str(FIRST), "2 further kernels"} and further_in(place) == {kernel, other}


def test_a_plan_that_is_begun_on_a_warm_cache_has_what_the_marker_has(place: Place) -> None:
    root, plan = place.cache.root, plan_of(place.cache.root)
    (place.directory / "without").mkdir()
    with Node(place.directory / "without", modules=place.deep_gemm.parent) as node:
        place.rank(node).warm([FIRST], PLENTY, 30, searched=True)
        kernel = compiled_by_a_rank(place, node)
        assert node.end() == 0
    assert further_in(place) == {kernel}
    with planned(place, "warm", plan) as node:
        assert place.rank(node).restore().known
        assert node.end() == 0
    assert set(recipes_in(plan)) == {str(FIRST), "1 further kernel"}
    empty_but_for(plan, root)
    with planned(place, "again", plan) as node:
        assert wait_until(lambda: place.cache.has(kernel), 20), node.log


def test_of_another_deep_gemm_only_the_newest_are_kept(place: Place) -> None:
    plan = plan_of(place.cache.root)
    with planned(place, "first", plan) as node:
        place.rank(node).warm([FIRST], PLENTY, 30, searched=True)
        compiled_by_a_rank(place, node)
        assert node.end() == 0
    old = recipes_in(plan)["1 further kernel"]
    kept = build_plan.load(plan)
    (part,) = kept.parts.values()
    old.form["known"]["identity"] = "another"
    recipes = tuple(old if recipe.key == old.key else recipe for recipe in part.recipes)
    plan.write_bytes(build_plan.encode(BuildPlan({"deep-gemm": msgspec.structs.replace(part, recipes=recipes)})))
    shutil.rmtree(place.cache.root / "cache")
    with planned(place, "second", plan) as node:
        place.rank(node).warm([FIRST], PLENTY, 30, searched=True)
        compiled_by_a_rank(place, node, "// of a newer DeepGEMM")
        assert node.end() == 0
    assert len(build_plan.load(plan).parts["deep-gemm"].recipes) == 2
    (kernel,) = recipes_in(plan)["1 further kernel"].form["known"]["kernels"]
    assert kernel["source"] == "// of a newer DeepGEMM"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"identity": "another"}, "of another DeepGEMM, compiler or GPU"),
        ({"flags": FLAGS + " --run-me"}, "of another DeepGEMM, compiler or GPU"),
        ({"source": "exit 7"}, "exit status 7"),
        ({"source": "__instantiate_kernel<" + "9" * 5000 + ", 1>"}, ""),
        ({}, ""),
    ],
)
def test_for_an_image_it_is_said_what_becomes_of_kernels_of_no_target(
    damage: dict[str, str], reason: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the targets beside them are there, whatever that is."""
    plan = plan_of(place.cache.root)
    with planned(place, "first", plan) as node:
        place.rank(node).warm([FIRST], PLENTY, 30, searched=True)
        compiled_by_a_rank(place, node)
        assert node.end() == 0
    recipes = recipes_in(plan)
    known = recipes["1 further kernel"].form["known"]
    for name, value in damage.items():
        (known if name == "identity" else known["kernels"][0])[name] = value
    place.nvcc.on_each_kernel('grep -q "exit 7" "$source" && exit 7')
    shutil.rmtree(place.cache.root)
    outcomes = outcomes_of_an_image(place, list(recipes.values()), monkeypatch)
    wanted = wanted_by(recipes["1 further kernel"])
    assert isinstance(wanted, Known)
    assert set(outcomes) == {FIRST, wanted} and outcomes[FIRST] == ""
    assert reason in outcomes[wanted] and bool(outcomes[wanted]) is bool(reason)


def test_what_changes_from_start_to_start_is_not_in_a_recipe(place: Place) -> None:
    other = msgspec.structs.replace(place.hello().gpu, ordinal=3, visible="4,5,6,7")
    here = recipe_of(place.hello(PATH="/a"), FIRST, True)
    assert here == recipe_of(place.hello(PATH="/b", gpu=other), FIRST, True)
    assert here != recipe_of(place.hello(DG_JIT_WITH_LINEINFO="1"), FIRST, True)
    # The newer counts.
    assert here.key == recipe_of(place.hello(DG_JIT_WITH_LINEINFO="1"), FIRST, False).key
    assert here.key != recipe_of(place.hello(), SECOND, True).key


def test_a_plan_alone_has_none(place: Place) -> None:
    """``sglang-warmstart record`` compiles nothing, and leaves no plan of builds."""
    (place.directory / "node").mkdir()
    plan = plan_of(place.cache.root)
    with Node(place.directory / "node", plans=place.directory / "plans", build_plan=plan) as node:
        client = node.client()
        assert client.hello(place.hello()).only_plans
        client.warm([FIRST], PLENTY, 30, searched=True)
        compiled_by_a_rank(place, node)
        assert node.end() == 0 and node.left() == []
    assert not plan.exists()
