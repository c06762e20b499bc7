"""One invocation: its attempts, what becomes of it, and who is told."""
