"""Many invocations at once: where they come from, who runs them, and how a batch ends."""
