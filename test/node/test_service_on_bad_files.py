"""A cache on a file system that delays, refuses or lies: each rank gets an answer, and nothing wrong stays in it."""

from __future__ import annotations

import errno
import itertools
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.bad_files import CHANGES, EVERY, WRITES, BadFiles, Rule
from kit.cache_check import faults_of, rests_in
from kit.node import Node, Place, wait_until
from kit.standin_library import definition
from sglang_warmstart.deepgemm.target import Target
from sglang_warmstart.node.client import ServiceClient
from sglang_warmstart.node.disk import ANSWER_S
from sglang_warmstart.node.protocol import Answer, Warmed

PLENTY = 100 << 30
TARGETS = [
    Target(kernel_type="GEMM_NT_F8F8BF16", n=n, k=7168, num_groups=1, num_sms=132, m_max=40) for n in (512, 2112)
]
KERNELS = {use.directory for target in TARGETS for use in definition(target)}
LOOKS = ("look", "open", "list")
# For two targets of five kernels; a file system that answers at all takes milliseconds.
BOUND_S = 20.0


@dataclass
class Site:
    """A service under rules, and caches that they are about."""

    node: Node
    bad: BadFiles
    directory: Path

    def place(self, name: str = "place") -> Place:
        directory = self.directory / name
        directory.mkdir(parents=True)
        return Place(directory)


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    bad = BadFiles(directory)
    with Node(directory, **bad.environment) as node:
        yield Site(node, bad, directory)


@pytest.fixture
def site(module_site: Site, tmp_path: Path) -> Iterator[Site]:
    """The service outlives the tests, and so does its log: what a test adds to it is looked at when it ends."""
    before = len(module_site.node.log)
    yield Site(module_site.node, module_site.bad, tmp_path)
    module_site.bad.lift_all()
    said = [line for line in re.split(r"[\r\n]+", module_site.node.log[before:]) if "DeepGEMM kernels:" not in line]
    assert not any("Traceback" in line for line in said), said
    assert len(said) <= 3, said


def ask(client: ServiceClient, limit_s: float = BOUND_S) -> Answer:
    start = time.monotonic()
    answer = client.warm(TARGETS, PLENTY, limit_s, searched=True)
    assert time.monotonic() - start < limit_s + 2
    assert [each.target for each in answer.targets] == TARGETS
    for each in answer.targets:
        assert each.error or each.kernels == definition(each.target)
        assert "\n" not in each.error
    assert all("\n" not in note for note in answer.notes)
    return answer


def marker_of(place: Place) -> list[Path]:
    return list(place.cache.own.glob("markers/*/*.json"))


def check(site: Site, place: Place, rank: ServiceClient) -> None:
    """Once the file system is well again, the cache is, and the service is of use."""
    site.bad.lift_all()
    assert faults_of(place.cache) == []
    assert ask(rank).targets == tuple(Warmed(target, definition(target)) for target in TARGETS)
    assert {path.name for path in (place.cache.root / "cache").iterdir()} == KERNELS
    assert len(marker_of(place)) == 1
    assert faults_of(place.cache) == []


# What a cache can do without


def hides(bad: BadFiles, root: Path) -> Rule:
    return bad.set("hide", LOOKS, root, ms=500)


def tears(bad: BadFiles, root: Path) -> Rule:
    return bad.set("tear", ("rename",), root, ms=50)


def syncs_no_directory(bad: BadFiles, root: Path) -> Rule:
    return bad.refuse(("sync_directory",), root, errno.EINVAL)


def has_another_clock(bad: BadFiles, root: Path) -> Rule:
    return bad.set("clock", ("look",), root, number=3600)


def is_slow(bad: BadFiles, root: Path) -> Rule:
    return bad.set("delay", EVERY, root, ms=5)


def has_no_locks(bad: BadFiles, root: Path) -> Rule:
    return bad.refuse(("lock",), root, errno.ENOLCK)


@pytest.mark.parametrize("fault", [hides, tears, syncs_no_directory, has_another_clock, is_slow, has_no_locks])
def test_a_file_system_that_lacks_this_will_do(fault: Callable[[BadFiles, Path], Rule], site: Site) -> None:
    place = site.place()
    rule = fault(site.bad, place.cache.root)
    rank = place.rank(site.node)
    assert rank.restore().targets == ()
    answer = ask(rank)
    assert [each.error for each in answer.targets] == ["", ""]
    assert rule.fired
    check(site, place, rank)
    assert sum(place.nvcc.compiled.values()) == len(KERNELS), "each once"


