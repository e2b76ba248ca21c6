"""What the plan of an earlier start has is built by the service: once, by the library's own lock, and ended with it."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from kit.node import Node, wait_until
from kit.toolchain import toolchain
from kit.watched_libraries import needs_ninja
from sglang_warmstart.base.events import Event
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.libraries import build_plan
from sglang_warmstart.libraries.build_plan import BuildPlan, Part
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node import builders
from sglang_warmstart.node import builds as builds_module
from sglang_warmstart.node.builders import Builder, Outcome
from sglang_warmstart.node.builds import Builds
from sglang_warmstart.node.pool import Places
from sglang_warmstart.report.reading import read_run

pytestmark = needs_ninja

LIBRARY = LIBRARIES["flashinfer"]
# By which it is told from any other.
SLEEP = "299.125"


class Cache:
    """FlashInfer's, a plan, and what ninja makes of it: no compiler is needed to see who builds when."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.environment = {"FLASHINFER_WORKSPACE_BASE": str(place), EVENTS: str(place / "run")}
        root = LIBRARY.root(self.environment)
        assert root is not None
        self.root = root
        self.plan = place / "kernels" / "warmstart" / "ahead" / "plan.json"

    def recipe(self, name: str, command: str = "cp $in $out", seconds: float = 1.0) -> Recipe:
        form = {
            "directory": f"90a/cached_ops/{name}",
            "file": f"90a/cached_ops/{name}/build.ninja",
            "text": f"rule make\n  command = {command}\nbuild {name}.so: make ../../generated/{name}.cu\n",
            "sources": {f"90a/generated/{name}.cu": f"// {name}"},
            "lock": f"90a/cached_ops/tmp/{name}.lock",
        }
        return Recipe(LIBRARY.name, name, form, f"90a/cached_ops/{name}/*.so", seconds)

    def keep(self, *recipes: Recipe, **versions: str) -> None:
        """As a plan of an earlier start."""
        here = {**LIBRARY.versions({**os.environ, **self.environment}), **versions}
        self.plan.parent.mkdir(parents=True, exist_ok=True)
        self.plan.write_bytes(msgspec.json.encode(BuildPlan({LIBRARY.name: Part(here, "", recipes)})))

    @property
    def times(self) -> Path:
        return self.root / "times"

    def built(self, name: str) -> Path:
        return self.root / "90a" / "cached_ops" / name / f"{name}.so"

    def node(self, **environment: str) -> Node:
        return Node(self.place, build_plan=self.plan, **{**self.environment, **environment})

    def events(self) -> list[Event]:
        lanes = read_run(self.place / "run").lanes
        found = [event for lane in lanes for event in lane.events if event.library == LIBRARY.name]
        return sorted(found, key=lambda event: event.at)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    yield Cache(tmp_path)


def test_what_the_plan_has_is_built_and_what_is_there_is_not(cache: Cache) -> None:
    there, new = cache.recipe("there"), cache.recipe("norm", seconds=33)
    cache.built("there").parent.mkdir(parents=True)
    cache.built("there").write_text("built")
    cache.keep(there, new)
    with cache.node() as node:
        assert wait_until(cache.built("norm").exists)
        assert wait_until(lambda: not node.is_running("spawn_main"))  # the builder goes when nothing is left
    assert cache.built("norm").read_text() == "// norm"
    (event,) = cache.events()
    assert (event.kind, event.name, event.error, event.lane) == ("compile", "norm", "", "builder 1")
    assert "not built ahead" not in node.log


def test_the_longest_is_built_first(cache: Cache) -> None:
    order = [cache.recipe(f"m{seconds}", "sleep 0.3; cp $in $out", seconds) for seconds in (1, 40, 7, 9)]
    cache.keep(*order)
    with cache.node(SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS="1"):
        assert wait_until(lambda: all(cache.built(each.name).exists() for each in order), 30)
        # An event is written when the builder has said that it is done.
        assert wait_until(lambda: len(cache.events()) == len(order))
    # One has the place as soon as it is prepared.
    first, *others = [event.name for event in cache.events()]
    assert others == [name for name in ("m40", "m9", "m7", "m1") if name != first]


