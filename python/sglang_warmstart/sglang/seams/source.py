"""What SGLang's source defines, found by reading: importing SGLang takes seconds."""

from __future__ import annotations

import re
from pathlib import Path


def has_module(sglang_root: Path, module: str) -> bool:
    """Whether a release has a module. One that is not SGLang's own counts as there.

    Args:
        sglang_root: the directory of the package ``sglang``.
    """
    package, *names = module.split(".")
    path = sglang_root.joinpath(*names)
    return package != "sglang" or path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def defines(sglang_root: Path, name: str) -> bool:
    """Whether a module defines or imports a name.

    Args:
        sglang_root: the directory of the package ``sglang``.
        name: "module:name".
    """
    module, definition = name.split(":")
    path = sglang_root.joinpath(*module.split(".")[1:]).with_suffix(".py")
    pattern = rf"^\s*((def|class) {definition}\b|{definition}\s*[:=]|from \S+ import .*\b{definition}\b)"
    return path.is_file() and re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE) is not None
