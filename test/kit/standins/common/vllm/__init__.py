"""Stands in for vLLM, of which SGLang asks for `_custom_ops` alone."""
