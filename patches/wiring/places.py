"""Where the plugin's own modules are in SGLang's tree, and how they name each other there."""

from __future__ import annotations

import re
from pathlib import Path

import sglang_warmstart

PLUGIN = "sglang_warmstart"
IN_SGLANG = "sglang.srt.warmstart"

_SOURCE = Path(sglang_warmstart.__file__).parent
_NAME = re.compile(rf"\b{PLUGIN}\b")


def placed_path(module: str) -> str:
    """The path of a module in SGLang's tree.

    Args:
        module: its path below the plugin's package.
    """
    return f"{IN_SGLANG.replace('.', '/')}/{module}"


def placed_source(module: str) -> str:
    """A module of the plugin as it reads in SGLang's tree: the package has another name, and nothing else differs."""
    return _NAME.sub(IN_SGLANG, (_SOURCE / module).read_text(encoding="utf-8"))
