"""What a limiter learns about the provider behind it: how much it bears, and whether it is there."""
