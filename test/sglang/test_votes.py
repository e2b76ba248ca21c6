"""Ranks agree where one of them is late, has failed, or has never heard of us: real processes and a real store."""

from __future__ import annotations

import json

import pytest
from kit.fork_server import ForkServer
from kit.voters import ABSENT, LIMIT_S
from sglang_warmstart.sglang.votes import Votes

RUN = "import json, sys; from kit.voters import run; print(json.dumps(run(*sys.argv[1:])))"


def run(forks: ForkServer, *names: str) -> list[tuple[object, float]]:
    return [(said, seconds) for said, seconds in json.loads(forks.run(RUN, *names).checked().splitlines()[-1])]


@pytest.mark.parametrize("size", [2, 4])
def test_all_hear_the_least(forks: ForkServer, size: int) -> None:
    assert [said for said, _ in run(forks, *["votes_at_once"] * size)] == [[2, 2]] * size


def test_one_that_is_slow_is_waited_for(forks: ForkServer) -> None:
    assert [said for said, _ in run(forks, "votes_at_once", "is_slow")] == [[1, 1]] * 2


@pytest.mark.parametrize(
    ("odd", "size", "second"),
    [
        ("is_without_the_plugin", 2, ABSENT),
        ("is_without_the_plugin", 4, ABSENT),
        ("says_nothing", 2, ABSENT),
        ("fails", 4, ABSENT),
        ("comes_too_late", 4, 1),
        ("takes_the_place_of_another", 2, ABSENT),
    ],
)
def test_one_that_takes_no_part_keeps_nobody_waiting_and_all_hear_the_same(
    forks: ForkServer, odd: str, size: int, second: int
) -> None:
    _, *others = run(forks, odd, *["votes_at_once"] * (size - 1))
    assert [said for said, _ in others] == [[ABSENT, second]] * (size - 1)
    assert all(seconds < LIMIT_S * 2.5 for _, seconds in others)


def test_one_that_has_failed_is_not_waited_for(forks: ForkServer) -> None:
    _, (_, seconds) = run(forks, "fails", "votes_at_once")
    assert seconds < LIMIT_S / 2


def test_two_that_come_to_the_end_of_their_waits_at_different_times_hear_the_same(forks: ForkServer) -> None:
    _, *others = run(forks, "comes_too_late", "votes_at_once", "is_slow", "votes_at_once")
    assert len({str(said) for said, _ in others}) == 1


def test_alone_nobody_is_asked() -> None:
    assert Votes("a matter").least([3], "first", 7, ABSENT) == 7


WITHOUT_A_GROUP = """
from sglang_warmstart.sglang.votes import Votes
ours = Votes("a matter")
try:
    ours.join()
except ValueError as error:
    print("process group" in str(error))
print(ours.least(range(2), "first", 7, -1))
"""


def test_without_a_process_group_it_is_an_error_and_votes_are_absent(forks: ForkServer) -> None:
    assert forks.run(WITHOUT_A_GROUP).checked().splitlines()[-2:] == ["True", "-1"]
