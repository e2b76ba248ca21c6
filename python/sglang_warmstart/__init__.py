"""sglang-warmstart: takes JIT kernel compilation out of SGLang's start-up and serving."""

__version__ = "0.1.0"
