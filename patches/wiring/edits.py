"""Changes to a file of SGLang. Each must fit exactly once, as in ``sglang_warmstart.base.source_edit``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.source_edit import Edit, apply_edits


@dataclass(frozen=True)
class Cut:
    """What stands from ``first`` to the next ``last``, both included, is replaced.

    So a long piece of SGLang need not be written here to be replaced.
    """

    first: str
    last: str
    replacement: str

    def as_edit(self, source: str) -> Edit:
        """The edit that it is in a source."""
        start = source.find(self.first)
        end = source.find(self.last, start)
        if start < 0 or end < 0:
            return Edit(self.first + self.last, self.replacement)  # which does not fit, and says so
        return Edit(source[start : end + len(self.last)], self.replacement)


@dataclass(frozen=True)
class Within:
    """Edits of one function or class, where their anchors need be unique in it alone.

    Args:
        name: its qualified name in the file.
    """

    name: str
    edits: Sequence[Edit | Cut]


def after(anchor: str, text: str) -> Edit:
    """``text`` is put behind ``anchor``."""
    return Edit(anchor, anchor + text)


def before(anchor: str, text: str) -> Edit:
    """``text`` is put in front of ``anchor``."""
    return Edit(anchor, text + anchor)


@dataclass(frozen=True)
class Append:
    """``text`` is put at the end of the file."""

    text: str


Change = Edit | Cut | Within | Append


def changed(source: str, changes: Sequence[Change], path: str) -> str:
    """A file of SGLang with the changes made, in their order.

    Raises:
        StandsAsideError: one does not fit.
    """
    for change in changes:
        if isinstance(change, Append):
            source += change.text
        elif isinstance(change, Within):
            start, end = _span(source, change.name, path)
            inner = source[start:end]
            edits = [each.as_edit(inner) if isinstance(each, Cut) else each for each in change.edits]
            source = source[:start] + apply_edits(inner, edits, f"{path}: {change.name}") + source[end:]
        else:
            edit = change.as_edit(source) if isinstance(change, Cut) else change
            source = apply_edits(source, [edit], path)
    return source


def _span(source: str, name: str, path: str) -> tuple[int, int]:
    """Where a definition begins and ends in a source."""
    body: Sequence[ast.stmt] = ast.parse(source).body
    found: ast.stmt | None = None
    for part in name.split("."):
        named = [each for each in body if getattr(each, "name", None) == part]
        if len(named) != 1:
            raise StandsAsideError(f"{path}: {name}", f"expected one definition of `{part}`, found {len(named)}")
        found = named[0]
        body = getattr(found, "body", [])
    assert found is not None
    lines = source.splitlines(keepends=True)
    start, end = sum(map(len, lines[: found.lineno - 1])), sum(map(len, lines[: found.end_lineno]))
    return start, end
