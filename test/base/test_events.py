"""Events are written as they happen, whatever happens to the disk, and read back as they were."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.confined import run_python
from sglang_warmstart.base import events
from sglang_warmstart.base.events import Event, EventLog, Lanes, emit, open_log, this_process, timed
from sglang_warmstart.report.reading import NoEventsError, find_run, read_run

TEXT = st.text(max_size=40)
NUMBER = st.floats(0, 1e9, allow_nan=False)
EVENTS = st.builds(
    Event,
    kind=st.sampled_from(["step", "discover", "record", "compile", "load", "restore", "ready", "jit"]),
    name=TEXT,
    at=NUMBER,
    seconds=NUMBER,
    phase=st.sampled_from(["startup", "serving"]),
    library=TEXT,
    lane=TEXT,
    shape=TEXT,
    target=TEXT,
    kernels=st.integers(0, 10**6),
    cached=st.booleans(),
    error=TEXT,
    remedy=TEXT,
)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "run", this_process("rank", pp_rank="1"))


def event_at(at: float, name: str = "a kernel") -> Event:
    return Event(kind="compile", name=name, at=at)


@given(written=st.lists(EVENTS, max_size=20))
def test_what_is_written_is_read_back_in_the_order_of_time(
    tmp_path_factory: pytest.TempPathFactory, written: list[Event]
) -> None:
    log = EventLog(tmp_path_factory.mktemp("run"), this_process("rank", pp_rank="1"))
    for each in written:
        log.emit(each)
    log.close()
    run = read_run(log.directory)
    (lane,) = run.lanes
    assert lane.process == log.process
    assert lane.events == sorted(written, key=lambda event: event.at)
    assert run.unreadable == []


def test_the_first_line_says_whose_the_file_is(log: EventLog) -> None:
    (path,) = log.directory.iterdir()
    said = json.loads(path.read_text())
    assert said["role"] == "rank"
    assert (said["pid"], said["labels"]) == (os.getpid(), {"pp_rank": "1"})
    assert abs(said["epoch"] + time.monotonic() - time.time()) < 1


def test_a_process_knows_when_it_was_started(tmp_path: Path) -> None:
    before = time.monotonic()
    said = run_python("from sglang_warmstart.base.events import this_process; print(this_process('main').started)")
    # It is counted in hundredths of a second.
    assert before - 0.02 < float(said) < time.monotonic()


def test_times_of_two_processes_are_comparable(tmp_path: Path) -> None:
    code = "from sglang_warmstart.base.events import now; print(now())"
    before, there, after = events.now(), float(run_python(code)), events.now()
    assert before < there < after


def test_the_start_and_the_newest_events_are_kept(tmp_path: Path) -> None:
    log = EventLog(tmp_path, this_process("rank"), file_limit=1000)
    for at in range(200):
        log.emit(event_at(at))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert max(sizes) <= 1000
    (lane,) = read_run(tmp_path).lanes
    kept = [int(event.at) for event in lane.events]
    assert kept[0] == 0
    assert kept[-1] == 199
    assert kept == sorted(set(kept))
    assert len(kept) < 60


def test_threads_do_not_mix_their_lines(log: EventLog) -> None:
    def write(first: int) -> None:
        for at in range(first, first + 500):
            log.emit(event_at(at, "x" * (at % 97)))

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 500, 1000, 1500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lane,) = read_run(log.directory).lanes
    assert [event.at for event in lane.events] == list(range(2000))


def test_a_line_that_was_cut_off_is_left_out(log: EventLog) -> None:
    log.emit(event_at(1))
    (path,) = log.directory.iterdir()
    whole = path.read_bytes()
    log.emit(event_at(2))
    path.write_bytes(path.read_bytes()[:-10])
    run = read_run(log.directory)
    assert [event.at for event in run.lanes[0].events] == [1]
    assert run.unreadable == [f"{path.name}: 1 lines cannot be read"]
    path.write_bytes(whole)
    assert read_run(log.directory).unreadable == []


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b'{"kind": "step"}\n', b"[1]\n"])
def test_a_file_that_is_none_is_named_and_the_others_are_read(content: bytes, log: EventLog) -> None:
    (log.directory / "rank-1.jsonl").write_bytes(content)
    run = read_run(log.directory)
    assert len(run.lanes) == 1
    assert [line.split(":")[0] for line in run.unreadable] == ["rank-1.jsonl"]


def test_where_there_are_no_events_it_is_said(tmp_path: Path) -> None:
    for read in (read_run, find_run):
        with pytest.raises(NoEventsError, match=f"no events in {tmp_path}"):
            read(tmp_path)


def test_the_newest_run_is_found(tmp_path: Path) -> None:
    for name in ("20261123-100000-7", "20261124-100000-3", "20261122-100000-9"):
        EventLog(tmp_path / name, this_process("main"))
    (tmp_path / "20261125-100000-1").mkdir()  # nothing in it
    assert find_run(tmp_path).name == "20261124-100000-3"
    assert find_run(tmp_path / "20261122-100000-9").name == "20261122-100000-9"


_FULL = """
import logging, resource, signal, sys
from pathlib import Path
from sglang_warmstart.base.events import Event, EventLog, this_process
logging.basicConfig(stream=sys.stdout, format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = EventLog(Path(sys.argv[1]), this_process("rank"))
heard = []
log.listeners.append(heard.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for at in range(100):
    log.emit(Event(kind="compile", name="a kernel", at=at))
print(len(heard))
"""


def test_a_full_disk_is_said_once_and_nothing_fails(tmp_path: Path) -> None:
    said = run_python(_FULL, str(tmp_path / "run")).splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"warmstart: events are not recorded in {tmp_path / 'run'}: ")
    assert said[1] == "100"
    run = read_run(tmp_path / "run")
    assert [event.at for event in run.lanes[0].events] == list(range(len(run.lanes[0].events)))
    assert len(run.lanes[0].events) > 10


def test_a_place_that_cannot_be_made_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    log = EventLog(tmp_path / "file" / "run", this_process("rank"))
    log.emit(event_at(1))
    assert len(caplog.records) == 1
    assert "Not a directory" in caplog.text


@pytest.fixture
def of_process(tmp_path: Path) -> Iterator[EventLog]:
    log = open_log("main", {events.EVENTS: str(tmp_path)})
    assert log is not None
    yield log
    events.close_log()


def test_without_a_run_nothing_is_recorded(tmp_path: Path) -> None:
    assert open_log("main", {}) is None
    emit("ready", "server", 1.0)
    assert events.log_of_process() is None


@pytest.mark.parametrize("told_of_none", [False, True])
def test_what_comes_before_the_log_is_kept_until_it_is_told_where_that_is(told_of_none: bool, tmp_path: Path) -> None:
    emit("compile", "before", 1.0)
    events.expect_log()
    emit("compile", "kept", 2.0)
    if told_of_none:
        assert open_log("service", {}) is None
    log = open_log("service", {events.EVENTS: str(tmp_path)})
    assert log is not None
    events.expect_log()  # too late: it has one
    emit("compile", "after", 3.0)
    events.close_log()
    (path,) = tmp_path.glob("*.jsonl")
    found = [json.loads(line)["name"] for line in path.read_text().splitlines()[1:]]
    assert found == (["after"] if told_of_none else ["kept", "after"])


def test_what_was_kept_is_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr("sglang_warmstart.base.metrics.Listener", lambda: lambda event: heard.append(event.name))
    events.expect_log()
    emit("compile", "kept", 1.0)
    assert open_log("service", {events.EVENTS: str(tmp_path / "run"), events.METRICS: "1"}) is not None
    emit("compile", "after", 2.0)
    events.close_log()
    assert heard == ["kept", "after"]


def test_no_more_than_a_plan_has_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EARLY_MAX", 3)
    events.expect_log()
    for at in range(5):
        emit("compile", "kernel", float(at))
    assert open_log("service", {events.EVENTS: str(tmp_path)}) is not None
    events.close_log()
    (path,) = tmp_path.glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 1 + 3


def test_a_process_has_one_log(of_process: EventLog, tmp_path: Path) -> None:
    assert open_log("rank", {events.EVENTS: str(tmp_path)}) is of_process
    assert open_log("rank", {events.EVENTS: str(tmp_path / "another")}) is not of_process


def test_what_takes_time_is_timed_also_where_it_fails(of_process: EventLog) -> None:
    with timed("step", "load weights") as details:
        time.sleep(0.02)
        details["kernels"] = 3
    with pytest.raises(ValueError), timed("step", "memory pool"):
        raise ValueError("no memory\nat all")
    done, failed = read_run(of_process.directory).lanes[0].events
    assert (done.name, done.kernels, done.error) == ("load weights", 3, "")
    assert 0.02 <= done.seconds < 1
    assert (failed.name, failed.error) == ("memory pool", "no memory")


def test_what_happens_after_ready_happens_while_serving(of_process: EventLog) -> None:
    emit("jit", "before", 1.0)
    of_process.ready_file.touch()
    emit("jit", "after", 2.0)
    of_process.ready_file.unlink()
    emit("jit", "later", 3.0)
    phases = [event.phase for event in read_run(of_process.directory).lanes[0].events]
    assert phases == ["startup", "serving", "serving"]


def test_a_run_that_was_removed_is_of_a_server_that_has_been_up_for_long(log: EventLog, tmp_path: Path) -> None:
    assert log.phase == "startup"
    shutil.rmtree(log.directory)
    assert log.phase == "serving"
    (tmp_path / "file").touch()
    assert EventLog(tmp_path / "file" / "run", log.process).phase == "startup"  # it was never there


def test_a_process_may_begin_to_serve_before_the_others(log: EventLog) -> None:
    log.begin_serving()
    assert log.phase == "serving"
    assert EventLog(log.directory, this_process("restore")).phase == "startup"


def test_metrics_that_cannot_be_had_are_said_and_events_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "sglang_warmstart.base.metrics", raising=False)
    log = open_log("main", {events.EVENTS: str(tmp_path / "run"), events.METRICS: "1"})
    try:
        emit("ready", "server", 1.0)
        (said,) = caplog.messages
        assert said.startswith("warmstart: no metrics: ModuleNotFoundError: ")
        assert log is not None
        assert len(read_run(log.directory).lanes[0].events) == 1
    finally:
        events.close_log()


def test_metrics_that_fail_are_said_once_and_events_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __call__(self, event: object) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr("sglang_warmstart.base.metrics.Listener", FullDisk)
    log = open_log("main", {events.EVENTS: str(tmp_path / "run"), events.METRICS: "1"})
    try:
        emit("ready", "server", 1.0)
        emit("jit", "a kernel", 2.0)
        assert caplog.messages == ["warmstart: no more metrics: OSError: No space left on device"]
        assert log is not None
        assert len(read_run(log.directory).lanes[0].events) == 2
    finally:
        events.close_log()


def test_what_is_not_utf_8_is_written_with_a_mark_in_its_place(log: EventLog) -> None:
    log.emit(Event(kind="load", name=os.fsdecode(b"caf\xe9"), at=1.0, kernels=3))
    (event,) = read_run(log.directory).lanes[0].events
    assert (event.name, event.kernels) == ("caf?", 3)


@given(steps=st.lists(st.booleans(), max_size=60))
def test_a_lane_is_the_lowest_number_that_nobody_has(steps: list[bool]) -> None:
    lanes, taken = Lanes(), set[int]()
    for give_back in steps:
        if give_back and taken:
            number = max(taken)
            taken.discard(number)
            lanes.give_back(number)
        else:
            number = lanes.take()
            assert number == min(set(range(1, len(taken) + 2)) - taken)
            taken.add(number)


def test_an_unknown_field_of_a_later_release_is_no_reason_to_refuse(log: EventLog) -> None:
    line = msgspec.to_builtins(event_at(5)) | {"energy": 3}
    (path,) = log.directory.iterdir()
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert [event.at for event in read_run(log.directory).lanes[0].events] == [5]
