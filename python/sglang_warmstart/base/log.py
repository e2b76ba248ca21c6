"""The name of the logger that the whole plugin uses."""

from __future__ import annotations

# A child of "sglang": a logging configuration that names SGLang's loggers covers this one too.
LOGGER_NAME = "sglang.warmstart"
