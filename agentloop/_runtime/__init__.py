"""How invocations run: jobs, attempts, batches, streams."""
