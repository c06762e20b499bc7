"""The counters and histograms behind a recorder."""

__all__ = ["REPORTS_AT_MOST", "Measurements"]

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager
from itertools import repeat
from operator import call
from typing import Any, Self, TypeAlias, TypeVar

from .._result import Status
from .histogram import Histogram

T = TypeVar("T")

# The status, retries, latency, queue and first chunk of a result.
_Record: TypeAlias = tuple[Status, int, float | None, float, float | None]
REPORTS_AT_MOST = 1000
_OVERLOAD = "overload"


def _taken(reported: deque[T]) -> list[T]:
    """Remove and return the current items; another thread may add some meanwhile."""
    return list(map(call, repeat(reported.popleft, len(reported))))


class Measurements:
    """
    Counts the events of invocations. Any thread may call the ``report_`` and ``add_`` methods.

    :param scale: the scale of the histograms
    """

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.in_flight = 0
        self._prepare()
        self.clear()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        # Reports that are not counted yet. Appending is thread-safe, and counting many at once is faster.
        self._results_reported: deque[_Record] = deque()
        self._in_flight_reported: deque[int] = deque()
        self._latencies_reported: deque[float] = deque()
        self._queues_reported: deque[float] = deque()
        # The name of a histogram with a duration, or of the count of overloads.
        self._others_reported: deque[tuple[str, float]] = deque()
        self.report_in_flight: Callable[[int], None] = self._in_flight_reported.append
        """Takes 1 for an invocation that begins, and -1 for one that ends."""
        self.report_latency: Callable[[float], None] = self._latencies_reported.append
        """Takes the latency of an invocation that has succeeded at its first attempt, as most do."""
        self.report_queue: Callable[[float], None] = self._queues_reported.append
        """Takes the queue time of such an invocation, if it was queued."""

    @property
    def uncounted(self) -> Sized:
        """A report for each invocation that has begun, or failed, and is not counted yet."""
        return self._in_flight_reported

    def clear(self) -> None:
        """Reset all counts except those in flight. Within :meth:`counted` only."""
        self.counts: Counter[Status] = Counter()
        self.retries = 0
        self.overloads = 0
        # The latencies of invocations with a single attempt, which are their attempts too.
        self.latency = Histogram(self.scale)
        # The latencies of invocations with several attempts, and these attempts.
        self.retried = Histogram(self.scale)
        self.attempt = Histogram(self.scale)
        self.queue = Histogram(self.scale)
        # The queue times of invocations that waited too long.
        self.expired = Histogram(self.scale)
        self.first_chunk = Histogram(self.scale)
        self.backoff = Histogram(self.scale)
        self.chunk_gap = Histogram(self.scale)

    def __getstate__(self) -> dict[str, Any]:
        # The deques of reports are empty: only a copy is pickled.
        return {
            name: value
            for name, value in vars(self).items()
            if name != "_lock" and "report_" not in name and "reported" not in name
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def copy(self) -> Self:
        """Return a copy with nothing in flight, since the invocations run in this process alone."""
        copy = type(self)(self.scale)
        with self.counted():
            copy.add(self)

        return copy

    def add(self, other: "Measurements") -> None:
        """Add the counts of another instance, except those in flight."""
        self.counts.update(other.counts)
        self.retries += other.retries
        self.overloads += other.overloads
        for name in (
            "latency",
            "retried",
            "attempt",
            "queue",
            "expired",
            "first_chunk",
            "backoff",
            "chunk_gap",
        ):
            getattr(self, name).merge(getattr(other, name))

    @contextmanager
    def counted(self) -> Generator[None]:
        """Hold the lock, with all earlier reports counted."""
        with self._lock:
            # A single attempt took as long as its invocation, so most invocations are recorded only once.
            latencies = _taken(self._latencies_reported)
            self.in_flight += sum(_taken(self._in_flight_reported)) - len(latencies)
            self.counts[Status.SUCCESS] += len(latencies)
            durations: dict[str, list[float]] = defaultdict(list)
            durations["latency"] = latencies
            durations["queue"] = _taken(self._queues_reported)
            for name, duration in _taken(self._others_reported):
                durations[name].append(duration)

            self.overloads += len(durations.pop(_OVERLOAD, ()))
            for status, retries, latency, queue, first_chunk in _taken(self._results_reported):
                self.retries += retries
                self.counts[status] += 1
                if queue:
                    durations["expired" if latency is None else "queue"].append(queue)

                if latency is not None:
                    durations["retried" if retries else "latency"].append(latency)
                    if first_chunk is not None:
                        durations["first_chunk"].append(first_chunk)

            for name, found in durations.items():
                getattr(self, name).add_all(found)

            yield

    def count(self) -> None:
        """Count all earlier reports."""
        with self.counted():
            pass

    def report_result(
        self, status: Status, retries: int, latency: float | None, queue: float, first_chunk: float | None
    ) -> None:
        """
        Report a result.

        :param latency: in milliseconds, as all durations are; ``None`` if the invocation was not started
        :param queue: how long it waited for its first slot; 0 if it never started, unless it waited too long
        """
        self._results_reported.append((status, retries, latency, queue, first_chunk))
        if len(self._results_reported) >= REPORTS_AT_MOST:
            self.count()

    def add_attempt(self, attempt_ms: float) -> None:
        """
        Count the duration of one of several attempts. A single attempt takes as long as its invocation.

        :param attempt_ms: in milliseconds, finite and not negative
        """
        self._others_reported.append(("attempt", attempt_ms))

    def add_backoff(self, backoff_ms: float, overload: bool) -> None:
        """
        Count the wait before a retry.

        :param backoff_ms: in milliseconds, finite and not negative
        :param overload: whether the wait is because of an overload
        """
        if overload:
            self.add_overload()

        self._others_reported.append(("backoff", backoff_ms))
        # The other two come before a backoff, or before a result.
        if len(self._others_reported) >= REPORTS_AT_MOST:
            self.count()

    def add_overload(self) -> None:
        """Count an attempt that failed by an overload."""
        self._others_reported.append((_OVERLOAD, 0.0))

    def new_histogram(self) -> Histogram:
        """Return a histogram for :meth:`add_chunk_gaps`."""
        return Histogram(self.scale)

    def add_chunk_gaps(self, gaps: Histogram) -> None:
        """
        Count the times between a stream's chunks.

        :param gaps: a histogram from :meth:`new_histogram`, with the gaps in it
        """
        with self._lock:
            self.chunk_gap.merge(gaps)
