"""What one patch of the series is."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wiring.edits import Change


@dataclass(frozen=True)
class Commit:
    """One reviewable step.

    Args:
        subject: its first line.
        why, off, tested: the rest: why it is there; what changes for whom while its switch is off; how it was tested,
            with figures from committed results.
        features: the plugin's, by name, that a tree has once it has this patch.
        upstream: pull requests of SGLang that it follows, empty if there are none.
        modules: of the plugin, which it adds.
        files: others that it adds, by path.
        changes: to SGLang's files, by path.
    """

    subject: str
    why: str
    off: str
    tested: str
    features: Sequence[str] = ()
    upstream: str = ""
    modules: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Sequence[Change]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole message, as git takes it."""
        paragraphs = [*self.why.split("\n\n"), f"Switched off: {self.off}", f"Tested: {self.tested}"]
        wrapped = [textwrap.fill(" ".join(each.split()), 72, break_on_hyphens=False) for each in paragraphs]
        return "\n\n".join([self.subject, *wrapped, f"Upstream: {self.upstream or 'none'}"]) + "\n"
