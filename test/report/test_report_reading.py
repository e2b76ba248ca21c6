"""A run of which some cannot be read is read without that, and says what."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.sample_runs import step, write_process
from sglang_warmstart.report.reading import NoEventsError, read_run


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"step","name":"\xff\xfe","at":1}\n',
        b'{"kind":"step","name":"cut o',
        b'{"kind":"a kind of a later version","name":"x","at":1}\n',
        b'{"kind":"step","name":"x","at":1e999}\n',
        b"\x00\x00\x00\n",
    ],
    ids=["no UTF-8", "cut off", "unknown kind", "out of range", "zeros"],
)
def test_a_line_that_cannot_be_read_costs_no_other(tmp_path: Path, line: bytes) -> None:
    write_process(tmp_path, "main", 1, 0.0, [step("imports", 0.0, 6.0), step("launch", 6.0, 7.0)])
    append(tmp_path / "main-1.jsonl", line)
    run = read_run(tmp_path)
    assert [event.name for event in run.lanes[0].events] == ["imports", "launch"]
    assert run.unreadable == ["main-1.jsonl: 1 lines cannot be read"]


def test_where_no_file_can_be_read_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "main-1.jsonl").write_bytes(b"\xff no header\n")
    with pytest.raises(NoEventsError, match=r"no file of .* can be read \(main-1\.jsonl: .+\): name the directory"):
        read_run(tmp_path)
