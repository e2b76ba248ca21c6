"""What a server compiles, when, and what its start-up went to: the monitor, the metrics, the picture."""
