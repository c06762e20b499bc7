"""Batches: the source of their invocations, the workers that run them, and how a batch ends."""
