"""Each instant of a start-up is attributed to one category, and the categories add up to it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.sample_runs import write_exact, write_process, write_stock
from sglang_warmstart.base.events import Event, Process
from sglang_warmstart.report.breakdown import CATEGORIES, breakdown_of
from sglang_warmstart.report.reading import Lane, Run, read_run

STEPS = [
    "imports",
    "launch",
    "scheduler",
    "distributed",
    "load weights",
    "kernel warm-up",
    "CUDA graphs",
    "something new",
]
EVENTS = st.builds(
    Event,
    kind=st.sampled_from(["step", "discover", "record", "compile", "load", "restore", "jit"]),
    name=st.sampled_from(STEPS),
    at=st.floats(0, 100),
    seconds=st.floats(-1, 60),
    phase=st.sampled_from(["startup", "serving"]),
)

# On a busy machine examples take their time.
ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def lane_of(role: str, events: list[Event], started: float = 0.0, pid: int = 1) -> Lane:
    process = Process(role=role, pid=pid, host="host", boot="boot", started=started, epoch=0.0)
    return Lane(process, sorted(events, key=lambda event: event.at))


def step(name: str, begin: float, end: float) -> Event:
    return Event(kind="step", name=name, at=begin, seconds=end - begin)


def ready(at: float) -> Event:
    return Event(kind="ready", name="server", at=at)


def parts_of(*lanes: Lane) -> dict[str, float]:
    parts = breakdown_of(Run("a run", list(lanes))).parts
    return {key: seconds for key, seconds in parts.items() if seconds}


LANES = st.lists(
    st.builds(
        lane_of,
        st.sampled_from(["main", "rank", "service", "restore", "compile"]),
        st.lists(EVENTS, max_size=12),
        st.floats(0, 50),
    ),
    min_size=1,
    max_size=5,
)


@ANY_PACE
@given(lanes=LANES, ready_at=st.none() | st.floats(0, 200))
def test_the_parts_add_up_and_none_is_negative(lanes: list[Lane], ready_at: float | None) -> None:
    if ready_at is not None:
        lanes = [*lanes, lane_of("main", [ready(ready_at)], 60.0)]
    found = breakdown_of(Run("a run", lanes))
    assert found.seconds >= 0
    assert list(found.parts) == [category.key for category in CATEGORIES]
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert sum(found.parts.values()) == pytest.approx(found.seconds, abs=1e-6)
    # In the order of time the same, without a gap.
    assert all(left.end == right.begin and left.category != right.category for left, right in pairwise(found.stretches))
    if found.seconds > 0:
        assert (found.stretches[0].begin, found.stretches[-1].end) == (0.0, found.seconds)


@ANY_PACE
@given(lanes=LANES)
def test_an_instant_belongs_to_an_event_that_is_under_way_then_and_to_other_only_if_there_is_none(
    lanes: list[Lane],
) -> None:
    run = Run("a run", lanes)
    followed = [lane for lane in lanes if lane.process.role in ("main", "rank")] or lanes
    for stretch in breakdown_of(run).stretches:
        middle = run.start + (stretch.begin + stretch.end) / 2
        # Where two events meet, times differ by what a sum of floats loses.
        if stretch.end - stretch.begin < 1e-6:
            continue
        covered = any(event.at <= middle < event.at + event.seconds for lane in followed for event in lane.events)
        assert covered == (stretch.category != "other")


def test_the_innermost_event_counts() -> None:
    rank = lane_of(
        "rank",
        [
            step("scheduler", 0, 10),
            step("kernel warm-up", 2, 8),
            step("wait for kernels", 3, 6),
            Event(kind="load", name="targets", at=6, seconds=1),
            Event(kind="jit", name="a kernel", at=7.5, seconds=0.25),
        ],
    )
    assert parts_of(rank) == {"setup": 4.0, "warmup": 1.75, "compile": 3.0, "load": 1.0, "jit": 0.25}


def test_the_slowest_rank_is_followed_then_the_others_then_main() -> None:
    fast = lane_of(
        "rank", [step("scheduler", 2, 6), step("load weights", 3, 6), Event(kind="jit", name="late", at=9, seconds=1)]
    )
    slow = lane_of("rank", [step("scheduler", 4, 8), step("CUDA graphs", 5, 8)])
    main = lane_of("main", [step("imports", 0, 4.5), step("server warm-up", 8.5, 12), ready(12)])
    # 0 to 2 main; 2 to 4 the fast rank; 4 to 8 the slow one; nobody; main, and a call of the fast rank within.
    assert parts_of(main, fast, slow) == {
        "process": 2.0, "setup": 2.0, "weights": 1.0, "graphs": 3.0, "jit": 1.0, "server": 2.5, "other": 0.5
    }  # fmt: skip


def test_a_service_does_not_count_by_itself() -> None:
    service = lane_of("service", [Event(kind="compile", name="a kernel", at=1, seconds=3, lane="worker 1")])
    rank = lane_of("rank", [step("load weights", 0, 5)])
    assert parts_of(rank, service) == {"weights": 5.0}


def test_a_run_of_the_compile_command_is_followed_by_what_it_has() -> None:
    compiler = lane_of("compile", [Event(kind="compile", name="a kernel", at=1, seconds=3, lane="worker 1")])
    assert parts_of(compiler) == {"compile": 3.0, "other": 1.0}


def test_what_happens_after_ready_does_not_count() -> None:
    late = Event(kind="jit", name="a kernel", at=9, seconds=5, phase="serving")
    assert parts_of(lane_of("rank", [step("scheduler", 0, 10), late]), lane_of("main", [ready(10)])) == {
        "setup": 9.0,
        "jit": 1.0,
    }


def test_real_looking_runs(tmp_path: Path) -> None:
    exact, stock = (breakdown_of(read_run(write(tmp_path / write.__name__))) for write in (write_exact, write_stock))
    assert stock.parts["jit"] > 100 > stock.parts["compile"] == 0
    assert exact.parts["jit"] < 2 < 30 < exact.parts["compile"]
    assert exact.parts["other"] < 0.5


def test_hosts_whose_clocks_differ_are_brought_onto_one(tmp_path: Path) -> None:
    write_process(tmp_path, "main", 1, 0.0, [step("imports", 0, 1), ready(20)])
    write_process(tmp_path, "rank", 2, 1.0, [step("scheduler", 1, 19)])
    path = tmp_path / "rank-2.jsonl"
    there = path.read_text()
    moved = there.replace('"a-boot"', '"another"').replace('"epoch":1789000000.0', '"epoch":1789042900.0')
    path.write_text(moved.replace("43201.0", "301.0"))
    run = read_run(tmp_path)
    assert (run.lanes[1].events[0].at, run.lanes[1].process.started) == (43201.0, 43201.0)
    assert {key: value for key, value in breakdown_of(run).parts.items() if value} == {
        "process": 1.0,
        "setup": 18.0,
        "other": 1.0,
    }