@pytest.mark.parametrize("fault", [hides, tears], ids=lambda fault: fault.__name__)
def test_two_nodes_that_race_there_agree(fault: Callable[[BadFiles, Path], Rule], site: Site, tmp_path: Path) -> None:
    place = site.place()
    place.nvcc.on_each_kernel("sleep 0.1")
    # Nothing keeps the nodes from each other.
    site.bad.refuse(("lock",), place.cache.root, errno.ENOLCK)
    rule = fault(site.bad, place.cache.root)
    (tmp_path / "other").mkdir()
    with ThreadPoolExecutor() as threads, Node(tmp_path / "other", **site.bad.environment) as other:
        ranks = [place.rank(node) for node in (site.node, other)]
        answers = list(threads.map(ask, ranks))
        assert [each.error for answer in answers for each in answer.targets] == [""] * 4
        assert rule.fired
        check(site, place, ranks[0])
    assert "Traceback" not in other.log


# What fails at one moment


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(errno.ENOSPC, id="ENOSPC"),
        *(
            pytest.param(each, marks=pytest.mark.long, id=errno.errorcode[each])
            for each in (errno.EDQUOT, errno.ESTALE)
        ),
    ],
)
def test_one_call_fails_whichever_it_is(number: int, site: Site) -> None:
    calls = EVERY if number == errno.ESTALE else WRITES
    for n in itertools.count(1):
        # Each of the first ones, and then some: there are hundreds.
        n = n if n <= 20 else 20 + (n - 20) * 15
        place = site.place(str(n))
        rule = site.bad.refuse(calls, place.cache.root, number, first=n, last=n)
        rank = place.rank(site.node)
        rank.restore()
        ask(rank)
        if not rule.fired:
            break
        check(site, place, rank)
    assert n > 20


# What fails from one moment on


def is_full(bad: BadFiles, root: Path) -> Rule:
    return bad.refuse(("write",), root, errno.ENOSPC)


def is_over_its_quota(bad: BadFiles, root: Path) -> Rule:
    return bad.refuse(("write", "create", "mkdir"), root, errno.EDQUOT)


def turns_read_only(bad: BadFiles, root: Path) -> Rule:
    return bad.refuse(CHANGES, root, errno.EROFS)


def is_stale(bad: BadFiles, root: Path) -> Rule:
    return bad.vanish(root, errno.ESTALE)


def is_gone(bad: BadFiles, root: Path) -> Rule:
    return bad.vanish(root, errno.ENOENT)


def is_forbidden(bad: BadFiles, root: Path) -> Rule:
    return bad.vanish(root, errno.EACCES)


def breaks(bad: BadFiles, root: Path) -> Rule:
    return bad.vanish(root, errno.EIO)


ENDS = [is_full, is_over_its_quota, turns_read_only, is_stale, is_gone, is_forbidden, breaks]


@pytest.mark.parametrize("fault", ENDS, ids=lambda fault: fault.__name__)
def test_a_cache_that_cannot_be_used_leaves_each_target_with_one_reason(
    fault: Callable[[BadFiles, Path], Rule], site: Site
) -> None:
    place = site.place()
    rule = fault(site.bad, place.cache.root)
    rank = place.rank(site.node)
    rank.restore()
    answer = ask(rank)
    assert all(
        re.search(r"the kernel cache .* cannot be written \(.*\): (make|check its) ", each.error)
        for each in answer.targets
    )
    assert rule.fired
    check(site, place, rank)


@pytest.mark.parametrize("fault", ENDS, ids=lambda fault: fault.__name__)
def test_a_cache_that_is_lost_in_the_middle_of_a_start_too(fault: Callable[[BadFiles, Path], Rule], site: Site) -> None:
    place = site.place()
    place.nvcc.on_each_kernel("sleep 0.3")
    rank = place.rank(site.node)
    rank.announce(TARGETS, PLENTY)
    assert wait_until(lambda: place.nvcc.compiled)
    rule = fault(site.bad, place.cache.root)
    answer = ask(rank)
    assert all("the kernel cache" in each.error for each in answer.targets), answer
    assert rule.fired
    site.bad.lift_all()
    # What could not be removed: nobody wrote there any more.
    assert all("/tmp/warmstart-" in rest for rest in rests_in(place.cache))
    for rest in (place.cache.root / "tmp").glob("warmstart-*"):
        for file in rest.iterdir():
            file.unlink()
        rest.rmdir()
    place.nvcc.on_each_kernel(":")
    check(site, place, rank)


