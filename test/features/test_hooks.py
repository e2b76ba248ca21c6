"""The table of hooks that each feature states is what it really adds and changes."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.release("0.5.12")
@pytest.mark.by_plugin
def test_each_feature_changes_what_its_table_says_and_nothing_else() -> None:
    from sglang_warmstart.features.feature import State
    from sglang_warmstart.plugin import loaded_plugin

    plugin = loaded_plugin()
    assert plugin is not None
    for installation in plugin.installations:
        for step in installation.feature.steps:
            for module in step.modules:
                importlib.import_module(module)
        # DeepGEMM's own attribute is replaced when a model that needs it is built, not before.
        stated = {target for target in installation.feature.hooks if not target.startswith("deep_gemm.")}
        assert installation.state is State.ACTIVE, installation.detail
        assert set(installation.patch.changed) == stated
