"""The state of the provider behind a limiter, as far as a limiter learns it: its capacity, and outages."""
