"""F6: each kernel is compiled once, all at the same time; a restart compiles none."""
