"""The recorder of results, and its snapshots."""

__all__ = ["MetricsRecorder", "MetricsSnapshot", "measurements_of"]

import math
from collections.abc import Mapping
from typing import Any

import attrs

from .. import _validators as must
from .._errors import QueueTimeout
from .._result import InvocationResult, Status
from .histogram import DEFAULT_SCALE, Distribution, Histogram
from .measurements import Measurements


@attrs.frozen
class MetricsSnapshot:
    """
    The recorded figures at one moment. Distributions are of durations in milliseconds.

    :param counts: how many results there were of each status
    :param retries: how many retries all invocations made
    :param overloads: how many attempts failed by an overload
    :param in_flight: how many invocations were started and have not ended
    :param latency: how long started invocations took, of any status, with retries and waits
    :param queue: how long invocations waited for their first slot; those that waited too long count too
    :param first_chunk: how long streams took to their first chunk
    :param attempt: how long each attempt took
    :param backoff: how long each retry waited
    :param chunk_gap: how long streams took from one chunk to the next, without the time that readers took
    """

    counts: Mapping[Status, int]
    retries: int = 0
    overloads: int = 0
    in_flight: int = 0
    latency: Distribution = attrs.field(factory=Distribution)
    queue: Distribution = attrs.field(factory=Distribution)
    first_chunk: Distribution = attrs.field(factory=Distribution)
    attempt: Distribution = attrs.field(factory=Distribution)
    backoff: Distribution = attrs.field(factory=Distribution)
    chunk_gap: Distribution = attrs.field(factory=Distribution)

    @property
    def failures(self) -> int:
        """How many invocations failed: errors and time-outs. Cancelled and skipped ones do not count."""
        return self.counts[Status.ERROR] + self.counts[Status.TIMEOUT]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for JSON."""
        fields: dict[str, Any] = {}
        for name in attrs.fields_dict(MetricsSnapshot):
            value: Any = getattr(self, name)
            fields[name] = value.to_dict() if isinstance(value, Distribution) else value

        fields["counts"] = {str(status): count for status, count in self.counts.items()}
        return fields


class MetricsRecorder:
    """
    Records the results of invocations. Memory is constant, and any thread may record.

    Loops with the same recorder add up, and so do the recorders of several processes: a recorder pickles, and
    :meth:`merge` is exact in any order.

    :param scale: how fine the distributions are: at 6 percentiles are within 0.55 %, and each step more
        halves that and doubles the memory
    :raises TypeError: if ``scale`` is no ``int``
    :raises ValueError: if ``scale`` is not from 6 to 12
    """

    def __init__(self, scale: int = DEFAULT_SCALE) -> None:
        must.check_whole("scale", scale, DEFAULT_SCALE)
        if scale > 12:
            raise ValueError(f"scale must be at most 12, got {scale!r}")

        self._measurements = Measurements(scale)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.snapshot().counts.items() if count)
        return f"<MetricsRecorder {counts or 'empty'}>"

    def __getstate__(self) -> dict[str, Any]:
        # Without attributes of a subclass, which may not pickle.
        return {"_measurements": self._measurements.copy()}

    def record(self, result: InvocationResult[Any]) -> None:
        """
        Record one result.

        :param result: the result of an invocation
        :raises ValueError: if a duration in it is negative, infinite or no number
        """
        latency, queue, first_chunk = result.latency_ms, result.queue_ms, result.first_chunk_ms
        if not (0 <= latency < math.inf and 0 <= queue < math.inf and 0 <= (first_chunk or 0) < math.inf):
            raise ValueError(f"durations must be finite and at least 0, got {result!r}")

        status = result.status
        # An invocation that never started has no latency, rather than one of 0 ms.
        expired = status is Status.TIMEOUT and isinstance(result.exception, QueueTimeout)
        started = not (expired or status is Status.SKIPPED) and bool(
            status is not Status.ERROR or result.failures or latency
        )
        if not (started or expired):
            queue = 0.0

        self._measurements.report_result(
            status, result.retries, latency if started else None, queue, first_chunk
        )

    def snapshot(self) -> MetricsSnapshot:
        """Return the figures so far."""
        measurements = self._measurements
        with measurements.counted():
            queue = Histogram(measurements.scale)
            # Invocations that were not queued are missing there, and count with 0 ms.
            unqueued = measurements.latency.count + measurements.retried.count - measurements.queue.count
            if unqueued > 0:
                queue.zeros = queue.count = unqueued
                queue.minimum = queue.maximum = 0.0

            return MetricsSnapshot(
                {status: measurements.counts[status] for status in Status},
                measurements.retries,
                measurements.overloads,
                measurements.in_flight,
                measurements.latency.plus(measurements.retried).distribution(),
                queue.plus(measurements.queue).plus(measurements.expired).distribution(),
                measurements.first_chunk.distribution(),
                measurements.latency.plus(measurements.attempt).distribution(),
                measurements.backoff.distribution(),
                measurements.chunk_gap.distribution(),
            )

    def merge(self, other: "MetricsRecorder") -> None:
        """
        Add the figures of another recorder, except those in flight. The result does not depend on the order
        of merges.

        :param other: the other recorder, which is not changed
        :raises TypeError: if ``other`` is no recorder
        :raises ValueError: if it is this recorder
        """
        if not isinstance(other, MetricsRecorder):
            raise TypeError(f"other must be of type MetricsRecorder, got {other!r}")

        if other is self:
            raise ValueError("a recorder cannot be merged with itself")

        # One lock after the other: two recorders may be merged with each other at once.
        copy = other._measurements.copy()
        with self._measurements.counted():
            self._measurements.add(copy)

    def reset(self) -> None:
        """Reset all figures except those in flight."""
        with self._measurements.counted():
            self._measurements.clear()


def measurements_of(recorder: MetricsRecorder) -> Measurements:
    """Return the measurements of a recorder, for the reports of a loop besides results."""
    return recorder._measurements  # pyright: ignore[reportPrivateUsage]  # not for users
