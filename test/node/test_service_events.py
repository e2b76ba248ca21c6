"""The service writes down what it records and compiles, if its environment says where."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from kit.node import Node, Place, wait_until
from kit.standin_library import kernels_of
from sglang_warmstart.base.events import Event, Process
from sglang_warmstart.base.switches import EVENTS
from sglang_warmstart.deepgemm.dialects import short_name
from sglang_warmstart.deepgemm.target import Target

PLENTY = 100 << 30
TARGETS = [
    Target(kernel_type="GEMM_NT_F8F8BF16", n=n, k=7168, num_groups=1, num_sms=132, m_max=150) for n in (512, 2112)
]
FAILS = "exit 3"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def events_directory(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def node(tmp_path: Path, events_directory: Path) -> Iterator[Node]:
    with Node(tmp_path, **{EVENTS: str(events_directory)}) as node:
        yield node


def written(directory: Path, node: Node) -> list[Event]:
    """What the service has written, in the order of time."""
    (path,) = directory.glob(f"service-{node.service}.jsonl")
    header, *lines = path.read_bytes().splitlines()
    assert msgspec.json.decode(header, type=Process).role == "service"
    return sorted((msgspec.json.decode(line, type=Event) for line in lines), key=lambda event: event.at)


def names_of(*targets: Target) -> set[str]:
    return {short_name(kernel.directory) for each in targets for m in each.m_values for kernel in kernels_of(each, m)}


def test_each_recording_and_each_compile_is_an_event(node: Node, place: Place, events_directory: Path) -> None:
    place.nvcc.on_each_kernel("sleep 0.2")
    rank = place.rank(node)
    rank.warm(TARGETS, PLENTY, 30)
    assert wait_until(lambda: sum(event.kind == "record" for event in written(events_directory, node)) == 2)
    found = written(events_directory, node)

    records = [event for event in found if event.kind == "record"]
    assert {event.name for event in records} == {str(target) for target in TARGETS}
    assert {event.kernels for event in records} == {len(names_of(target)) for target in TARGETS}

    compiles = [event for event in found if event.kind == "compile" and not event.cached and event.lane != "stub"]
    assert sorted(event.name for event in compiles) == sorted(names_of(*TARGETS))
    assert all(0.2 <= event.seconds < 20 and event.target in map(str, TARGETS) for event in compiles)
    # Four of them at once: as many lanes, and in none of them two at a time.
    lanes = {event.lane for event in compiles}
    assert lanes <= {f"worker {number}" for number in range(1, 5)}
    assert len(lanes) > 1
    for lane in lanes:
        own = [event for event in compiles if event.lane == lane]
        assert all(first.at + first.seconds <= then.at for first, then in pairwise(own))
    assert [event.name for event in found if event.lane == "stub"] == ["the stub"]


def test_a_compile_that_fails_says_why(node: Node, place: Place, events_directory: Path) -> None:
    place.nvcc.on_each_kernel(FAILS)
    place.rank(node).warm(TARGETS[:1], PLENTY, 30)
    failed = [event for event in written(events_directory, node) if event.error]
    assert failed
    assert all(event.kind == "compile" and "exit status 3" in event.error for event in failed)


def test_what_a_marker_knows_is_restored_and_compiles_nothing(
    node: Node, place: Place, events_directory: Path, tmp_path: Path
) -> None:
    place.rank(node).warm(TARGETS, PLENTY, 30)
    with Node(tmp_path, **{EVENTS: str(events_directory)}) as again:
        place.rank(again).restore()
        # A rank may still ask for others, so that the service gets ready to record.
        (event,) = (each for each in written(events_directory, again) if each.name != "the stub")
    assert (event.kind, event.cached) == ("restore", True)
    assert event.kernels == len(names_of(*TARGETS))


def test_without_a_directory_there_are_none(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENTS, raising=False)
    with Node(tmp_path) as node:
        place.rank(node).warm(TARGETS[:1], PLENTY, 30)
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_a_service_that_was_started_before_the_run_is_told_of_it(tmp_path: Path, place: Place) -> None:
    run = {EVENTS: str(tmp_path / "run")}
    with Node(tmp_path) as node:
        place.rank(node).warm(TARGETS[:1], PLENTY, 30)
        assert not (tmp_path / "run").exists()
        for _ in range(2):
            node.client().build_planned(None, run)
        assert wait_until((tmp_path / "run").exists)
        place.rank(node).warm(TARGETS, PLENTY, 30)
        # With what it has done before.
        names = [str(target) for target in TARGETS[:2]]
        assert wait_until(
            lambda: [each.name for each in written(tmp_path / "run", node) if each.kind == "record"] == names
        )
