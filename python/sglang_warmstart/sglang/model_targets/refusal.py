"""Why there is no answer, for a whole server or for a part of it."""

from __future__ import annotations

import traceback
from pathlib import Path

from sglang_warmstart.base.errors import one_line


class RefusalError(Exception):
    """One line that says what the server has that cannot be answered for."""


def where(error: Exception) -> str:
    """An error in one line, with the place in the source that raised it: an assertion often has no text."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{one_line(error)} ({Path(last.filename).name}:{last.lineno})"
