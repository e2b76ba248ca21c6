"""The shapes that a warm-up runs. Arithmetic only: nothing here knows torch or SGLang."""
