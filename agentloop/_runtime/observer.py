"""Reports of what happens to invocations: to the recorder, and to a sink for events."""

from __future__ import annotations

__all__ = ["COUNTED_AT_ONCE", "Observer", "Sink", "new_id"]

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from contextvars import Context
from typing import Any

from .. import _validators as must
from .._eventloop.errors import is_error
from .._events import Event, FirstChunkEvent, QueuedEvent, ResultEvent, RetryEvent, StartedEvent, StopEvent
from .._foreign import foreign_code
from .._invocation import Invocation
from .._metrics.histogram import Histogram
from .._metrics.recorder import MetricsRecorder, measurements_of
from .._result import InvocationResult, Status
from .._verdict import VerdictKind
from .outcome import Failures, Outcome

_logger = logging.getLogger("agentloop")
new_id = itertools.count(1).__next__

# Counting many results at once is faster than one by one.
COUNTED_AT_ONCE = 1000


class Sink:
    """
    Calls functions for each event, one after the other. An error of one harms neither a run nor the next
    function; the first error of each is logged.
    """

    def __init__(self, functions: Iterable[Callable[[Event], object]]) -> None:
        self._functions = tuple(functions)
        # The indices of the functions that have failed.
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        for place, function in enumerate(self._functions):
            try:
                returned = function(event)
                if returned is not None and must.close_coroutine(returned):
                    raise TypeError(f"on_event must be a plain function, and this one returned {returned!r}")
            except BaseException as exc:
                if not is_error(exc):
                    raise

                if place not in self._failed:
                    self._failed.add(place)
                    # Logging formats the error, and that may fail too.
                    with foreign_code:
                        _logger.exception("on_event=%r failed; its further errors are not logged", function)


class Observer:
    """
    Reports to the metrics recorder and to the event sink, if there are any; builds no event without a sink.

    :param metrics: the recorder, or ``None``
    :param sink: the sink, or ``None``
    :param nested: counts the nested invocations on the same limiter, by status
    """

    __slots__ = (
        "_classify_failed",
        "_measurements",
        "_record",
        "_sink",
        "nested",
        "only_counts",
        "report_in_flight",
        "report_latency",
        "report_queue",
        "uncounted",
    )

    def __init__(
        self, metrics: MetricsRecorder | None, sink: Sink | None, nested: Counter[Status] | None = None
    ) -> None:
        self._measurements = measurements = None if metrics is None else measurements_of(metrics)
        self._record: Callable[[InvocationResult[Any]], object] = id if metrics is None else metrics.record
        self._sink = sink
        self.nested: Counter[Status] = Counter() if nested is None else nested
        self._classify_failed = False
        self.uncounted: Sized = () if measurements is None else measurements.uncounted
        """The reports that wait to be counted, of all loops with this recorder."""
        # Whether there is no sink, and no recorder of a subclass. Then a success at the first attempt is only
        # three figures: one more in flight, the latency, and the time in the queue.
        self.only_counts = sink is None and (metrics is None or type(metrics) is MetricsRecorder)
        self.report_in_flight: Callable[[int], object] = (
            id if measurements is None else measurements.report_in_flight
        )
        self.report_latency: Callable[[float], object] = (
            id if measurements is None else measurements.report_latency
        )
        self.report_queue: Callable[[float], object] = (
            id if measurements is None else measurements.report_queue
        )

    def count(self) -> None:
        """Let the recorder count the results that it was given so far."""
        assert self._measurements is not None
        self._measurements.count()

    def queued(self, invocation: Invocation[Any], now: float) -> int:
        """
        Report that an invocation waits for its first slot.

        :return: its number in events
        """
        if self._sink is None:
            return 0

        number = new_id()
        self._sink(QueuedEvent(invocation, number, now))
        return number

    def started(
        self,
        invocation: Invocation[Any],
        attempt: int,
        number: int,
        now: float,
        context: Context | None,
        attempt_ms: float,
    ) -> None:
        """
        Report that an attempt is about to begin.

        :param attempt: its number, from 1
        :param context: its context, if that is not the current one; batches with a sink have one for each
        :param number: the number of the invocation in events
        :param attempt_ms: how long the attempt before it took
        """
        if self._measurements is not None:
            if attempt == 1:
                self.report_in_flight(1)
            else:
                self._measurements.add_attempt(attempt_ms)

        if self._sink is not None:
            assert context is not None
            context.run(self._sink, StartedEvent(invocation, attempt, number, now))

    def first_chunk(self, invocation: Invocation[Any], number: int, now: float) -> Histogram | None:
        """
        Report that a stream has yielded its first chunk.

        :return: the histogram for the times between its chunks, if there is a recorder
        """
        if self._sink is not None:
            self._sink(FirstChunkEvent(invocation, number, now))

        return None if self._measurements is None else self._measurements.new_histogram()

    def streamed(self, gaps: Histogram) -> None:
        """Report that a stream has ended."""
        assert self._measurements is not None
        self._measurements.add_chunk_gaps(gaps)

    def retrying(
        self,
        invocation: Invocation[Any],
        attempt: int,
        outcome: Outcome,
        delay: float,
        number: int,
        now: float,
    ) -> None:
        """Report that an attempt has failed and will be retried after a delay."""
        assert outcome.verdict is not None
        if self._measurements is not None:
            self._measurements.add_backoff(delay * 1000, outcome.verdict.kind is VerdictKind.OVERLOAD)

        if self._sink is not None:
            self._sink(RetryEvent(invocation, attempt, outcome.error, outcome.verdict, delay, number, now))

    def ended(
        self,
        invocation: Invocation[Any],
        result: InvocationResult[Any],
        attempts: int,
        failures: Failures | None,
        number: int,
        now: float,
    ) -> None:
        """Report that an invocation has ended, after so many attempts."""
        measurements = self._measurements
        if measurements is not None:
            if attempts:
                self.report_in_flight(-1)

            if failures is not None:
                began = failures.attempt_at
                if attempts > 1:
                    # An invocation that ended in the wait for a retry has no attempt that ends now.
                    measurements.add_attempt(
                        failures.attempt_ms if began is None else max(0.0, now - began) * 1000
                    )

                verdict = None if failures.last is None else failures.last.verdict
                if verdict is not None and verdict.kind is VerdictKind.OVERLOAD and began is not None:
                    measurements.add_overload()

            self._record(result)

        if self._sink is not None:
            self._sink(ResultEvent(invocation, result, number, now))

    def replayed(self, invocation: Invocation[Any], result: InvocationResult[Any], now: float) -> None:
        """Report that the result of an invocation comes from a journal."""
        if self._sink is not None:
            self._sink(ResultEvent(invocation, result, new_id(), now))

    def stopped(self, reason: str, now: float) -> None:
        """Report that a batch starts nothing new any more."""
        if self._sink is not None:
            self._sink(StopEvent(reason, now))

    def log_classify(self, classify: object) -> None:
        """Log an exception of ``classify``, the first time."""
        if not self._classify_failed:
            self._classify_failed = True
            with foreign_code:
                _logger.exception(
                    "classify=%r failed, so the failure is not retried; its further errors are not logged",
                    classify,
                )
