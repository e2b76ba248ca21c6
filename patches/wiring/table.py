"""The series as a table, which docs/patches.md carries."""

from __future__ import annotations

from wiring.series import SERIES


def table() -> str:
    """A row per patch: its subject, the features that a tree has from then on, and what it follows."""
    rows = [
        f"| {number} | {commit.subject} | {', '.join(f'[{name}]({name}.md)' for name in commit.features)} "
        f"| {commit.upstream} |"
        for number, commit in enumerate(SERIES, 1)
    ]
    return "\n".join(["| # | Patch | Feature | Upstream PR |", "| --- | --- | --- | --- |", *rows])
