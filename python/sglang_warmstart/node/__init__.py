"""The service of a node: one queue of compiles, and the protocol by which ranks use it."""
