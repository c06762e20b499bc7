"""What happened so far, in constant memory."""

__all__ = ["Distribution", "MetricsRecorder", "MetricsSnapshot"]

import math
import threading
from collections.abc import Mapping
from typing import Any

import attrs

from ._result import InvocationResult, Status

# Bucket boundaries at powers of 2 ** (2 ** -SCALE), the law of the base-2 exponential histogram in
# OpenTelemetry's metrics data model: at scale 6 a bucket's middle is within 0.55 % of all that is in it.
_SCALE = 6
_PER_OCTAVE = 2.0**_SCALE
# From a nanosecond to a century of milliseconds; what lies outside counts in the outermost bucket.
_LOWEST, _HIGHEST = 1e-6, 3.2e12
# The bucket of what took no time: on a virtual clock most things do.
_NOTHING = math.floor(math.log2(_LOWEST) * _PER_OCTAVE) - 1


@attrs.frozen
class Distribution:
    """
    A distribution of durations, in milliseconds. Count, mean, minimum and maximum are exact; percentiles
    are within 1 % of the nearest-rank value. All are 0 where nothing was recorded.
    """

    count: int = 0
    mean_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    _buckets: Mapping[int, int] = attrs.field(factory=dict[int, int], repr=False)

    def percentile(self, q: float) -> float:
        """
        Return the nearest-rank percentile, in milliseconds.

        :param q: from 0 to 100
        :raises ValueError: if ``q`` is out of that range
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q must be between 0 and 100, got {q!r}")

        return _percentile(self._buckets, self.count, self.min_ms, self.max_ms, q)


class _Histogram:
    __slots__ = ("buckets", "count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        if value < self.minimum:
            self.minimum = value

        if value > self.maximum:
            self.maximum = value

        bucket = _NOTHING
        if value > _LOWEST:
            bucket = math.ceil(math.log2(min(value, _HIGHEST)) * _PER_OCTAVE) - 1

        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def distribution(self) -> Distribution:
        if not self.count:
            return Distribution()

        buckets = dict(sorted(self.buckets.items()))
        p50, p95, p99 = (
            _percentile(buckets, self.count, self.minimum, self.maximum, q) for q in (50.0, 95.0, 99.0)
        )
        mean = self.total / self.count
        return Distribution(self.count, mean, self.minimum, self.maximum, p50, p95, p99, buckets)


def _percentile(buckets: Mapping[int, int], count: int, minimum: float, maximum: float, q: float) -> float:
    # 375 * 8.8 / 100 is a little more than 33 in floating point.
    rank = max(1, math.ceil(round(count * q / 100, 6)))
    seen = 0
    for bucket, size in buckets.items():
        seen += size
        if seen >= rank:
            if bucket == _NOTHING:
                return minimum

            # The middle of the bucket, in the sense of relative error.
            lower, upper = math.exp2(bucket / _PER_OCTAVE), math.exp2((bucket + 1) / _PER_OCTAVE)
            middle = 2 * lower * upper / (lower + upper)
            return min(max(middle, minimum), maximum)

    return 0.0


@attrs.frozen
class MetricsSnapshot:
    """
    What was recorded until now.

    :param counts: how many results there were of each status
    :param retries: how many retries all of them made
    :param latency: how long those took that were started, whatever came of it
    :param queue: how long they waited for their first slot
    """

    counts: Mapping[Status, int]
    retries: int
    latency: Distribution
    queue: Distribution


class MetricsRecorder:
    """
    Records results. Memory is constant, and any thread may record.

    Loops that are given the same recorder add up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.snapshot().counts.items() if count)
        return f"<MetricsRecorder {counts or 'empty'}>"

    def record(self, result: InvocationResult[Any]) -> None:
        """Record one result."""
        with self._lock:
            self._counts[result.status] += 1
            self._retries += result.retries
            if result.status is not Status.SKIPPED:
                self._latency.add(result.latency_ms)
                self._queue.add(result.queue_ms)

    def snapshot(self) -> MetricsSnapshot:
        """Return what was recorded until now."""
        with self._lock:
            return MetricsSnapshot(
                dict(self._counts),
                self._retries,
                self._latency.distribution(),
                self._queue.distribution(),
            )

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counts = dict.fromkeys(Status, 0)
            self._retries = 0
            self._latency = _Histogram()
            self._queue = _Histogram()
