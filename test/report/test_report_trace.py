"""A trace keeps to Chrome's format, and has every event of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.sample_runs import HOSTILE, write_exact, write_hostile, write_process, write_stock
from sglang_warmstart.base.events import Event, Process
from sglang_warmstart.report.reading import Lane, Run, read_run
from sglang_warmstart.report.trace import trace_of, write_trace

# On a busy machine examples take their time.
ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Trace = list[dict[str, Any]]


def check(trace: dict[str, Any]) -> Trace:
    """The rules of the format, for the kinds of events that are used."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: Trace = trace["traceEvents"]
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        assert event["name"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            (key,) = event["args"]
            assert key == ("name" if event["name"].endswith("_name") else "sort_index")
            place = (event["pid"], 0 if event["name"].startswith("process") else event["tid"])
            assert place not in named[event["name"]], "a name is given once"
            named[event["name"]].add(place)
            continue
        assert isinstance(event["ts"], int), "microseconds"
        assert isinstance(event["cat"], str)
        if event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
        else:
            assert event["ph"] == "i"
            assert event["s"] in ("g", "p", "t")
        assert (event["pid"], 0) in named["process_name"], "named before it is used"
        assert (event["pid"], event["tid"]) in named["thread_name"]
    for thread in threads_of(events).values():
        # A viewer stacks what lies within something else, and draws what only overlaps wrongly.
        open_ends: list[int] = []
        for event in sorted(thread, key=lambda each: (each["ts"], -each["dur"])):
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1]
            open_ends.append(event["ts"] + event["dur"])
    return events


def threads_of(events: Trace) -> dict[tuple[int, int], Trace]:
    found: dict[tuple[int, int], Trace] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return found


def names(events: Trace, of: str) -> list[str]:
    return [event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == f"{of}_name"]


def test_a_run_as_a_trace(tmp_path: Path) -> None:
    run = read_run(write_exact(tmp_path / "exact", serving=True))
    path = tmp_path / "trace.json"
    write_trace([run], path)
    events = check(json.loads(path.read_text(encoding="ascii")))
    told = [event for event in events if event["ph"] != "M"]
    assert len(told) == sum(len(lane.events) for lane in run.lanes)
    assert names(events, "process") == [
        "main (pid 4001 on gpu-node-7)",
        "PP0 TP0 (pid 4100 on gpu-node-7)",
        "PP1 TP0 (pid 4101 on gpu-node-7)",
        "restore (pid 4300 on gpu-node-7)",
        "service (pid 4200 on gpu-node-7)",
    ]
    assert names(events, "thread")[-4:] == ["worker 1", "worker 2", "worker 3", "worker 4"]
    order = [event["args"]["sort_index"] for event in events if event["name"] == "process_sort_index"]
    assert order == sorted(order)
    (ready,) = (event for event in told if event["ph"] == "i")
    assert run.ready is not None
    assert ready["ts"] == round((run.ready - run.start) * 1e6)
    (serving,) = (event for event in told if event.get("args", {}).get("phase") == "serving")
    assert (serving["name"], serving["dur"], serving["args"]["library"]) == (
        "_fwd_grouped_kernel_stage1",
        840_000,
        "triton",
    )
    assert serving["args"]["remedy"].startswith("a forward of this shape")


def test_two_runs_do_not_share_a_process(tmp_path: Path) -> None:
    runs = [read_run(write_stock(tmp_path / "stock")), read_run(write_stock(tmp_path / "again"))]
    events = check(trace_of(runs))
    found = names(events, "process")
    assert len(found) == len(set(found)) == 6
    assert [name.split(":")[0] for name in found] == ["stock"] * 3 + ["again"] * 3


def test_texts_from_outside_stay_what_they_are(tmp_path: Path) -> None:
    events = check(json.loads(json.dumps(trace_of([read_run(write_hostile(tmp_path / "run"))]))))
    assert HOSTILE in {event["name"] for event in events}


def test_an_event_without_a_name_has_that_of_its_kind(tmp_path: Path) -> None:
    write_process(tmp_path / "run", "rank", 1, 0.0, [Event(kind="load", name="", at=1.0)])
    assert [event["name"] for event in check(trace_of([read_run(tmp_path / "run")])) if event["ph"] == "X"] == ["load"]


@pytest.mark.timeout(120)
@ANY_PACE
@given(spans=st.lists(st.tuples(st.integers(0, 30), st.integers(-2, 30)), max_size=25))
def test_whatever_overlaps_becomes_a_valid_trace(spans: list[tuple[int, int]]) -> None:
    process = Process(role="rank", pid=1, host="host", boot="boot", started=0.0, epoch=0.0)
    events = [Event(kind="step", name="x", at=begin / 10, seconds=length / 10) for begin, length in spans]
    told = check(trace_of([Run("a run", [Lane(process, sorted(events, key=lambda event: event.at))])]))
    assert sum(event["ph"] == "X" for event in told) == len(spans)
