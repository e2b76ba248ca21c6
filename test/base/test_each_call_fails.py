"""Whichever call of the file system fails, or is the last one of a process: what is there is the old or the new."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.bad_files import BadFiles
from kit.confined import run_python


@pytest.mark.parametrize(
    "how", ["once", *(pytest.param(each, marks=pytest.mark.long) for each in ("from then on", "kill"))]
)
def test_what_is_published_is_old_or_new(how: str, tmp_path: Path) -> None:
    code = "from kit.each_call import main; main()"
    found = json.loads(run_python(code, how, str(tmp_path), environment=BadFiles(tmp_path).environment))
    for title, (calls, wrong) in found.items():
        assert calls >= 5, f"{title}: its calls were not seen"
        assert wrong == [], title
