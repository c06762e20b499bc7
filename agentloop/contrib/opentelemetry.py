"""
Spans and metrics of invocations. Needs the extra ``otel``, which installs OpenTelemetry's API. The
application installs the SDK and sets up the exporters::

    loop = AgentLoop(on_event=OpenTelemetrySink())
"""

from __future__ import annotations

__all__ = ["OpenTelemetrySink"]

import traceback
from collections.abc import Callable
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Meter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from agentloop import (
    Event,
    FirstChunkEvent,
    Invocation,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
)

SCOPE = "agentloop"

# Names of the semantic conventions. Those for GenAI still change:
# https://github.com/open-telemetry/semantic-conventions-genai. The gen_ai.client metrics are left to the
# instrumentation of the SDK that calls the model.
OPERATION = "invoke_agent"
DURATION = "gen_ai.invoke_agent.duration"
DURATION_BOUNDS = [0.01 * 2**power for power in range(14)]
OPERATION_NAME = "gen_ai.operation.name"
AGENT_NAME = "gen_ai.agent.name"
ERROR_TYPE = "error.type"
EXCEPTION_EVENT = "exception"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_STACKTRACE = "exception.stacktrace"

# Names of our own.
QUEUE_DURATION = "agentloop.queue.duration"
FIRST_CHUNK_DURATION = "agentloop.first_chunk.duration"
RETRIES = "agentloop.retries"
SKIPPED = "agentloop.skipped"
ACTIVE = "agentloop.active"
ATTEMPT_EVENT = "agentloop.attempt"
RETRY_EVENT = "agentloop.retry"
FIRST_CHUNK_EVENT = "agentloop.first_chunk"
STATUS = "agentloop.status"
ATTEMPT = "agentloop.attempt"
ATTEMPTS = "agentloop.attempts"
CHUNKS = "agentloop.chunks"
DELAY = "agentloop.delay"
VERDICT = "agentloop.verdict"
ERROR = "agentloop.error"


