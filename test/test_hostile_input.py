"""Whatever a file, a message or a variable says, it is taken, or refused in one line. `make soak` tries many more."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.hostile import SUBJECTS
from kit.outside import Watch

WATCH = Watch()


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_input_is_taken_or_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as empty:
        subject = SUBJECTS[name](Path(place))
        monkeypatch.chdir(empty)

        @settings(max_examples=100, deadline=5000, database=None)
        @given(st.integers(0, 1 << 32))
        def try_one(seed: int) -> None:
            WATCH.outside.clear()
            with WATCH.over(Path(place)):
                subject.try_one(seed)
            assert WATCH.outside == []
            assert list(Path(empty).iterdir()) == []

        try_one()
        monkeypatch.undo()
