"""``python -m sglang_warmstart.sglang``: the features as a Markdown table, which docs/features/README.md carries."""

from __future__ import annotations

from sglang_warmstart.sglang.feature import Feature
from sglang_warmstart.sglang.features import FEATURES


def overview() -> str:
    """A row per feature: what SGLang gains, what it follows, and when it may be dropped."""
    rows = [
        f"| [{feature.name}]({feature.name}.md) | {feature.gains} | {feature.upstream} | {feature.drop_when} |"
        for feature in FEATURES
    ]
    return "\n".join(
        ["| Feature | What SGLang gains | Upstream PR | May be dropped when |", "| --- | --- | --- | --- |", *rows]
    )


def hooks(feature: Feature) -> str:
    """A row per symbol of SGLang that the feature adds or changes, and why it is that one."""
    rows = [f"| `{target}` | {why} |" for target, why in feature.hooks.items()]
    return "\n".join(["| In SGLang | Why there |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(overview())
    for each in FEATURES:
        print(f"\n## {each.name}\n\n{hooks(each)}")
