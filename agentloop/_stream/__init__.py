"""What is read while it runs: streams, and batches that are read."""
