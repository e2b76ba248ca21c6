"""Bundles: kernels compiled once, on any machine, and restored where a server starts."""
