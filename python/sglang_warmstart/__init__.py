"""sglang-warmstart: less waiting for JIT kernel compilation when SGLang starts and while it serves."""

__version__ = "0.1.0"
