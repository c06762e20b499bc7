"""Sends OpenTelemetry's trace context to another process, if the application uses OpenTelemetry."""

from __future__ import annotations

__all__ = ["enter_trace", "trace_here"]

import sys


def trace_here() -> dict[str, str]:
    """Return the current trace context as the application's propagators write it; empty if there is none."""
    carrier: dict[str, str] = {}
    # Without this import, the application has no span.
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import propagate

        propagate.inject(carrier)

    return carrier


def enter_trace(carrier: dict[str, str]) -> None:
    """Make later spans of the current task children of the caller's current span."""
    if carrier:
        try:
            from opentelemetry import context, propagate
        except ImportError:
            return

        # Never detached: the task has a context of its own.
        context.attach(propagate.extract(carrier))