def test_what_a_rank_waits_for_is_built_before_what_takes_longer(cache: Cache) -> None:
    gate = cache.place / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.05; done; cp $in $out"
    running, *longer = (("running", wait, 50), ("m40", "cp $in $out", 40), ("m30", "cp $in $out", 30))
    cache.keep(*(cache.recipe(*each) for each in (running, *longer)))
    with cache.node(SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS="1") as node:
        assert wait_until(lambda: node.is_running(str(gate)))
        rank = node.client()
        rank.build(cache.recipe("awaited", "cp $in $out", 1))
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(rank.await_builds, 20)
            time.sleep(0.5)  # for it to be asked
            gate.touch()
            assert answer.result().failed == ()
        assert wait_until(lambda: len(cache.events()) == 4)
    assert [event.name for event in cache.events()] == ["running", "awaited", "m40", "m30"]


@pytest.mark.parametrize("late", [False, True])
def test_what_a_rank_waits_for_leaves_no_room_for_what_imports(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Importing:
        """One that imports for longer than this test has time."""

        def __init__(self, library: str, threads: int) -> None:
            self.import_s = 60.0 if library == "tvm-ffi" else 0.2

        async def prepare(self, recipe: Recipe) -> tuple[int, str]:
            await asyncio.sleep(self.import_s)
            return 0, ""

        async def build(self, number: int) -> Outcome:
            built.append("short")
            return Outcome()

        def close(self) -> None:
            pass

    async def build() -> None:
        builds = Builds(Places(1))
        builds.begin(Recipe("tvm-ffi", "long", {"a": 1}, seconds=40))
        short = builds.begin(Recipe("flashinfer", "short", {"a": 1}, seconds=3))
        await asyncio.sleep(0.5 if late else 0)
        assert built == []
        builds.hurry({short})
        assert await asyncio.wait_for(short, 5) == ""

    monkeypatch.setattr(builds_module, "Builder", Importing)
    asyncio.run(build())
    assert built == ["short"]


@pytest.mark.parametrize(
    ("places", "at_once", "then"),
    [(1, [], ["long"]), (2, ["short 1"], ["long", "short 2"]), (3, ["short 1", "short 2"], ["long"])],
)
def test_what_takes_longest_finds_a_place_when_it_has_imported(
    places: int, at_once: list[str], then: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: dict[str, float] = {}

    class Importing:
        """A builder whose imports take as long as its library's name says."""

        def __init__(self, library: str, threads: int) -> None:
            self.seconds = {"flashinfer": 0.0, "tvm-ffi": 0.5}[library]
            self.recipes: list[Recipe] = []

        async def prepare(self, recipe: Recipe) -> tuple[int, str]:
            await asyncio.sleep(self.seconds)
            self.recipes.append(recipe)
            return len(self.recipes) - 1, ""

        async def build(self, number: int) -> Outcome:
            began[self.recipes[number].name] = time.monotonic() - start
            await asyncio.sleep(build_s)
            return Outcome()

        def close(self) -> None:
            pass

    async def build() -> None:
        builds = Builds(Places(places))
        short = [Recipe("flashinfer", f"short {number}", {"a": number}, seconds=3) for number in (1, 2)]
        await asyncio.gather(*map(builds.begin, (*short, Recipe("tvm-ffi", "long", {"a": 1}, seconds=40))))

    monkeypatch.setattr(builds_module, "Builder", Importing)
    build_s = 1.0
    start = time.monotonic()
    asyncio.run(build())
    assert [name for name, at in began.items() if at < 0.4] == at_once
    # One that has waited for room, and what that was left for, may begin in either order if there is room for both.
    assert sorted(list(began)[len(at_once) : len(at_once) + places]) == then and len(began) == 3
    # A place that is given back is room, too.
    began.clear()
    build_s = 0.1
    start = time.monotonic()
    asyncio.run(build())
    assert len([at for at in began.values() if at < 0.4]) == (2 if places > 1 else 0)
    # It is not waited for for ever.
    began.clear()
    monkeypatch.setattr(builds_module, "IMPORT_WAIT_S", 0.1)
    start = time.monotonic()
    asyncio.run(build())
    assert next(iter(began)) == "short 1" and min(began.values()) < 0.4


@pytest.mark.parametrize(("workers", "given", "threads"), [("8", "", 4), ("64", "-g", 8), ("2", "", 0)])
def test_a_module_that_takes_long_has_several_threads_of_ptxas(
    workers: str, given: str, threads: int, cache: Cache
) -> None:
    say = "echo $$NVCC_APPEND_FLAGS > $out"
    cache.keep(cache.recipe("long", say, 40), cache.recipe("short", say, 4))
    settings = {"CUDA_HOME": str(toolchain().cuda_home), "NVCC_APPEND_FLAGS": given}
    with cache.node(SGLANG_JIT_DEEPGEMM_COMPILE_WORKERS=workers, **settings):
        assert wait_until(lambda: all(cache.built(name).exists() for name in ("long", "short")))
    more = f" -Xptxas --split-compile={threads}" if threads else ""
    assert cache.built("long").read_text() == f"{given}{more}".strip() + "\n"
    assert cache.built("short").read_text() == f"{given}\n"


def test_one_that_fails_is_said_in_one_line_and_the_others_are_built(cache: Cache) -> None:
    cache.keep(cache.recipe("bad", "echo 'a.cu(1): error: no such thing'; exit 1"), cache.recipe("norm"))
    with cache.node() as node:
        assert wait_until(cache.built("norm").exists)
        assert wait_until(lambda: "not built ahead" in node.log)
        (line,) = [line for line in node.log.splitlines() if "not built ahead" in line]
    assert line.endswith("not built ahead: bad: a.cu(1): error: no such thing")
    assert not cache.built("bad").exists()


@pytest.mark.parametrize("changed", ["flashinfer", "sglang", "torch", "nvcc"])
def test_what_another_version_compiled_is_left_and_its_plan_replaced(changed: str, cache: Cache) -> None:
    cache.keep(cache.recipe("old"), **{changed: "of before"})
    with cache.node() as node:
        assert wait_until(lambda: f"not built ahead: flashinfer: {changed} was of before and is " in node.log)
        rank = node.client()
        rank.compiled(cache.recipe("new"))
        rank.await_builds(1)  # what comes before is not answered, and read by then
        assert node.end() == 0
        assert node.left() == []
    assert not cache.built("old").exists()
    (part,) = build_plan.load(cache.plan).parts.values()
    assert [recipe.name for recipe in part.recipes] == ["new"]


def test_what_ranks_have_compiled_is_the_plan_of_the_next_start(cache: Cache) -> None:
    with cache.node() as node:
        rank = node.client()
        # Found in the cache, then built; with other flags, the newer counts.
        for recipe in (cache.recipe("norm", "false", 0), cache.recipe("norm", seconds=33), cache.recipe("rope")):
            rank.compiled(recipe)
        rank.compiled(cache.recipe("norm", seconds=30))
        rank.await_builds(1)
        assert node.end() == 0
        assert node.left() == []
    assert not cache.root.exists()
    (part,) = build_plan.load(cache.plan).parts.values()
    assert [(recipe.name, recipe.seconds) for recipe in part.recipes] == [("norm", 33), ("rope", 1)]
    with cache.node():
        assert wait_until(cache.built("rope").exists) and wait_until(cache.built("norm").exists)


def test_what_a_rank_found_has_the_seconds_that_it_takes_to_build(cache: Cache) -> None:
    guessed, unknown = cache.recipe("norm", seconds=33), cache.recipe("rope", "sleep 0.4; cp $in $out", 0)
    cache.keep(guessed)
    guesses = cache.plan.rename(cache.plan.with_name("guesses-1.json"))
    with Node(cache.place, build_plan=cache.plan, guesses=guesses, **cache.environment) as node:
        rank = node.client()
        rank.build(unknown)
        assert wait_until(cache.built("norm").exists)
        assert rank.await_builds(10).built == 1
        for recipe in (guessed, unknown):
            rank.compiled(msgspec.structs.replace(recipe, seconds=0.0))
        rank.await_builds(1)
        assert node.end() == 0
    (part,) = build_plan.load(cache.plan).parts.values()
    seconds = {recipe.name: recipe.seconds for recipe in part.recipes}
    assert seconds["norm"] == 33 and 0.4 < seconds["rope"] < 10


def test_what_ranks_find_of_the_guesses_is_in_the_plan_at_once(cache: Cache) -> None:
    waits = f"while [ ! -e '{cache.place}/go' ]; do sleep 0.1; done; cp $in $out"
    late, soon = cache.recipe("late", waits, 33), cache.recipe("soon", seconds=2)
    other, wrong = cache.recipe("other", seconds=2), cache.recipe("wrong")
    there = cache.recipe("there")
    cache.built("there").parent.mkdir(parents=True)
    cache.built("there").write_text("built by an earlier start, which did not live to say so")
    cache.keep(late, soon, other, wrong, there)
    guesses = cache.plan.rename(cache.plan.with_name("guesses-1.json"))

    def planned() -> list[str]:
        return sorted(recipe.name for recipe in build_plan.load(cache.plan).parts[LIBRARY.name].recipes)

    with Node(cache.place, build_plan=cache.plan, guesses=guesses, **cache.environment) as node:
        rank = node.client()
        # Before it is built, and after that; by the place, and by the name alone.
        rank.compiled(Recipe(LIBRARY.name, "late", {}))
        rank.await_builds(1)
        assert wait_until(lambda: all(cache.built(recipe.name).exists() for recipe in (soon, other, wrong)))
        for recipe in (soon, there):
            rank.compiled(Recipe(LIBRARY.name, recipe.name, {}, recipe.made))
        rank.compiled(Recipe(LIBRARY.name, other.name, {}, "elsewhere/*.so"))
        rank.compiled(Recipe(LIBRARY.name, "nobody's", {}))
        assert wait_until(cache.plan.is_file, 10), "it is lost with a server that is killed"
        assert wait_until(lambda: planned() == ["soon", "there"], 10)
        (cache.place / "go").touch()
        assert wait_until(lambda: planned() == ["late", "soon", "there"], 10)
        os.kill(node.service, signal.SIGKILL)


def test_one_of_a_list_that_does_not_know_its_place_is_built_once_and_not_at_each_start(cache: Cache) -> None:
    recipe = cache.recipe("norm", f"echo built >> '{cache.times}'; sleep 0.5; cp $in $out", 33)
    cache.keep(msgspec.structs.replace(recipe, made=""))
    guesses = cache.plan.rename(cache.plan.with_name("guesses-1.json"))
    with Node(cache.place, build_plan=cache.plan, guesses=guesses, **cache.environment) as node:
        assert wait_until(cache.times.exists)
        rank = node.client()
        rank.build(msgspec.structs.replace(recipe, seconds=14.0))
        assert rank.await_builds(10).built == 1
        rank.compiled(Recipe(LIBRARY.name, "norm", {}))
        rank.await_builds(1)
        assert node.end() == 0
    assert cache.times.read_text() == "built\n"
    (part,) = build_plan.load(cache.plan).parts.values()
    assert [(each.made, each.seconds) for each in part.recipes] == [(recipe.made, 33)]


def test_a_build_that_the_end_of_the_service_prevents_is_not_said_to_be_done() -> None:
    async def build() -> list[str]:
        places = Places(1)
        builds = Builds(places)
        async with places.one_for(1):
            task = builds.begin(Recipe("flashinfer", "norm", {"a": 1}))
            await asyncio.sleep(0.2)
            builds.stop()
        return [await task]

    assert asyncio.run(build())[0]


@pytest.mark.parametrize("end", ["the parent is killed", "the service is told to end", "the service is killed"])
def test_nothing_is_left_of_a_build_when_the_service_ends(end: str, cache: Cache) -> None:
    cache.keep(cache.recipe("slow", "sleep 300"), cache.recipe("slower", "sleep 301"))
    with cache.node() as node:
        assert wait_until(lambda: len(node.processes("sleep")) == 2)
        if end == "the parent is killed":
            node.parent.kill()
        else:
            os.kill(node.service, signal.SIGTERM if end.endswith("to end") else signal.SIGKILL)
        assert wait_until(lambda: {process.pid for process in node.processes()} <= {node.parent.pid}, 5)
    # The library's lock has gone with it.
    with (cache.root / "90a" / "cached_ops" / "tmp" / "slow.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_build_that_hangs_is_ended_with_all_that_it_has_started(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cache.environment.items():
        monkeypatch.setenv(name, value)

    async def build() -> tuple[str, str]:
        builder = Builder(LIBRARY.name, 1)
        try:
            slow, _ = await builder.prepare(cache.recipe("slow", f"sleep {SLEEP}"))
            norm, _ = await builder.prepare(cache.recipe("norm"))
            return (await builder.build(slow, 1.0)).reason, (await builder.build(norm, 30.0)).reason
        finally:
            builder.close()

    assert asyncio.run(build()) == ("it took more than 1 s", "")
    assert cache.built("norm").exists()
    assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", SLEEP]]


@pytest.mark.parametrize(
    ("seconds", "reason"), [(4, ""), (60, "it took more than 6 s")], ids=["ends", "has three times as long"]
)
def test_a_build_that_works_has_more_time(
    seconds: int, reason: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cache.environment.items():
        monkeypatch.setenv(name, value)
    work = f"timeout {seconds} sh -c 'while :; do :; done'; cp $in $out"

    async def build() -> str:
        builder = Builder(LIBRARY.name, 1)
        try:
            number, _ = await builder.prepare(cache.recipe("slow", work))
            return (await builder.build(number, 2.0)).reason
        finally:
            builder.close()

    assert asyncio.run(build()) == reason
    assert cache.built("slow").exists() == (not reason)


@pytest.mark.parametrize("hears", [True, False])
def test_an_import_that_hangs_is_not_waited_for(hears: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = "" if hears else "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text(f"{block}import time; time.sleep(300)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builders, "PREPARE_LIMIT_S", 2.0)

    async def build() -> str:
        places = Places(1)
        builds = Builds(places)
        waiting = builds.begin(Recipe("sglang-jit", "norm", {"text": "x" * 1_000_000}))

        async def compile_something() -> None:
            async with places.one_for(1.0):
                pass

        await asyncio.wait_for(compile_something(), 1.5)  # what imports takes no place
        return await waiting

    assert asyncio.run(build()) == "norm: its imports take more than 2 s"
    builders.end_those_left(1.0)
    assert wait_until(lambda: not multiprocessing.active_children())


def test_two_services_build_a_module_once(cache: Cache) -> None:
    cache.keep(cache.recipe("norm", "sleep 1; echo built >> ../../../builds; cp $in $out"))
    with cache.node(), cache.node():
        assert wait_until(cache.built("norm").exists, 20)
        time.sleep(1.5)
    assert (cache.root / "builds").read_text() == "built\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "is no plan of builds"),
        (b'{"parts": {}, "format": 99}', "has format 99"),
        (b'{"parts": {"flashinfer": {"versions": {}, "capability": "", "recipes": [7]}}}', "is no plan of builds"),
        (b"[" * 100_000, "is no plan of builds"),
    ],
)
def test_a_plan_that_is_none_is_said_and_the_service_serves(text: bytes, why: str, cache: Cache) -> None:
    cache.plan.parent.mkdir(parents=True)
    cache.plan.write_bytes(text)
    with cache.node() as node:
        assert wait_until(lambda: why in node.log)
        assert node.client().await_builds(1).built == 0


def test_a_plan_that_others_can_write_is_not_used(cache: Cache) -> None:
    cache.keep(cache.recipe("norm"))
    cache.plan.parent.chmod(0o777)
    with cache.node() as node:
        assert wait_until(lambda: "can be written by every user" in node.log)
        time.sleep(0.5)
    assert not cache.root.exists()


def _part(*recipes: Recipe, **changes: Any) -> BuildPlan:
    part = Part(LIBRARY.versions(os.environ), "9.0", recipes)
    return BuildPlan({LIBRARY.name: msgspec.structs.replace(part, **changes)})


def test_recipes_hold_for_one_kind_of_gpu(cache: Cache) -> None:
    recipe = cache.recipe("norm")
    assert build_plan.usable(_part(recipe), "9.0", os.environ) == ([recipe], [])
    assert build_plan.usable(_part(recipe), "", os.environ) == ([recipe], [])
    recipes, (reason,) = build_plan.usable(_part(recipe), "10.0", os.environ)
    assert recipes == [] and reason == "flashinfer: it was compiled for capability 9.0, this GPU has 10.0"
