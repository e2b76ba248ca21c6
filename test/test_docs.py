"""The pages in docs/ say what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu.tables import TABLES
from sglang_warmstart.base.switches import SWITCHES
from sglang_warmstart.cli.patches import SHIPPED, directories, patches_in, subject
from sglang_warmstart.sglang.__main__ import hooks, overview
from sglang_warmstart.sglang.feature import Feature
from sglang_warmstart.sglang.features import FEATURES

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_index_carries_the_table_of_features() -> None:
    assert overview() in page("features/README")


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_each_feature_has_a_page_with_the_table_of_its_hooks(feature: Feature) -> None:
    text = page(f"features/{feature.name}")
    assert hooks(feature) in text
    for part in ("**Problem.**", "**What is hooked.**", "**Measured", "**Upstream.**", "**May be dropped**"):
        assert part in text
    for number in re.findall(r"#(\d+)", feature.upstream):
        assert f"pull/{number}" in text


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_benchmarks_are_the_committed_results(table: Callable[[], str]) -> None:
    assert table() in page("results/benchmarks")


@pytest.mark.parametrize("version", directories(SHIPPED))
def test_the_page_of_the_patches_lists_them(version: str) -> None:
    text = page("patches").partition(f"## For SGLang {version}\n")[2].partition("\n## ")[0]
    for number, path in enumerate(patches_in(SHIPPED / f"sglang-{version}"), 1):
        assert f"| {number} | {subject(path)} |" in text


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_the_readme_explains_each_switch(switch: object) -> None:
    assert f"| `{switch.name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
