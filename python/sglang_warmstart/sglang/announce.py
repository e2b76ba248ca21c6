"""Log what the plugin has to say, once per process, even before SGLang has set up its logging.

SGLang loads plugins first and configures logging later (``configure_logger``, with ``force=True``). A line logged
before that would be lost. So lines are kept until then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from sglang_warmstart.base.log import LOGGER_NAME


def logging_is_set_up() -> bool:
    """Whether somebody has given the root logger a handler."""
    return bool(logging.getLogger().handlers)


@dataclass
class Announcer:
    """Lines for the log of this process; each is written once."""

    logger: logging.Logger = field(default_factory=lambda: logging.getLogger(LOGGER_NAME))
    _kept: list[tuple[int, str]] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)
    _open: bool = False

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Log a line, now or as soon as logging is configured. A line said before is not repeated."""
        if line in self._said:
            return
        self._said.add(line)
        # Somebody else may have set up logging before plugins are loaded; it need not be set up again.
        if self._open or (logging_is_set_up() and self.logger.isEnabledFor(level)):
            self.logger.log(level, "%s", line)
        else:
            self._kept.append((level, line))

    def warn(self, line: str) -> None:
        """``say`` at the level of warnings."""
        self.say(line, logging.WARNING)

    def open(self) -> None:
        """Logging is configured: write what was kept, and log at once from now on."""
        self._open = True
        kept, self._kept = self._kept, []
        for level, line in kept:
            self.logger.log(level, "%s", line)
