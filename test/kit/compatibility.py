"""The tables of docs/compatibility.md, made from what `make test-matrix` has recorded on each release."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kit.release import VERSIONS

RESULTS = Path(__file__).parents[1] / "matrix"
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

# What is made lies between these two lines of the page.
BEGIN = "<!-- from here to the next comment: made by `make test-matrix RECORD=--record` -->\n"
END = "<!-- the rest is written by hand -->\n"

# Of these states the reason is on the page.
_EXPLAINED = ("partly", "stands aside", "built in")


@dataclass(frozen=True)
class Result:
    """One release.

    Args:
        release: of SGLang.
        deep_gemm: the release of sgl-deep-gemm that it pins.
        features: state and detail of each feature, as `doctor` says them.
        tests: passed, failed and skipped tests, by test file.
    """

    release: str
    deep_gemm: str
    features: Mapping[str, tuple[str, str]]
    tests: Mapping[str, Mapping[str, int]]

    def count(self, outcome: str) -> int:
        """Tests with this outcome."""
        return sum(each.get(outcome, 0) for each in self.tests.values())


def result_of(release: str) -> Result:
    """What is recorded of a release.

    Raises:
        FileNotFoundError: nothing is.
    """
    made: dict[str, Any] = json.loads((RESULTS / f"{release}.json").read_text(encoding="utf-8"))
    features = {name: (state, detail) for name, (state, detail) in made["features"].items()}
    return Result(made["release"], made["deep_gemm"], features, made["tests"])


def record(release: str, deep_gemm: str, features: Mapping[str, Sequence[str]], tests: Mapping[str, Any]) -> None:
    """Keep a result, and make the page anew."""
    made = {"release": release, "deep_gemm": deep_gemm, "features": features, "tests": tests}
    (RESULTS / f"{release}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, recorded()), encoding="utf-8")


def recorded() -> list[Result]:
    """All results, from the oldest release to the newest."""
    return [result_of(release) for release in VERSIONS if (RESULTS / f"{release}.json").is_file()]


def with_tables(page: str, results: Sequence[Result]) -> str:
    """The page with these results."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert before and after, f"{PAGE} has lost the comment before or after its tables"
    releases = [each.release for each in results]
    names = list(results[-1].features)
    states = [[f"[{name}](features/{name}.md)", *(each.features[name][0] for each in results)] for name in names]
    rows = [*states, ["Its sgl-deep-gemm", *(each.deep_gemm for each in results)]]
    if all(each.tests for each in results):
        rows.append(["Tests passed", *(str(each.count("passed")) for each in results)])
        rows.append(["Tests about other releases", *(str(each.count("skipped")) for each in results)])
    first, why = (
        _table(["SGLang", *releases], rows),
        _table(["Feature", "Releases", "State", "Why"], _why(results)),
    )
    return (
        f"{before}{BEGIN}\n## Feature by release\n\n{first}{_LEGEND}\n## Why, release by release\n\n{why}\n{END}{after}"
    )


_LEGEND = """
- *Active*: the plugin provides the feature.
- *Built in*: this SGLang has the feature, something calls it, and the plugin leaves it alone.
- *Partly*: some of the feature works.
- *Stands aside*: this SGLang does not look as the plugin expects, and the plugin leaves it as it is.
"""


def _why(results: Sequence[Result]) -> Iterable[list[str]]:
    """A row for each run of releases that say the same of a feature."""
    for name in results[-1].features:
        for (state, detail), same in groupby(results, key=lambda each: each.features[name]):
            if state in _EXPLAINED:
                releases = [each.release for each in same]
                span = releases[0] if len(releases) == 1 else f"{releases[0]} to {releases[-1]}"
                reason = f"`{detail}`" if state == "built in" else detail
                yield [name, span, state, reason]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
