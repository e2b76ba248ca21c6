"""What a run comes to: counts, targets, kernels and a verdict; and its events in tracks and rows."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.sample_runs import TARGETS, step, write_exact, write_process, write_stock
from sglang_warmstart.base.events import Event
from sglang_warmstart.report.reading import read_run
from sglang_warmstart.report.summary import COUNTS, Summary, as_json, compared, in_words, summarise, verdict
from sglang_warmstart.report.tracks import rows_of, tracks_of

# On a busy machine examples take their time.
ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(read_run(write_exact(tmp_path_factory.mktemp("runs") / "exact", serving=True)))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(read_run(write_stock(tmp_path_factory.mktemp("runs") / "stock")))


def counts(summary: Summary) -> dict[str, int]:
    return {name: getattr(summary, name) for name in COUNTS if getattr(summary, name)}


def of(directory: Path, *events: Event, role: str = "rank", ready: float | None = 5.0) -> Summary:
    write_process(directory, role, 2, 0.0, events)
    if ready is not None:
        write_process(directory, "main", 1, 0.0, [Event(kind="ready", name="server", at=ready)])
    return summarise(read_run(directory))


def test_counts_of_a_run_with_exact_warm_up(exact: Summary) -> None:
    # The stub is no kernel, and of the two ranks each compiled one on call.
    assert counts(exact) == {"ahead": 39, "workers": 4, "on_call": 2, "cached": 3, "restored": 12}
    assert [(each.event.name, each.track) for each in exact.serving] == [("_fwd_grouped_kernel_stage1", "PP1 TP0")]
    assert verdict(exact) == "Ready after 79.4 s; 39 kernels compiled by 4 workers, 2 on call, 1 while serving."


def test_counts_of_a_stock_run(stock: Summary) -> None:
    assert counts(stock) == {"on_call": 78}
    assert verdict(stock) == "Ready after 174.1 s; 78 kernels compiled on call, none after ready."


def test_the_longest_compiles_come_first(exact: Summary) -> None:
    seconds = [each.event.seconds for each in exact.compiles]
    assert seconds == sorted(seconds, reverse=True)
    assert len(seconds) == 39 + 2 + 1
    assert "the stub" not in {each.event.name for each in exact.compiles}


def test_targets_have_their_kernels_and_seconds(exact: Summary) -> None:
    assert {each.name for each in exact.targets} == set(TARGETS)
    assert sum(each.kernels for each in exact.targets) == 39
    assert sum(each.cached for each in exact.targets) == 3
    ahead = [each.event for each in exact.compiles if each.event.kind == "compile"]
    assert sum(each.seconds for each in exact.targets) == pytest.approx(sum(event.seconds for event in ahead))


def test_a_kernel_is_one_whichever_rank_it_was_compiled_in(exact: Summary) -> None:
    (fused,) = [each for each in exact.kernels if each.name == "fused_moe_kernel"]
    assert (fused.ahead, fused.on_call, fused.cached) == (0, 2, 60)
    assert fused.longest.kind == "jit"


def test_a_late_target_is_no_kernel(tmp_path: Path) -> None:
    late = Event(kind="jit", name="a new target", at=1, seconds=2, target="t", kernels=0, library="deep-gemm")
    summary = of(tmp_path, late)
    assert counts(summary) == {"late": 1}
    assert verdict(summary) == "Ready after 5.00 s; 1 target found by a call, none after ready."
    assert summary.kernels == []


def test_a_failure_is_none_that_was_compiled(tmp_path: Path) -> None:
    summary = of(tmp_path, Event(kind="compile", name="k", at=1, seconds=2, target="t", error="no", lane="worker 1"))
    assert counts(summary) == {"failed": 1}
    assert verdict(summary) == "Ready after 5.00 s; no kernel compiled, 1 failed."
    assert (summary.targets[0].kernels, summary.targets[0].failed) == (0, 1)


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("rank", "Not ready: the last event is 3.00 s after the start; 1 kernel compiled by 1 worker."),
        ("compile", "Ended after 3.00 s; 1 kernel compiled by 1 worker."),
    ],
)
def test_a_run_that_was_never_ready(tmp_path: Path, role: str, said: str) -> None:
    compile_ = Event(kind="compile", name="k", at=1, seconds=2, lane="worker 1")
    assert verdict(of(tmp_path, compile_, role=role, ready=None)) == said


def test_two_runs_in_a_sentence(stock: Summary, exact: Summary) -> None:
    assert compared(stock, exact) == "B is ready 94.7 s earlier than A: after 79.4 s instead of 174.1 s."
    assert compared(exact, stock) == "B is ready 94.7 s later than A: after 174.1 s instead of 79.4 s."
    assert compared(exact, exact) == "A and B are ready after 79.4 s."
    assert compared(stock, stock, exact) == (
        "A and B are ready after 174.1 s. C is ready 94.7 s earlier than A: after 79.4 s instead of 174.1 s."
    )


def test_numbers_for_machines(exact: Summary) -> None:
    told = as_json(exact)
    assert sum(each["seconds"] for each in told["categories"]) == pytest.approx(told["seconds"])
    assert (told["ahead"], told["on_call"], told["ready"], told["hosts"]) == (39, 2, True, ["gpu-node-7"])
    assert told["serving"][0]["remedy"].startswith("a forward of this shape")
    assert told["serving"][0]["at"] > told["seconds"]
    assert len(told["compiles"]) == 42


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (4e-7, "0 s"),
        (0.000063, "63 µs"),
        (0.0021, "2 ms"),
        (0.099, "99 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (9.996, "10.0 s"),
        (174.06, "174.1 s"),
    ],
)
def test_seconds_in_words(seconds: float, said: str) -> None:
    assert in_words(seconds) == said


def test_tracks_are_in_the_order_in_which_one_reads_them(exact: Summary) -> None:
    assert [track.title for track in exact.tracks] == [
        "main", "PP0 TP0", "PP1 TP0", "restore", "service", "stub", "recorder 1",
        "worker 1", "worker 2", "worker 3", "worker 4",
    ]  # fmt: skip


def test_workers_are_in_the_order_of_their_numbers_and_no_two_tracks_share_a_title(tmp_path: Path) -> None:
    for pid in (7, 8):
        events = [Event(kind="compile", name="k", at=1, lane=f"worker {number}") for number in (10, 2)]
        write_process(tmp_path, "service", pid, 0.0, events)
    assert [track.title for track in tracks_of(read_run(tmp_path))] == [
        "worker 2 (pid 7)", "worker 10 (pid 7)", "worker 2 (pid 8)", "worker 10 (pid 8)"
    ]  # fmt: skip


def test_what_lies_within_an_event_is_in_the_row_below_it(tmp_path: Path) -> None:
    names = ["distributed", "kernel warm-up", "scheduler", "wait for kernels"]
    spans = [(1, 2), (3, 9), (0, 10), (3, 5)]
    summary = of(tmp_path, *(step(name, *span) for name, span in zip(names, spans, strict=True)))
    track = summary.tracks[1]
    assert {event.name: row for event, row in zip(track.events, track.rows, strict=True)} == {
        "scheduler": 0, "distributed": 1, "kernel warm-up": 1, "wait for kernels": 2
    }  # fmt: skip


@ANY_PACE
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40)), max_size=30))
def test_events_of_one_row_do_not_overlap(drawn: list[tuple[int, int]]) -> None:
    spans = sorted(((begin, begin + length) for begin, length in drawn), key=lambda span: (span[0], -span[1]))
    rows = rows_of(spans)
    for (left, left_row), (right, right_row) in combinations(zip(spans, rows, strict=True), 2):
        if left_row == right_row:
            assert left[1] <= right[0]
        elif left[0] <= right[0] and right[1] <= left[1] and left[1] > right[0]:
            assert right_row > left_row
