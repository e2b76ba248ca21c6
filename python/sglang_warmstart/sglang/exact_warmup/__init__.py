"""F6: each kernel is compiled once, all of them in parallel; a restart compiles none."""
