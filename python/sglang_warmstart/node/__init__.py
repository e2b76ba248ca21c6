"""The service of a node: one queue of compiles, and how ranks talk to it."""
