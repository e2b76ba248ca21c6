"""docs/compatibility.md is what `doctor` finds on the SGLang at hand, and the table of known limits.

`python -m test_compatibility` (with test/ on the path) prints the column of the installed release.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kit.fork_server import ForkServer
from kit.release import installed_release
from sglang_warmstart.sglang.features import FEATURES
from sglang_warmstart.sglang.limits import LIMITS

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"

FINDINGS = """
import json
from sglang_warmstart.cli import doctor
print("FOUND", json.dumps({each.name: each.state for each in doctor.examine().features}))
"""


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page, without its second line."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set(row[0]) <= {"-"}]


def limits_table() -> list[list[str]]:
    """The known limits as rows: feature, the releases that have it, what is left of the feature, why."""
    rows = []
    for name, limits in LIMITS.items():
        for number, limit in enumerate(limits):
            until = limits[number + 1].since if number + 1 < len(limits) else None
            if limit.state != "works":
                rows.append([name, f"{limit.since} to before {until}" if until else f"from {limit.since}", limit.state])
                rows[-1].append(limit.reason)
    return rows


@pytest.mark.by_plugin
def test_the_page_says_what_doctor_finds_on_this_release(forks: ForkServer) -> None:
    done = forks.run(FINDINGS)
    found = json.loads(re.search(r"^FOUND (.*)$", done.checked(), re.MULTILINE)[1])  # type: ignore[index]
    head, *rows = rows_of("Tested")
    column = head.index(installed_release().version)
    assert {row[0].partition("]")[0].strip("["): row[column] for row in rows} == found
    assert found.keys() == {feature.name for feature in FEATURES}


def test_the_page_has_all_known_limits() -> None:
    assert rows_of("Known limits, release by release")[1:] == limits_table()


if __name__ == "__main__":
    for each in limits_table():
        print("| " + " | ".join(each) + " |")
