"""A feature is built in where SGLang's own source defines it and calls it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kit.release import installed_release, is_patched, sglang_directory
from sglang_warmstart.sglang.feature import find_built_in
from sglang_warmstart.sglang.features import FEATURES
from sglang_warmstart.sglang.hc_prenorm import HC_PRENORM

PREWARM = replace(HC_PRENORM, built_in_as=("sglang.srt.here:prewarm called in sglang.srt.there",))

DEFINED = "    def prewarm(self) -> None:\n        ...\n"
NO_CALLERS = [
    "",
    "from sglang.srt.here import prewarm\n",
    "from sglang.srt.here import (\n    prewarm,\n)\n",
    "def prewarm() -> None: ...\n",
    "async def prewarm() -> None: ...\n",
    "    # self.prewarm() was here\n",
    "prewarmed()\nrun_prewarm()\n",
]
CALLERS = ["    prewarm(1)\n", "    return self.model.prewarm(1)\n", "if server_args.prewarm:\n", "x = prewarm()\n"]


def tree(directory: Path, here: str, there: str) -> Path:
    """A source of SGLang with these two modules."""
    (directory / "srt").mkdir()
    for name, text in (("here", here), ("there", there)):
        (directory / "srt" / f"{name}.py").write_text(text)
    return directory


@pytest.mark.parametrize("there", CALLERS)
def test_what_is_defined_and_called_is_built_in(tmp_path: Path, there: str) -> None:
    assert find_built_in(PREWARM, tree(tmp_path, DEFINED, there)) == "sglang.srt.here.prewarm"


@pytest.mark.parametrize("there", NO_CALLERS)
def test_what_nobody_calls_is_not(tmp_path: Path, there: str) -> None:
    assert find_built_in(PREWARM, tree(tmp_path, DEFINED, there)) is None


@pytest.mark.parametrize("there", CALLERS)
def test_what_is_called_and_not_defined_is_not(tmp_path: Path, there: str) -> None:
    assert find_built_in(PREWARM, tree(tmp_path, "", there)) is None


def test_a_definition_is_enough_where_no_caller_is_named(tmp_path: Path) -> None:
    feature = replace(PREWARM, built_in_as=("sglang.srt.here:prewarm",))
    assert find_built_in(feature, tree(tmp_path, DEFINED, "")) == "sglang.srt.here.prewarm"


@pytest.mark.skipif(is_patched(), reason="has what the patches add")
def test_each_release_has_built_in_what_it_calls() -> None:
    release, found = installed_release(), {each.name for each in FEATURES if find_built_in(each, sglang_directory())}
    assert ("attn-tp-gather" in found) is ("pp-parallel-warmup" in found) is release.since("0.5.13")
    # 0.5.13 has the methods of mHC's prewarm, and nothing that calls them.
    assert ("mhc-prewarm" in found) is release.since("0.5.14")
    # The wrapper of later releases warms nothing.
    assert not {"fast-warmup", "exact-warmup", "bundle-restore", "jit-monitor", "start-up-events"} & found
