"""Print the table of docs/testing.md from a report: `pytest --junitxml=REPORT.xml`, then `timing.py REPORT.xml`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

TEST = Path(__file__).parents[1]


def table(report: Path) -> str:
    """Folder, tests, lines and seconds (summed over the processes that ran side by side), in Markdown."""
    tests: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts = case.get("classname", "").split(".")
        folder = parts[1] if len(parts) > 2 and (TEST / parts[1]).is_dir() else "."
        tests[folder] += 1
        seconds[folder] += float(case.get("time", "0"))
    rows = ["| folder | tests | lines | seconds |", "|---|---:|---:|---:|"]
    for folder in sorted(tests):
        files = TEST.glob("*.py") if folder == "." else (TEST / folder).rglob("*.py")
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        rows.append(f"| test/{folder} | {tests[folder]} | {lines} | {seconds[folder]:.0f} |".replace("/. ", " "))
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
