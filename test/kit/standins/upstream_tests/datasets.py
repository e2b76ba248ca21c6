"""Hugging Face's package. SGLang's own test helpers import this name, and no test here calls it."""

from typing import Any


def load_dataset(*arguments: Any, **options: Any) -> Any:
    """Refuses: there is no network."""
    raise RuntimeError("the tests load no data set")