class OpenTelemetrySink:
    """
    Makes a span for each invocation, and counts and times them. Pass it as ``AgentLoop(on_event=...)``; any
    number of loops may share one.

    A span, ``invoke_agent {agent_id}``, lasts from the first start to the end, as ``latency_ms`` does. Its
    parent is the span that is current where the caller calls the loop. Inside the agent it is the current
    span in every attempt, so the spans that the agent makes (those of an HTTP client, for example) become its
    children. Retries, the attempts that follow them and the first chunk are events in it. Skipped and
    replayed invocations have no span.

    There are few metrics, since an SDK takes some microseconds for each value. The histogram of the durations
    also counts the ended invocations by status.

    :param tracer: makes the spans; the global provider's if absent
    :param meter: makes the metrics; the global provider's if absent
    :param agent_name: returns the name of an invocation's agent; there should be few names. If absent,
        ``agent_id`` names the spans, and the metrics have no agent name
    """

    def __init__(
        self,
        tracer: Tracer | None = None,
        meter: Meter | None = None,
        *,
        agent_name: Callable[[Invocation[Any]], str] | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE) if tracer is None else tracer
        meter = metrics.get_meter(SCOPE) if meter is None else meter
        self._agent_name = agent_name
        # By the id of each invocation that was started and has not ended: its span, the context with that
        # span in it, and the attributes of its metrics.
        self._begun: dict[int, tuple[Span, Context, dict[str, str]]] = {}

        def histogram(name: str, description: str) -> metrics.Histogram:
            return meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=DURATION_BOUNDS
            )

        self._duration = histogram(DURATION, "How long invocations took, with retries and waits.")
        self._queue_duration = histogram(QUEUE_DURATION, "How long invocations waited for their first slot.")
        self._first_chunk = histogram(FIRST_CHUNK_DURATION, "How long streams took to their first chunk.")
        self._retries = meter.create_counter(RETRIES, "{retry}", "Attempts that failed and are retried.")
        self._skipped = meter.create_counter(SKIPPED, "{invocation}", "Invocations that were never started.")
        self._active = meter.create_up_down_counter(
            ACTIVE, "{invocation}", "Invocations that were started and have not ended."
        )

    def __call__(self, event: Event) -> None:
        """Record an event."""
        match event:
            case StartedEvent():
                self._start(event)
            case RetryEvent():
                self._retry(event)
            case FirstChunkEvent():
                self._begun[event.id][0].add_event(FIRST_CHUNK_EVENT)
            case ResultEvent():
                self._end(event)
            case _:
                pass  # the wait for a slot is measured when it ends; other events belong to no invocation

    def _attributes(self, invocation: Invocation[Any]) -> dict[str, str]:
        return {} if self._agent_name is None else {AGENT_NAME: _encodable(self._agent_name(invocation))}

    def _start(self, event: StartedEvent) -> None:
        if event.id in self._begun:
            span, inside, _ = self._begun[event.id]
        else:
            # A StartedEvent is reported in the caller's context, a QueuedEvent perhaps in one of the loop's
            # own tasks.
            attributes = self._attributes(event.invocation)
            name = attributes.get(AGENT_NAME) or _encodable(event.invocation.agent_id)
            span = self._tracer.start_span(
                f"{OPERATION} {name}",
                kind=SpanKind.INTERNAL,
                attributes={OPERATION_NAME: OPERATION, AGENT_NAME: name},
            )
            inside = trace.set_span_in_context(span)
            self._begun[event.id] = span, inside, attributes
            self._active.add(1, attributes)

        if event.attempt > 1:
            span.add_event(ATTEMPT_EVENT, {ATTEMPT: event.attempt})

        # Never detached: the context is a copy that this attempt alone runs in.
        context.attach(inside)

    def _retry(self, event: RetryEvent) -> None:
        span, _, attributes = self._begun[event.id]
        found = {ERROR_TYPE: _name(event.error), VERDICT: event.verdict.kind.value}
        self._retries.add(1, {**attributes, **found})
        more = {ATTEMPT: event.attempt, DELAY: event.delay_seconds}
        span.add_event(RETRY_EVENT, {**found, **more, ERROR: _message(event.error, event.reason)})

    def _end(self, event: ResultEvent) -> None:
        result = event.result
        if event.id not in self._begun:
            if not result.replayed:
                self._skipped.add(1, self._attributes(event.invocation))

            return

        span, inside, attributes = self._begun.pop(event.id)
        self._active.add(-1, attributes)
        # With the context, an SDK can link the value of a slow invocation to its span (an exemplar).
        self._queue_duration.record(result.queue_ms / 1000, attributes, inside)
        if result.first_chunk_ms is not None:
            self._first_chunk.record(result.first_chunk_ms / 1000, attributes, inside)

        status = result.status.value
        attributes = {**attributes, STATUS: status}
        try:
            span.set_attributes({STATUS: status, ATTEMPTS: result.retries + 1, CHUNKS: result.chunks})
            error = result.exception
            # A cancelled invocation did not fail.
            if error is not None and result.status in (Status.ERROR, Status.TIMEOUT):
                attributes[ERROR_TYPE] = _name(error)
                span.set_attribute(ERROR_TYPE, attributes[ERROR_TYPE])
                span.set_status(StatusCode.ERROR, result.error)
                span.add_event(EXCEPTION_EVENT, _exception(error, result.error or ""))
        finally:
            self._duration.record(result.latency_ms / 1000, attributes, inside)
            span.end()


def _name(error: BaseException) -> str:
    kind = type(error)
    # A metaclass may make a property of kind.__module__.
    module = vars(type)["__module__"].__get__(kind)
    return _encodable(kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}")


def _message(error: BaseException, line: str) -> str:
    """Return the line that describes an error without its type."""
    name: str = vars(type)["__name__"].__get__(type(error))
    return line.removeprefix(f"{name}: ")


def _exception(error: BaseException, line: str) -> dict[str, str]:
    """Return the attributes that ``Span.record_exception()`` sets; that method raises if ``str()`` does."""
    try:
        stack = _encodable("".join(traceback.format_exception(error)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        stack = line

    return {
        EXCEPTION_TYPE: _name(error),
        EXCEPTION_MESSAGE: _message(error, line),
        EXCEPTION_STACKTRACE: stack,
    }


def _encodable(text: str) -> str:
    """Replace half surrogate pairs in a text: an exporter would drop the whole batch of spans for one."""
    return text.encode(errors="replace").decode()
