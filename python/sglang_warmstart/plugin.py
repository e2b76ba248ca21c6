"""The plugin: what SGLang calls when it loads its plugins, in every process of a server.

SGLang finds ``register`` by the entry point ``warmstart`` of the group ``sglang.srt.plugins``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from sglang_warmstart import __version__
from sglang_warmstart.base.copies import mended_together
from sglang_warmstart.base.errors import StandsAsideError, one_line
from sglang_warmstart.base.hooks import Hooks
from sglang_warmstart.base.switches import STRICT, WARMSTART
from sglang_warmstart.sglang.announce import Announcer, logging_is_set_up
from sglang_warmstart.sglang.envs import ENVIRON, declare
from sglang_warmstart.sglang.feature import Feature, Installation, State, Step, find_built_in
from sglang_warmstart.sglang.features import chosen_features
from sglang_warmstart.sglang.seams.source import has_module

COMMON = "sglang.srt.utils.common"


class Plugin:
    """The features in this process, and what is to be said of them."""

    def __init__(self, features: Iterable[Feature], announcer: Announcer) -> None:
        self.installations = [Installation(feature, Hooks(feature.name, announcer.warn)) for feature in features]
        self.announcer = announcer
        self._spoken = False  # the summary is in the log: what changes from then on is said line by line

    def install(self, sglang_root: Path) -> None:
        """Install every feature: at once where SGLang has imported what it hooks, else as soon as it does."""
        for installation in self.installations:
            feature = installation.feature
            found = find_built_in(feature, sglang_root)
            if found is not None:
                installation.state, installation.detail = State.BUILT_IN, found
                continue
            # What a release lacks, its seam does not need: steps of other releases are left out.
            installation.steps = tuple(
                step
                for step in feature.steps
                if step.required or all(has_module(sglang_root, module) for module in step.modules)
            )
            installation.missing = set(installation.steps)
            for step in installation.steps:
                self._when_imported(step.modules, partial(self._run, installation, step))

    def summary(self) -> str:
        """The features of this process in one line."""
        by_state = {state: [each.feature.name for each in self.installations if each.state is state] for state in State}
        parts = [f"{state.value}: {', '.join(names)}" for state, names in by_state.items() if names]
        return f"warmstart {__version__} on SGLang {sglang_version()}: {'; '.join(parts) or 'no features'}"

    def announce_when_logging_is_configured(self) -> None:
        """Say the summary once SGLang has set up the log of this process, and then whatever comes up."""
        # Somebody's own logging, set up before SGLang's plugins are loaded, is as good.
        if logging_is_set_up() and self.announcer.logger.isEnabledFor(logging.INFO):
            self._speak()
            return

        def configure_logger(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self._speak()

        hooks = Hooks("announcements", self.announcer.warn)
        try:
            common = sys.modules[COMMON]
            hooks.wrap(common, "configure_logger", configure_logger, "server_args", if_it_fails=self._speak)
        except (KeyError, StandsAsideError):
            self._speak()

    def _speak(self) -> None:
        if not self._spoken:
            self._spoken = True
            self.announcer.say(self.summary())
        self.announcer.open()

    def _when_imported(self, modules: tuple[str, ...], run: Callable[..., None]) -> None:
        """Call ``run(*modules)`` once all of them have been imported."""

        # Not `sys.modules`: a module is in there while it is still being imported.
        imported: dict[str, ModuleType] = {}

        def on_import(module: ModuleType) -> None:
            imported[module.__name__] = module
            if len(imported) == len(modules):
                with mended_together():
                    run(*(imported[name] for name in modules))

        for name in modules:
            wrapt.register_post_import_hook(on_import, name)

    def _run(self, installation: Installation, step: Step, *modules: ModuleType) -> None:
        if step not in installation.missing:
            return
        installation.missing.discard(step)
        try:
            step.install(installation.hooks, *modules)
            for note in installation.hooks.notes:
                self.announcer.warn(f"warmstart: {note}")
        except StandsAsideError as error:
            self._stand_aside(installation, f"{error.target}: {error.reason}")
        except Exception as error:
            if STRICT.value(os.environ):
                raise
            # Whatever a fork looks like: SGLang starts, without this feature.
            self._stand_aside(installation, f"{modules[-1].__name__}: {one_line(error)}")
        else:
            if installation.state is State.WAITING and not any(each.required for each in installation.missing):
                installation.state = State.ACTIVE
                if self._spoken:
                    self.announcer.say(f"warmstart: {installation.feature.name} is active")

    def _stand_aside(self, installation: Installation, reason: str) -> None:
        installation.hooks.undo()
        installation.missing.clear()
        installation.state, installation.detail = State.STANDS_ASIDE, reason
        self.announcer.warn(f"warmstart: {installation.feature.name} stands aside: {reason}")


def sglang_version() -> str:
    """The installed SGLang's version, or "unknown" for a bare source tree."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "unknown"


_loaded: Plugin | None = None


def loaded_plugin() -> Plugin | None:
    """The plugin of this process, if SGLang has loaded it and it is not switched off."""
    return _loaded


def register() -> None:
    """Install the features in this process. A second call changes nothing; ``SGLANG_WARMSTART=0`` leaves all as it is.

    Called by ``sglang.srt.plugins.load_plugins``, which logs an exception and goes on. A failure here is one warning.

    Raises:
        SystemExit: strict mode is on, and something is wrong; with one line that says what.
    """
    on, complaint = WARMSTART.read(os.environ)
    if _loaded is not None or not on:
        return
    announcer = Announcer()
    try:
        _register(announcer, complaint)
    except Exception as error:
        if STRICT.value(os.environ):
            raise SystemExit(f"sglang-warmstart: {one_line(error)}") from error
        announcer.warn(f"warmstart does nothing here: {one_line(error)}")


def _register(announcer: Announcer, complaint: str | None) -> None:
    global _loaded

    import sglang

    features, no_feature = chosen_features(os.environ)
    if no_feature and STRICT.value(os.environ):
        raise ValueError(no_feature)
    _loaded = Plugin(features, announcer)
    for each in filter(None, (complaint, no_feature)):
        announcer.warn(f"warmstart: {each}")
    try:
        declare_switches()
    except StandsAsideError as error:
        announcer.warn(f"warmstart does nothing: this SGLang has no place for its switches: {error}")
    else:
        with mended_together():
            _loaded.install(Path(sglang.__path__[0]))
    _loaded.announce_when_logging_is_configured()


def declare_switches() -> None:
    """Put the switches of the plugin as a whole on ``Envs``; those of single features come with the feature.

    Raises:
        StandsAsideError: ``Envs`` is not what it is expected to be.
    """
    environ = sys.modules[ENVIRON]
    for switch in (WARMSTART, STRICT):
        declare(Hooks("switches"), environ, switch)
