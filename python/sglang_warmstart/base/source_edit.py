"""Change a few lines inside a function of SGLang, without a copy of that function in this repository.

A wrapper sees the arguments and the result of a function, but not the lines between. To change those, we read the
source of the installed function, apply each edit where its anchor occurs exactly once, and compile the result in the
function's own globals. If an anchor is missing or ambiguous, this SGLang is not the one that the edit was written for.
"""

from __future__ import annotations
import __future__

import inspect
import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from sglang_warmstart.base.errors import StandsAsideError


@dataclass(frozen=True)
class Edit:
    """One replacement in a function's source.

    ``anchor`` must stand there exactly once. Both texts are written, and indented, as in SGLang's own file.
    """

    anchor: str
    replacement: str


def apply_edits(source: str, edits: Sequence[Edit], target: str) -> str:
    """Apply ``edits`` to ``source``. Each is looked for in the text as it was, not in what another one put there.

    Raises:
        StandsAsideError: an anchor does not stand in the source exactly once, or two of them overlap.
    """
    places = []
    for number, edit in enumerate(edits, 1):
        count = source.count(edit.anchor)
        if count != 1:
            first_line = edit.anchor.strip().splitlines()[0]
            raise StandsAsideError(target, f"edit {number} expects `{first_line}` once in its source, found {count}")
        places.append((source.index(edit.anchor), edit))
    places.sort(key=lambda place: place[0])

    pieces, end = [], 0
    for start, edit in places:
        if start < end:
            raise StandsAsideError(target, f"two edits overlap at `{edit.anchor.strip().splitlines()[0]}`")
        pieces += [source[end:start], edit.replacement]
        end = start + len(edit.anchor)
    return "".join([*pieces, source[end:]])


def edited_function(original: FunctionType, edits: Sequence[Edit], target: str) -> FunctionType:
    """A new function: ``original`` with ``edits`` applied to its source, in the same globals.

    Raises:
        StandsAsideError: the source cannot be had, the function has a closure or a decorator (a copy would lose them),
            or an edit does not match.
    """
    if hasattr(original, "__wrapped__"):
        raise StandsAsideError(target, "already wrapped by something else, its source cannot be edited")
    if original.__closure__:
        raise StandsAsideError(target, "has a closure, its source cannot be compiled on its own")
    try:
        source = inspect.getsource(original)
    except (OSError, TypeError) as error:
        raise StandsAsideError(target, f"its source cannot be read ({error})") from error
    if not source.lstrip().startswith("def "):
        raise StandsAsideError(target, "its source does not start with a plain `def`")

    edited = apply_edits(source, edits, target)
    # A method is compiled inside a class of its class's name, where its indentation and its private names are right.
    owner = original.__qualname__.rpartition(".")[0].rpartition(".")[2]
    shell = (owner if owner.isidentifier() else "_") if source[0].isspace() else None
    edited = f"class {shell}:\n{edited}" if shell else edited
    filename = f"<sglang-warmstart edit of {target}>"
    namespace: dict[str, Any] = {}
    # A `from __future__ import annotations` counts if SGLang's module has it, not because this one does.
    flags = original.__code__.co_flags & __future__.annotations.compiler_flag
    exec(compile(edited, filename, "exec", flags=flags, dont_inherit=True), original.__globals__, namespace)
    function: FunctionType = (vars(namespace[shell]) if shell else namespace)[original.__name__]
    function.__module__ = original.__module__
    function.__qualname__ = original.__qualname__
    # Tracebacks show the edited lines.
    linecache.cache[filename] = (len(edited), None, edited.splitlines(keepends=True), filename)
    return function
