"""The counters and histograms behind a recorder."""

__all__ = ["TOLD_AT_MOST", "Meters"]

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import repeat
from operator import call
from typing import Any, Self, TypeAlias, TypeVar

from .._result import Status
from .histogram import Histogram

T = TypeVar("T")

# Of a result: its status, retries, latency, queue and first chunk.
_Record: TypeAlias = tuple[Status, int, float | None, float, float | None]
TOLD_AT_MOST = 1000


def _taken(told: deque[T]) -> list[T]:
    """Take out what is there now; another thread may add to it meanwhile."""
    return list(map(call, repeat(told.popleft, len(told))))


class Meters:
    """
    Counts what happens to invocations. Any thread may tell it something.

    :param scale: of the histograms
    """

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.in_flight = 0
        self._prepare()
        self.clear()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        # What was told and not yet counted. To append is safe in any thread, and many are counted faster than
        # one by one.
        self._told: deque[_Record] = deque()
        self._in_flight_told: deque[int] = deque()
        self._latencies_told: deque[float] = deque()
        self._queues_told: deque[float] = deque()
        self.tell_in_flight: Callable[[int], None] = self._in_flight_told.append
        """Takes 1 for an invocation that begins, and -1 for one that ends."""
        self.tell_latency: Callable[[float], None] = self._latencies_told.append
        """Takes the latency of one that has ended, and succeeded at its first attempt, as most do."""
        self.tell_queue: Callable[[float], None] = self._queues_told.append
        """Takes the time that such a one was queued for, if it was."""

    def clear(self) -> None:
        """Forget everything, except what is in flight. All of it has to be :meth:`counted`."""
        self.successes = 0
        self.others: dict[Status, int] = {}
        self.retries = 0
        self.overloads = 0
        # Of invocations with a single attempt: their latencies and their attempts.
        self.latency = Histogram(self.scale)
        self.retried = Histogram(self.scale)
        # Of invocations with several.
        self.attempt = Histogram(self.scale)
        self.queue = Histogram(self.scale)
        # Of those that waited too long.
        self.expired = Histogram(self.scale)
        self.first_chunk = Histogram(self.scale)
        self.backoff = Histogram(self.scale)
        self.chunk_gap = Histogram(self.scale)

    def __getstate__(self) -> dict[str, Any]:
        # All was counted that was told: this is a copy.
        return {
            name: value
            for name, value in vars(self).items()
            if name != "_lock" and "tell_" not in name and "told" not in name
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def copy(self) -> Self:
        """Return a copy, in which nothing is in flight: what runs here does not run there."""
        copy = type(self)(self.scale)
        with self.counted():
            copy.add(self)

        return copy

    def add(self, other: "Meters") -> None:
        """Add what another one has counted, except what is in flight there."""
        self.successes += other.successes
        for status, count in other.others.items():
            self.others[status] = self.others.get(status, 0) + count

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
        """Hold the lock, with all counted that was told before."""
        with self._lock:
            # Where there was one attempt, it took as long as all of it: most are recorded only once.
            latencies = _taken(self._latencies_told)
            self.in_flight += sum(_taken(self._in_flight_told)) - len(latencies)
            self.successes += len(latencies)
            self.latency.add_all(latencies)
            self.queue.add_all(_taken(self._queues_told))
            for status, retries, latency, queue, first_chunk in _taken(self._told):
                self.retries += retries
                if status is Status.SUCCESS:
                    self.successes += 1
                else:
                    self.others[status] = self.others.get(status, 0) + 1

                if latency is None:
                    if queue:
                        self.expired.add(queue)

                    continue

                (self.retried if retries else self.latency).add(latency)
                if queue:
                    self.queue.add(queue)

                if first_chunk is not None:
                    self.first_chunk.add(first_chunk)

            yield

    def count(self) -> None:
        """Count what was told."""
        with self.counted():
            pass

    def tell_result(
        self, status: Status, retries: int, latency: float | None, queue: float, first_chunk: float | None
    ) -> None:
        """
        Take note of a result.

        :param latency: in milliseconds, as all durations are; ``None`` if the invocation was not started
        :param queue: how long it waited; 0 if it was not started for any other reason than that
        """
        self._told.append((status, retries, latency, queue, first_chunk))
        if len(self._told) >= TOLD_AT_MOST:
            self.count()

    def add_attempt(self, attempt_ms: float) -> None:
        """
        Count how long one of several attempts took. A single attempt took as long as all of it.

        :param attempt_ms: in milliseconds, finite and not negative
        """
        with self._lock:
            self.attempt.add(attempt_ms)

    def add_backoff(self, backoff_ms: float, overload: bool) -> None:
        """
        Count how long a retry has to wait.

        :param backoff_ms: in milliseconds, finite and not negative
        :param overload: whether it has to because of an overload
        """
        with self._lock:
            self.backoff.add(backoff_ms)
            self.overloads += overload

    def add_overload(self) -> None:
        """Count that an attempt failed by an overload and is not retried."""
        with self._lock:
            self.overloads += 1

    def new_histogram(self) -> Histogram:
        """Return a histogram for :meth:`add_chunk_gaps`."""
        return Histogram(self.scale)

    def add_chunk_gaps(self, gaps: Histogram) -> None:
        """
        Count how long a stream took between its chunks.

        :param gaps: what :meth:`new_histogram` returned, with the gaps in it
        """
        with self._lock:
            self.chunk_gap.merge(gaps)
