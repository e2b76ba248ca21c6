"""How the features got into the SGLang at hand: by the plugin, or by the patches. What is tested is the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from kit.release import installed_release, is_patched, sglang_directory

# What tells that a patched SGLang has a feature: a file, and something in it.
_MARKS = {
    "fast-warmup": ("srt/layers/deep_gemm_wrapper/compile_utils.py", "def fast_m_list("),
    "hc-prenorm": ("srt/layers/deep_gemm_wrapper/entrypoint.py", "def tf32_hc_prenorm_gemm("),
    "mhc-prewarm": ("srt/layers/mhc.py", "def get_mhc_pre_token_count_representatives("),
    "pp-parallel-warmup": ("srt/layers/deep_gemm_wrapper/compile_utils.py", "def pp_parallel_deep_gemm_warmup("),
    "attn-tp-gather": ("srt/server_args.py", "disable_attn_tp_gather: bool"),
    "exact-warmup": ("srt/layers/deep_gemm_wrapper/compile_utils.py", "EXACT_WARMUP = "),
}


class Delivery(Protocol):
    """The features in this process."""

    def start_again(self) -> None:
        """As in a process that has just been started: what the features remember is forgotten."""

    def has(self, feature: str) -> bool:
        """Whether a feature is in place."""


class ByPlugin:
    """The plugin is loaded."""

    def start_again(self) -> None:
        """Empty what the features keep. They stay installed: to install all anew takes a second."""
        from sglang_warmstart.sglang.exact_warmup.hooks import INSTALLED

        if INSTALLED.exact is not None:
            INSTALLED.exact.forget()
        _forget_prenorm()

    def has(self, feature: str) -> bool:
        """Whether it is installed, or waits for what it hooks."""
        from sglang_warmstart.plugin import loaded_plugin
        from sglang_warmstart.sglang.feature import State

        plugin = loaded_plugin()
        states = {each.feature.name: each.state for each in plugin.installations} if plugin else {}
        return states.get(feature) in (State.ACTIVE, State.WAITING)


class ByPatches:
    """They are in SGLang's own source."""

    def start_again(self) -> None:
        """Empty what the patched modules keep for their process."""
        from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint

        compile_utils.EXACT_WARMUP.forget()
        entrypoint._HC_PRENORM_GEMMS.clear()

    def has(self, feature: str) -> bool:
        """Whether the source says so."""
        path, mark = _MARKS[feature]
        return mark in Path(sglang_directory(), path).read_text(encoding="utf-8")


def _forget_prenorm() -> None:
    """Empty what the plugin's wrapper of the prenorm keeps: the buckets that are warm, and DeepGEMM's own function."""
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint
    from sglang_warmstart.sglang.hc_prenorm import DIRECT

    wrapper = getattr(entrypoint, "tf32_hc_prenorm_gemm", None)
    if wrapper is not None:
        inspect.getclosurevars(wrapper).nonlocals.get("warmed", {}).clear()
        vars(wrapper).pop(DIRECT, None)


def delivery_here() -> Delivery:
    """In a process that SGLang's plugins have been loaded in, if there are any."""
    return ByPatches() if is_patched() else ByPlugin()


@contextmanager
def delivered() -> Iterator[Delivery]:
    """The features in this process; afterwards SGLang is as it was."""
    delivery = delivery_here()
    if is_patched():
        assert installed_release().version == "0.5.12"
        delivery.start_again()
        yield delivery
        delivery.start_again()
        return
    from kit.loaded_plugin import plugin_in_this_process

    with plugin_in_this_process():
        yield delivery
