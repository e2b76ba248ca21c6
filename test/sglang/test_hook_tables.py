"""The table of hooks that each feature states is what it really adds and changes."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

# In one mode of its feature only.
_BY_MODE = {"sglang.srt.layers.deep_gemm_wrapper.compile_utils.deep_gemm_execution_hook"}


def is_there(target: str) -> bool:
    """Whether the installed release has something of this dotted name."""
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.release("0.5.12")
@pytest.mark.by_plugin
def test_each_feature_changes_what_its_table_says_and_nothing_else() -> None:
    from sglang_warmstart.plugin import loaded_plugin
    from sglang_warmstart.sglang.feature import State

    plugin = loaded_plugin()
    assert plugin is not None
    for installation in plugin.installations:
        for step in installation.feature.steps:
            for module in step.modules:
                if step.required or is_there(module):
                    importlib.import_module(module)
        # DeepGEMM's own attribute is replaced when a model that needs it is built, not before.
        stated = {target for target in installation.feature.hooks if not target.startswith("deep_gemm.")}
        assert installation.state is State.ACTIVE, installation.detail
        changed = set(installation.hooks.changed)
        assert changed <= stated
        # What a table has beyond that is of another release, or of a library that is not installed here.
        assert [target for target in stated - changed - _BY_MODE if is_there(target)] == []
