"""Paths in a recipe are written by what they belong to, so that it holds where things are installed elsewhere."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from sglang_warmstart.libraries import machine
from sglang_warmstart.libraries.machine import Environment

Anchors = Mapping[str, str]

# Packages whose sources and headers are compiled, wherever each is installed.
_PACKAGES = ("flashinfer", "sglang", "tvm_ffi", "torch", "deep_gemm", "nvidia")

_TOKEN = re.compile(r"@\{([\w.]+)\}")


class NoAnchorError(Exception):
    """A text cannot be written by anchors, or be read with those of this machine; says why."""


def anchors_of(root: Path, environment: Environment) -> dict[str, str]:
    """The anchors of this machine.

    Args:
        root: of the library's cache.
    """
    home = machine.cuda_home(environment)
    found = {"root": root, "cuda": home, "include": Path(sysconfig.get_path("include"))}
    # A toolkit is often named by a link, and a path in a command has been resolved.
    if (resolved := machine.resolved(home)) is not None:
        found["cuda.resolved"] = resolved
    found |= {f"package.{name}": place for name in _PACKAGES if (place := machine.package(name)) is not None}
    found["purelib"] = Path(sysconfig.get_path("purelib"))
    return {name: str(path) for name, path in found.items() if len(path.parts) > 1}


def anchored(text: str, anchors: Anchors) -> str:
    """A text in which paths begin with anchors, the longest that fits.

    Raises:
        NoAnchorError: it has what looks like one.
    """
    if _TOKEN.search(text):
        raise NoAnchorError("a text has what stands for a place")
    by_path: dict[str, str] = {}
    for name, path in anchors.items():
        by_path.setdefault(path, name)
    longest_first = sorted(by_path, key=len, reverse=True)
    # Whole names of directories: /usr/lib is none in /usr/library.
    places = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w.-])")
    # A path may stand right behind an option: -I/usr/include.
    options = re.compile(rf"(?<=-[ILBF])(?:{'|'.join(map(re.escape, longest_first))})(?![\w.-])")
    for pattern in (options, places):
        text = pattern.sub(lambda found: f"@{{{by_path[found[0]]}}}", text)
    return text


def placed(text: str, anchors: Anchors) -> str:
    """The text with the paths of this machine.

    Raises:
        NoAnchorError: one of them is not there.
    """

    def place(found: re.Match[str]) -> str:
        try:
            return anchors[found[1]]
        except KeyError:
            raise NoAnchorError(f"there is no {found[1]} here") from None

    return _TOKEN.sub(place, text)
