"""The JIT libraries of a server, one object each."""
