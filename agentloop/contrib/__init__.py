"""Adapters to other libraries, each with an extra of its own. They use what is public, and nothing else."""
