"""An edit of a file of SGLang fits exactly once, or is refused by name."""

from __future__ import annotations

import pytest
from sglang_warmstart.base.errors import StandsAsideError
from sglang_warmstart.base.source_edit import Edit
from wiring.edits import Append, Change, Cut, Within, after, before, changed

SOURCE = """\
import os


def first(a):
    x = 1
    return x


class Second:
    def first(self):
        x = 1
        return x

    def third(self):
        x = 1
        # a
        # long
        # piece
        return x
"""


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        (after("import os\n", "import sys\n"), "import os\n", "import os\nimport sys\n"),
        (before("class Second", "y = 2\n"), "class Second", "y = 2\nclass Second"),
        (Edit("import os", "import io"), "import os", "import io"),
        (Within("first", [Edit("x = 1", "x = 2")]), "(a):\n    x = 1", "(a):\n    x = 2"),
        (
            Within("Second.first", [Edit("x = 1", "x = 2")]),
            "first(self):\n        x = 1",
            "first(self):\n        x = 2",
        ),
        (
            Within("Second.third", [Cut("        # a\n", "piece\n", "        pass\n")]),
            "        # a\n        # long\n        # piece\n",
            "        pass\n",
        ),
        (Cut("        # a\n", "piece\n", ""), "        # a\n        # long\n        # piece\n", ""),
    ],
)
def test_a_change_is_made_where_it_is_meant_and_nowhere_else(change: Change, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert changed(SOURCE, [change], "a.py") == SOURCE.replace(old, new)


def test_changes_are_made_one_after_another_and_the_end_is_the_end() -> None:
    changes = [after("import os\n", "import sys\n"), after("import sys\n", "import io\n"), Append("# end\n")]
    start, *lines, end = changed(SOURCE, changes, "a.py").splitlines()
    assert [start, *lines[:2], end] == ["import os", "import sys", "import io", "# end"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (after("import re\n", ""), "found 0"),
        (Edit("x = 1", "x = 2"), "found 3"),
        (Within("Second", [Edit("x = 1", "x = 2")]), "found 2"),
        (Within("fourth", []), "expected one definition of `fourth`, found 0"),
        (Within("Second.first.x", []), "expected one definition of `x`, found 0"),
        (Cut("# a", "# no such end", ""), "found 0"),
        (Cut("# no such beginning", "# a", ""), "found 0"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_with_the_file_and_the_reason(change: Change, reason: str) -> None:
    with pytest.raises(StandsAsideError, match=reason) as refusal:
        changed(SOURCE, [change], "a.py")
    assert refusal.value.target.startswith("a.py")
