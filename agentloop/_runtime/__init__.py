"""One invocation: its attempts, its outcome, and the reports of both."""
