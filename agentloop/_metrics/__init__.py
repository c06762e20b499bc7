"""Measurements: counts and durations."""
