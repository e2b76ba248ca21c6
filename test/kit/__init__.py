"""Runs a real SGLang on a machine without a GPU: an HTTP server, or a ModelRunner per pipeline stage.

What a GPU is needed for is stood in (`standins/`), and nothing else: processes, argument parser, plugin loading, model,
process groups and forwards are SGLang's own.
"""