@pytest.mark.parametrize("fault", ENDS, ids=lambda fault: fault.__name__)
def test_a_cache_that_is_lost_after_a_start_is_no_reason_not_to_restart(
    fault: Callable[[BadFiles, Path], Rule], site: Site
) -> None:
    place = site.place()
    rank = place.rank(site.node)
    ask(rank)
    fault(site.bad, place.cache.root)
    restarted = place.rank(site.node)
    answer = restarted.restore()
    if fault in (is_full, is_over_its_quota, turns_read_only):
        assert answer.known and not answer.notes, "it need not be written"
    assert len(set(answer.notes)) <= 1
    ask(restarted)
    check(site, place, restarted)


def test_a_view_that_is_old_for_a_moment_costs_a_restart_nothing_but_its_marker(site: Site) -> None:
    place = site.place()
    ask(place.rank(site.node))
    (marker,) = marker_of(place)
    rule = site.bad.refuse(("open", "read"), place.cache.root / "cache", errno.ESTALE)
    (note, *_) = place.rank(site.node).restore().notes
    assert rule.fired and "Stale file handle" in note
    site.bad.lift_all()
    assert marker_of(place) == [marker], "others use it"
    restored = place.rank(site.node).restore()
    assert restored.known and not restored.notes


@pytest.mark.parametrize("calls", [("write",), ("rename",), ("sync",), ("create",)], ids="".join)
def test_a_file_system_that_never_answers_costs_the_time_that_the_rank_gives(
    calls: tuple[str, ...], site: Site
) -> None:
    place = site.place()
    site.bad.set("hang", calls, place.cache.root)
    answer = ask(place.rank(site.node), limit_s=2)
    assert [each.error for each in answer.targets] == ["not ready after 2 s"] * 2
    start = time.monotonic()
    other = place.rank(site.node)
    assert not other.restore().known
    assert time.monotonic() - start < 1, "it hears its ranks"
    site.bad.lift_all()
    ask(other)
    assert wait_until(lambda: not rests_in(place.cache))
    check(site, place, other)


@pytest.mark.long
def test_a_cache_that_never_answers_at_all_is_asked_once_and_the_service_ends_in_time(tmp_path: Path) -> None:
    bad = BadFiles(tmp_path)
    (tmp_path / "place").mkdir()
    (tmp_path / "another").mkdir()
    place, another = Place(tmp_path / "place"), Place(tmp_path / "another")
    with Node(tmp_path, **bad.environment) as node:
        rank, later = place.rank(node), node.client()
        bad.set("hang", EVERY, place.cache.root)
        answer = rank.warm(TARGETS, PLENTY, ANSWER_S + 15)
        assert all(f"{place.cache.root}: no answer in 30 s" in each.error for each in answer.targets)
        start = time.monotonic()
        assert ask(rank).targets and time.monotonic() - start < 2, "once is enough"
        assert f"{place.cache.root}: no answer in 5 s" in later.hello(place.hello()).problem
        assert not any(each.error for each in ask(another.rank(node)).targets), "and others go on"
        start = time.monotonic()
        assert node.end() == 0
        assert not node.left() and time.monotonic() - start < 15
        assert "Traceback" not in node.log


def test_who_says_hello_on_a_cache_that_does_not_answer_keeps_no_other_waiting(site: Site) -> None:
    place, another = site.place(), site.place("another")
    rule = site.bad.set("hang", LOOKS, place.cache.root)
    with ThreadPoolExecutor(1) as thread:
        welcome = thread.submit(site.node.client().hello, place.hello())
        assert wait_until(lambda: rule.fired)
        start = time.monotonic()
        ask(another.rank(site.node))
        assert not welcome.done() and time.monotonic() - start < 4, "the service hears the others meanwhile"
        assert f"{place.cache.root}: no answer in 5 s" in welcome.result().problem


@pytest.mark.parametrize("fault", [turns_read_only, is_stale], ids=lambda fault: fault.__name__)
def test_it_ends_in_order_whatever_has_become_of_the_cache(
    fault: Callable[[BadFiles, Path], Rule], tmp_path: Path
) -> None:
    bad = BadFiles(tmp_path)
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place")
    with Node(tmp_path, **bad.environment) as node:
        ask(place.rank(node))
        fault(bad, place.cache.root)
        assert node.end() == 0
        assert not node.left()
        assert not node.socket.parent.exists()
        assert "Traceback" not in node.log
