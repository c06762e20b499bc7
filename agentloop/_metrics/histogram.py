"""Distributions of durations, in constant memory."""

__all__ = ["DEFAULT_SCALE", "Distribution", "Histogram"]

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import mul
from typing import Any

import attrs

DEFAULT_SCALE = 6
# From a nanosecond to a century, in milliseconds; values outside count in the outermost bucket. At the
# default scale that is at most 3,911 buckets.
_LOWEST, _HIGHEST = 1e-6, 3.2e12
# Sums are integers in units of 2 ** -80 ms: exact for every duration above a few femtoseconds, and so the
# same in any order of addition.
_UNIT = 2.0**80


@attrs.frozen
class Distribution:
    """
    A distribution of durations, in milliseconds. Count, sum, mean, minimum and maximum are exact; percentiles
    are within 1 % of the nearest-rank value. All are 0 before the first duration.

    :param count: how many durations there were
    :param mean_ms: their mean
    :param min_ms: the shortest
    :param max_ms: the longest
    :param p50_ms: the median
    :param p95_ms: the value that 95 % of them did not exceed
    :param p99_ms: the value that 99 % of them did not exceed
    :param sum_ms: their sum
    :param zeros: how many durations were below a nanosecond, as most are on a virtual clock
    :param scale: the width of the buckets: their bounds are the powers of ``2 ** (2 ** -scale)``
    :param buckets: how many durations there were in each bucket; the bucket with index ``i`` reaches from ``2
        ** (i / 2 ** scale)``, exclusive, to ``2 ** ((i + 1) / 2 ** scale)``, inclusive, as in the base-2
        exponential histogram of OpenTelemetry's metrics data model
    """

    count: int = 0
    mean_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    sum_ms: float = 0.0
    zeros: int = attrs.field(default=0, repr=False)
    scale: int = attrs.field(default=DEFAULT_SCALE, repr=False)
    buckets: Mapping[int, int] = attrs.field(factory=dict[int, int], repr=False)

    def percentile(self, q: float) -> float:
        """
        Return the nearest-rank percentile, in milliseconds.

        :param q: from 0 to 100
        :raises ValueError: if ``q`` is out of that range
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q must be between 0 and 100, got {q!r}")

        if not self.count:
            return 0.0

        return _percentile(self.buckets, self.scale, self.zeros, self.count, self.min_ms, self.max_ms, q)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for JSON."""
        fields = attrs.asdict(self, filter=lambda attribute, _: attribute.name != "buckets")
        return {**fields, "buckets": {str(index): count for index, count in self.buckets.items()}}


class Histogram:
    """Durations, counted in exponential buckets. Not thread-safe."""

    __slots__ = ("_per_octave", "buckets", "count", "maximum", "minimum", "scale", "total", "zeros")

    def __init__(self, scale: int = DEFAULT_SCALE) -> None:
        self.scale: int = scale
        self._per_octave = 2.0**scale
        self.buckets: defaultdict[int, int] = defaultdict(int)
        self.zeros: int = 0
        self.count: int = 0
        self.total: int = 0
        self.minimum: float = math.inf
        self.maximum: float = -math.inf

    def add(self, value: float) -> None:
        """Count a duration, in milliseconds; it must be finite and not negative."""
        self.count += 1
        if value < self.minimum:
            self.minimum = value

        if value > self.maximum:
            self.maximum = value

        if value > _LOWEST:
            if value < _HIGHEST:
                self.total += int(value * _UNIT)
            else:
                self.total += int(value) << 80
                value = _HIGHEST

            self.buckets[math.ceil(math.log2(value) * self._per_octave) - 1] += 1
        else:
            self.zeros += 1
            if value:
                self.total += int(value * _UNIT)

    def add_all(self, values: Sequence[float]) -> None:
        """Count many durations, at a fraction of the cost of :meth:`add` for each."""
        if not values:
            return

        minimum, maximum = min(values), max(values)
        if minimum <= _LOWEST or maximum >= _HIGHEST:
            for value in values:
                self.add(value)

            return

        self.count += len(values)
        self.minimum = min(self.minimum, minimum)
        self.maximum = max(self.maximum, maximum)
        # As in add(), without Python code for each duration. fsum() rounds its result; the rest is summed up
        # in the next round.
        rest = values
        while part := math.fsum(rest):
            self.total += int(part * _UNIT)
            rest = [*rest, -part]

        powers = map(mul, map(math.log2, values), repeat(self._per_octave))
        for above, count in Counter(map(math.ceil, powers)).items():
            self.buckets[above - 1] += count

    def merge(self, other: "Histogram") -> None:
        """Add the counts of another histogram, at the coarser scale of the two."""
        if other.scale < self.scale:
            shift, self.scale = self.scale - other.scale, other.scale
            self._per_octave = 2.0**self.scale
            buckets, self.buckets = self.buckets, defaultdict(int)
            for index, count in buckets.items():
                self.buckets[index >> shift] += count

        shift = other.scale - self.scale
        for index, count in other.buckets.items():
            self.buckets[index >> shift] += count

        self.zeros += other.zeros
        self.count += other.count
        self.total += other.total
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def plus(self, other: "Histogram") -> "Histogram":
        """Return the sum of both."""
        both = Histogram(self.scale)
        both.merge(self)
        both.merge(other)
        return both

    def distribution(self) -> Distribution:
        """Return the distribution so far."""
        if not self.count:
            return Distribution(scale=self.scale)

        buckets: Mapping[int, int] = dict(sorted(self.buckets.items()))
        known = (buckets, self.scale, self.zeros, self.count, self.minimum, self.maximum)
        p50, p95, p99 = (_percentile(*known, q) for q in (50.0, 95.0, 99.0))
        return Distribution(
            self.count,
            self.total / (2**80 * self.count),
            self.minimum,
            self.maximum,
            p50,
            p95,
            p99,
            self.total / 2**80,
            self.zeros,
            self.scale,
            buckets,
        )


def _percentile(
    buckets: Mapping[int, int],
    scale: int,
    zeros: int,
    count: int,
    minimum: float,
    maximum: float,
    q: float,
) -> float:
    # Rounded first: 375 * 8.8 / 100 is slightly more than 33 in floating point.
    rank = max(1, math.ceil(round(count * q / 100, 6)))
    if zeros >= rank:
        return minimum

    seen = itertools.accumulate(buckets.values(), initial=zeros)
    next(seen)
    bucket = next(bucket for bucket, total in zip(buckets, seen, strict=True) if total >= rank)
    # The middle of the bucket, in the sense of relative error.
    lower, upper = math.exp2(bucket / 2**scale), math.exp2((bucket + 1) / 2**scale)
    middle = 2 * lower * upper / (lower + upper)
    return min(max(middle, minimum), maximum)
