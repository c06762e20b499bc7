"""Streams, and batches whose results are read while they run."""
