"""Adapters to other libraries, each with an extra of its own. They use public names only."""
