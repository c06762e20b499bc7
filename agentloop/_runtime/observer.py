"""Who is told what happens: the recorder, and a sink for events."""

from __future__ import annotations

__all__ = ["Observer", "Sink", "new_id"]

import itertools
import logging
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any, TypeVar

from .. import _validators as must
from .._eventloop.backend import is_error
from .._events import Event, FirstChunkEvent, QueuedEvent, ResultEvent, RetryEvent, StartedEvent, StopEvent
from .._foreign import foreign_code
from .._metrics.histogram import Histogram
from .._metrics.meters import TOLD_AT_MOST
from .._metrics.recorder import MetricsRecorder, meters_of
from .._result import SUCCESS, InvocationResult, success
from .._verdict import VerdictKind
from .job import Job

T = TypeVar("T")

_logger = logging.getLogger("agentloop")
new_id = itertools.count(1).__next__


class Sink:
    """
    Calls functions for each event, one after the other. What they raise harms neither a run nor the next
    function; the first error of each is logged.
    """

    def __init__(self, functions: Iterable[Callable[[Event], object]]) -> None:
        self._functions = tuple(functions)
        # The places of those that have failed.
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
                    # The error has to be printed for that, which can fail as well.
                    with foreign_code:
                        _logger.exception("on_event=%r failed; its further errors are not logged", function)


class Observer:
    """
    Tells a recorder and a sink what happens to jobs. What is not there is told nothing, and nothing is built.

    :param metrics: the recorder, or ``None``
    :param sink: the sink, or ``None``
    """

    __slots__ = (
        "_classify_failed",
        "_ended",
        "_meters",
        "_record",
        "_sink",
        "_tell_latency",
        "_tell_queue",
        "is_plain",
        "tell_in_flight",
    )

    def __init__(self, metrics: MetricsRecorder | None, sink: Sink | None) -> None:
        self._meters = meters = None if metrics is None else meters_of(metrics)
        self._sink = sink
        self._ended = 0
        self._classify_failed = False
        # Whether at most a recorder is told, and of most invocations no more than that they are in flight,
        # how long they took and how long they were queued.
        self.is_plain = sink is None and (metrics is None or type(metrics) is MetricsRecorder)
        self._record: Callable[[InvocationResult[Any]], object] = id if metrics is None else metrics.record
        self.tell_in_flight: Callable[[int], object] = id if meters is None else meters.tell_in_flight
        self._tell_latency: Callable[[float], object] = id if meters is None else meters.tell_latency
        self._tell_queue: Callable[[float], object] = id if meters is None else meters.tell_queue

    def queued(self, job: Job[Any]) -> None:
        """A job waits for its first slot."""
        if self._sink is not None:
            job.id = new_id()
            self._sink(QueuedEvent(job.invocation, job.id, job.queued_at))

    def started(self, job: Job[Any], now: float, context: Context) -> None:
        """An attempt is about to begin, in a context."""
        meters = self._meters
        if meters is not None:
            if job.attempts == 1:
                self.tell_in_flight(1)
            else:
                meters.add_attempt(job.pending_attempt_ms)

        job.attempt_at = now
        if self._sink is not None:
            context.run(self._sink, StartedEvent(job.invocation, job.attempts, job.id, now))

    def first_chunk(self, job: Job[Any], now: float) -> Histogram | None:
        """
        A stream has yielded its first chunk.

        :return: what to count the time between its chunks in, if anything
        """
        if self._sink is not None:
            self._sink(FirstChunkEvent(job.invocation, job.id, now))

        return None if self._meters is None else self._meters.new_histogram()

    def streamed(self, gaps: Histogram) -> None:
        """A stream has ended."""
        assert self._meters is not None
        self._meters.add_chunk_gaps(gaps)

    def retrying(self, job: Job[Any], now: float) -> None:
        """An attempt has failed, and there will be another one."""
        assert job.verdict is not None
        assert job.error is not None
        delay = job.wake_at - now
        if self._meters is not None:
            self._meters.add_backoff(delay * 1000, job.verdict.kind is VerdictKind.OVERLOAD)
            assert job.attempt_at is not None
            job.pending_attempt_ms = max(0.0, now - job.attempt_at) * 1000

        job.attempt_at = None
        if self._sink is not None:
            self._sink(RetryEvent(job.invocation, job.attempts, job.error, job.verdict, delay, job.id, now))

    def finish(self, job: Job[T], now: float) -> InvocationResult[T]:
        """Return the result of a job that has ended, once everybody was told."""
        self._ended += 1
        if self._ended >= TOLD_AT_MOST and self._meters is not None:
            self._ended = 0
            self._meters.count()

        started_at = job.started_at
        if (
            job.attempts != 1
            or job.status is not SUCCESS
            or job.chunks
            or not self.is_plain
            or started_at is None
        ):
            result = job.result(now)
            self._finished(job, result, now)
            return result

        # Most invocations succeed at once, and there is nothing else to know about them.
        latency, queue = (now - started_at) * 1000.0, (started_at - job.queued_at) * 1000.0
        if latency < 0.0:
            latency = 0.0  # the clock went back

        output: Any = job.output
        job.output = None
        tell = self._tell_latency
        tell(latency)
        if queue > 0:
            tell = self._tell_queue
            tell(queue)
        else:
            queue = 0.0

        return success(job.invocation.agent_id, output, latency, queue, job.index)

    def _finished(self, job: Job[Any], result: InvocationResult[Any], now: float) -> None:
        meters = self._meters
        if meters is not None:
            if job.attempts:
                self.tell_in_flight(-1)
                if job.attempts > 1:
                    # One that waits to be retried has ended its last attempt before.
                    began = job.attempt_at
                    meters.add_attempt(
                        job.pending_attempt_ms if began is None else max(0.0, now - began) * 1000
                    )

                verdict = job.verdict
                if (
                    verdict is not None
                    and verdict.kind is VerdictKind.OVERLOAD
                    and job.attempt_at is not None
                ):
                    meters.add_overload()

            self._record(result)

        if self._sink is not None:
            self._sink(ResultEvent(job.invocation, result, job.id, now))

    def stopped(self, reason: str, now: float) -> None:
        """A batch starts nothing new any more."""
        if self._sink is not None:
            self._sink(StopEvent(reason, now))

    def log_classify(self, classify: object) -> None:
        """Log the exception that ``classify`` has raised, the first time."""
        if not self._classify_failed:
            self._classify_failed = True
            with foreign_code:
                _logger.exception(
                    "classify=%r failed, so the failure is not retried; its further errors are not logged",
                    classify,
                )
