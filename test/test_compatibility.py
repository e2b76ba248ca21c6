"""docs/compatibility.md is made of what was recorded on each release, and that is what `doctor` says there."""

from __future__ import annotations

import json
import re

import pytest
from kit import compatibility
from kit.fork_server import ForkServer
from kit.release import VERSIONS, installed_release
from sglang_warmstart.sglang.features import FEATURES

FINDINGS = """
import json
from sglang_warmstart.cli import doctor
print("FOUND", json.dumps({each.name: [each.state, each.detail] for each in doctor.examine().features}))
"""


@pytest.mark.by_plugin
def test_what_is_recorded_is_what_doctor_says_on_this_release(forks: ForkServer) -> None:
    done = forks.run(FINDINGS)
    found = json.loads(re.search(r"^FOUND (.*)$", done.checked(), re.MULTILINE)[1])  # type: ignore[index]
    recorded = compatibility.result_of(installed_release().version).features
    assert {name: list(each) for name, each in recorded.items()} == found
    assert found.keys() == {feature.name for feature in FEATURES}


def test_the_page_is_made_of_the_results() -> None:
    page, results = compatibility.PAGE.read_text(encoding="utf-8"), compatibility.recorded()
    assert page == compatibility.with_tables(page, results), "make test-matrix RECORD=--record"
    assert [each.release for each in results] == list(VERSIONS)


def test_no_test_failed_where_the_results_were_recorded() -> None:
    for result in compatibility.recorded():
        assert result.count("passed") and not result.count("failed"), result.release
