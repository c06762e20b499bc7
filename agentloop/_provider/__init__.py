"""What is found out about the provider behind a limiter: what it bears, and whether it is there."""
