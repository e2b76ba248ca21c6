"""The plugin in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_warmstart import plugin as plugin_module
from sglang_warmstart.base.copies import mend_copies, mended_together
from sglang_warmstart.base.switches import STRICT, WARMSTART
from sglang_warmstart.plugin import Plugin
from sglang_warmstart.sglang.feature import State


@contextmanager
def plugin_in_this_process() -> Iterator[Plugin]:
    """Load the plugin as SGLang does; afterwards SGLang is as it was."""
    from sglang.srt.environ import Envs
    from sglang.srt.utils import common

    assert plugin_module.loaded_plugin() is None, "the plugin is loaded in this process already"
    configure_logger = common.configure_logger
    plugin_module.register()
    plugin = plugin_module.loaded_plugin()
    assert plugin is not None, "SGLANG_WARMSTART=0 is set"
    try:
        yield plugin
    finally:
        with mended_together():
            for installation in reversed(plugin.installations):
                installation.missing.clear()  # what it waits for may be imported by a later test
                installation.hooks.undo()
        for switch in (WARMSTART, STRICT):
            delattr(Envs, switch.name)
        mend_copies(common.configure_logger, configure_logger)
        plugin_module._loaded = None


def load_again(plugin: Plugin) -> None:
    """As in a process that has just been started: what the features remember is forgotten."""
    import sglang

    with mended_together():
        for installation in reversed(plugin.installations):
            installation.hooks.undo()
            installation.state = State.WAITING
    plugin.install(Path(sglang.__path__[0]))
