"""What happened so far."""

__all__ = ["MetricsRecorder", "MetricsSnapshot"]

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import repeat
from operator import call
from typing import Any, TypeAlias, TypeVar

import attrs

from .. import _validators as must
from .._result import InvocationResult, Status
from .histogram import DEFAULT_SCALE, Distribution, Histogram

T = TypeVar("T")

# Of a result: its status, retries, latency, queue and first chunk.
_Record: TypeAlias = tuple[Status, int, float | None, float, float | None]
TOLD_AT_MOST = 1000


def _taken(told: deque[T]) -> list[T]:
    """Take out what is there now; another thread may add to it meanwhile."""
    return list(map(call, repeat(told.popleft, len(told))))


@attrs.frozen
class MetricsSnapshot:
    """
    What was recorded until now. Distributions are of durations in milliseconds.

    :param counts: how many results there were of each status
    :param retries: how many retries all of them made
    :param overloads: how many attempts failed by an overload
    :param in_flight: how many invocations were started and have not ended
    :param latency: how long those took that were started, whatever came of it, with retries and waits
    :param queue: how long they waited for their first slot
    :param first_chunk: how long streams took to their first chunk
    :param attempt: how long each attempt took
    :param backoff: how long each retry had to wait
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
        """How many failed: errors and time-outs. What was cancelled or skipped is no failure."""
        return self.counts[Status.ERROR] + self.counts[Status.TIMEOUT]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        fields: dict[str, Any] = {}
        for name in attrs.fields_dict(MetricsSnapshot):
            value: Any = getattr(self, name)
            fields[name] = value.to_dict() if isinstance(value, Distribution) else value

        fields["counts"] = {str(status): count for status, count in self.counts.items()}
        return fields


class MetricsRecorder:
    """
    Records what happens to invocations. Memory is constant, and any thread may record.

    Loops that are given the same recorder add up, and so do the recorders of several processes: a recorder
    pickles, and :meth:`merge` is exact in any order.

    :param scale: how fine the distributions are: at 6 percentiles are within 0.55 %, and each step more
        halves that and doubles the memory
    :raises TypeError: if ``scale`` is no ``int``
    :raises ValueError: if ``scale`` is not from 6 to 12
    """

    def __init__(self, scale: int = DEFAULT_SCALE) -> None:
        must.check_whole("scale", scale, DEFAULT_SCALE)
        if scale > 12:
            raise ValueError(f"scale must be at most 12, got {scale!r}")

        self._scale = scale
        self._in_flight = 0
        self._prepare()
        self._clear()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        # What was told and not yet counted. To append is safe in any thread, and many are counted faster than
        # one by one.
        self._told: deque[_Record] = deque()
        self._in_flight_told: deque[int] = deque()
        self._latencies_told: deque[float] = deque()
        self._queues_told: deque[float] = deque()
        # 1 for an invocation that begins, -1 for one that ends; and the latency of one that succeeded at its
        # first attempt, as most do, which ends it too, with the time that it was queued for, if any.
        self.tell_in_flight: Callable[[int], None] = self._in_flight_told.append
        self.tell_latency: Callable[[float], None] = self._latencies_told.append
        self.tell_queue: Callable[[float], None] = self._queues_told.append

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.snapshot().counts.items() if count)
        return f"<MetricsRecorder {counts or 'empty'}>"

    def __getstate__(self) -> dict[str, Any]:
        with self._counted():
            copy = MetricsRecorder(self._scale)
            copy._add(self)

        state = vars(copy)
        for name in ("_lock", *(name for name in state if "tell_" in name or "told" in name)):
            del state[name]

        # What runs here does not run where this is unpickled.
        state["_in_flight"] = 0
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def record(self, result: InvocationResult[Any]) -> None:
        """
        Record one result.

        :param result: what became of an invocation
        :raises ValueError: if a duration in it is negative, infinite or no number
        """
        latency, queue, first_chunk = result.latency_ms, result.queue_ms, result.first_chunk_ms
        if not (0 <= latency < math.inf and 0 <= queue < math.inf and 0 <= (first_chunk or 0) < math.inf):
            raise ValueError(f"durations must be finite and at least 0, got {result!r}")

        status = result.status
        # One that was refused before it could start has no time, not one of 0 ms.
        started = status is not Status.SKIPPED and bool(
            status is not Status.ERROR or result.failures or latency
        )
        self._told.append((status, result.retries, latency if started else None, queue, first_chunk))
        if len(self._told) >= TOLD_AT_MOST:
            self.count()

    def count(self) -> None:
        """Count what was told."""
        with self._counted():
            pass

    @contextmanager
    def _counted(self) -> Generator[None]:
        """Hold the lock, with all counted that was told before."""
        with self._lock:
            # Where there was one attempt, it took as long as all of it: most are recorded only once.
            latencies = _taken(self._latencies_told)
            self._in_flight += sum(_taken(self._in_flight_told)) - len(latencies)
            self._successes += len(latencies)
            self._latency.add_all(latencies)
            self._queue.add_all(_taken(self._queues_told))
            for status, retries, latency, queue, first_chunk in _taken(self._told):
                self._retries += retries
                if status is Status.SUCCESS:
                    self._successes += 1
                else:
                    self._others[status] = self._others.get(status, 0) + 1

                if latency is None:
                    continue

                (self._retried if retries else self._latency).add(latency)
                if queue:
                    self._queue.add(queue)

                if first_chunk is not None:
                    self._first_chunk.add(first_chunk)

            yield

    def snapshot(self) -> MetricsSnapshot:
        """Return what was recorded until now."""
        with self._counted():
            queue = Histogram(self._scale)
            # Those that were not queued are not recorded as such.
            unqueued = self._latency.count + self._retried.count - self._queue.count
            if unqueued > 0:
                queue.zeros = queue.count = unqueued
                queue.minimum = queue.maximum = 0.0

            return MetricsSnapshot(
                {
                    status: self._successes if status is Status.SUCCESS else self._others.get(status, 0)
                    for status in Status
                },
                self._retries,
                self._overloads,
                self._in_flight,
                self._latency.plus(self._retried).distribution(),
                queue.plus(self._queue).distribution(),
                self._first_chunk.distribution(),
                self._latency.plus(self._attempt).distribution(),
                self._backoff.distribution(),
                self._chunk_gap.distribution(),
            )

    def merge(self, other: "MetricsRecorder") -> None:
        """
        Add what another recorder has recorded, except what is in flight there. The result is the same in
        whatever order recorders are merged.

        :param other: which stays as it is
        :raises TypeError: if ``other`` is no recorder
        :raises ValueError: if it is this one
        """
        if not isinstance(other, MetricsRecorder):
            raise TypeError(f"other must be of type MetricsRecorder, got {other!r}")

        if other is self:
            raise ValueError("a recorder cannot be merged with itself")

        # One lock after the other: two recorders may be merged with each other at once.
        copy = MetricsRecorder(other._scale)
        with other._counted():
            copy._add(other)

        with self._counted():
            self._add(copy)

    def reset(self) -> None:
        """Forget everything, except what is in flight."""
        with self._counted():
            self._clear()

    def _clear(self) -> None:
        self._successes = 0
        self._others: dict[Status, int] = {}
        self._retries = 0
        self._overloads = 0
        # Of invocations with a single attempt: their latencies and their attempts.
        self._latency = Histogram(self._scale)
        self._retried = Histogram(self._scale)
        # Of invocations with several.
        self._attempt = Histogram(self._scale)
        self._queue = Histogram(self._scale)
        self._first_chunk = Histogram(self._scale)
        self._backoff = Histogram(self._scale)
        self._chunk_gap = Histogram(self._scale)

    def _add(self, other: "MetricsRecorder") -> None:
        self._successes += other._successes
        for status, count in other._others.items():
            self._others[status] = self._others.get(status, 0) + count

        self._retries += other._retries
        self._overloads += other._overloads
        for name in ("_latency", "_retried", "_attempt", "_queue", "_first_chunk", "_backoff", "_chunk_gap"):
            getattr(self, name).merge(getattr(other, name))

    # -- what a loop tells besides results

    def add_attempt(self, attempt_ms: float) -> None:
        """
        Record how long one of several attempts took. A single attempt took as long as all of it.

        :param attempt_ms: in milliseconds, finite and not negative
        """
        with self._lock:
            self._attempt.add(attempt_ms)

    def add_backoff(self, backoff_ms: float, overload: bool) -> None:
        """
        Record how long a retry has to wait.

        :param backoff_ms: in milliseconds, finite and not negative
        :param overload: whether it has to because of an overload
        """
        with self._lock:
            self._backoff.add(backoff_ms)
            self._overloads += overload

    def add_overload(self) -> None:
        """Record that an attempt failed by an overload and is not retried."""
        with self._lock:
            self._overloads += 1

    def add_chunk_gaps(self, gaps: Histogram) -> None:
        """
        Record how long a stream took between its chunks.

        :param gaps: what :meth:`new_histogram` returned, with the gaps in it
        """
        with self._lock:
            self._chunk_gap.merge(gaps)

    def new_histogram(self) -> Histogram:
        """Return a histogram for :meth:`add_chunk_gaps`."""
        return Histogram(self._scale)
