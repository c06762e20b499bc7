"""Spans and metrics of invocations, as the SDK exports them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    Invocation,
    InvocationResult,
    LoopConfig,
    QueuedEvent,
    ResultEvent,
    StartedEvent,
    Status,
)
from agentloop.contrib.opentelemetry import OpenTelemetrySink
from agentloop.journal import Journal

NO_JITTER = Backoff(initial_seconds=1.0, jitter="none")


class Open(SpanProcessor):
    """Counts the spans that have not ended."""

    count = 0

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.count += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.count -= 1


class Telemetry:
    """A sink, and what came out of it."""

    def __init__(self) -> None:
        self._exporter, self._reader, self.open = InMemorySpanExporter(), InMemoryMetricReader(), Open()
        self.tracers, self._meters = TracerProvider(), MeterProvider([self._reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracers.add_span_processor(self.open)
        self.tracer = self.tracers.get_tracer("test")
        self.meter = self._meters.get_meter("test")
        self.sink = OpenTelemetrySink(self.tracer, self.meter)

    def shutdown(self) -> None:
        self.tracers.shutdown()
        self._meters.shutdown()

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended, in that order."""
        return [*self._exporter.get_finished_spans()]

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def tree(self) -> list[str]:
        """Each span, with those above it."""
        by_id = {span.context.span_id: span for span in self.spans}

        def path(span: ReadableSpan) -> str:
            return (f"{path(by_id[span.parent.span_id])} > " if span.parent else "") + span.name.removeprefix(
                "invoke_agent "
            )

        return sorted(path(span) for span in self.spans)

    def metrics(self) -> dict[str, list[Any]]:
        """The points of each metric."""
        data = self._reader.get_metrics_data()
        return {
            metric.name: [*metric.data.data_points]
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def counts(self) -> dict[tuple[Any, ...], int]:
        """How many durations there are, by the values of their attributes."""
        points = self.metrics()["gen_ai.invoke_agent.duration"]
        return {
            tuple(sorted(str(value).rpartition(".")[2] for value in point.attributes.values())): point.count
            for point in points
        }

    def values(self, name: str) -> dict[tuple[Any, ...], float]:
        """The points of a counter, by the values of their attributes."""
        return {tuple(sorted(point.attributes.values())): point.value for point in self.metrics()[name]}


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    yield made
    assert made.open.count == 0, "a span was not ended"
    assert not made.sink._begun, "the sink remembers what has ended"
    metrics = made.metrics()
    assert not any(point.value for point in metrics.get("agentloop.active", ())), "starts and ends differ"

    made.shutdown()


class Unauthorized(Exception):
    status_code = 401


class Overloaded(Exception):
    status_code = 429


async def agent(telemetry: Telemetry, name: str = "http") -> str:
    with telemetry.tracer.start_as_current_span(name):
        await anyio.sleep(1)

    return name


async def fails(errors: list[Exception], telemetry: Telemetry) -> None:
    with telemetry.tracer.start_as_current_span(f"http, {len(errors)} to come"):
        await anyio.sleep(1)

    if errors:
        raise errors.pop(0)


async def write(telemetry: Telemetry, count: int = 2) -> AsyncIterator[int]:
    for number in range(count):
        with telemetry.tracer.start_as_current_span(f"chunk {number}"):
            await anyio.sleep(1)

        yield number


def events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, dict(event.attributes or {})) for event in span.events]


# --- spans


async def test_invocation_is_a_span_below_the_caller_s_and_above_the_agent_s_own(
    telemetry: Telemetry,
) -> None:
    loop = AgentLoop(on_event=telemetry.sink)
    with telemetry.tracer.start_as_current_span("caller") as caller:
        await loop.run_single("planner", agent, telemetry)
        assert trace.get_current_span() is caller

    assert telemetry.tree() == ["caller", "caller > planner", "caller > planner > http"]
    span = telemetry.span("invoke_agent planner")
    assert span.kind is SpanKind.INTERNAL
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "planner",
        "agentloop.status": "success",
        "agentloop.attempts": 1,
        "agentloop.chunks": 0,
    }
    assert events(span) == []


async def test_invocation_without_a_caller_s_span_is_the_root_of_its_trace(telemetry: Telemetry) -> None:
    await AgentLoop(on_event=telemetry.sink).run_single("planner", agent, telemetry)
    assert telemetry.tree() == ["planner", "planner > http"]
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_every_invocation_of_a_batch_is_below_the_span_that_asked_for_it(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=3), on_event=telemetry.sink)
    with telemetry.tracer.start_as_current_span("caller"):
        await loop.run_all([Invocation(f"a{i}", agent, (telemetry,)) for i in range(7)])

    assert telemetry.tree() == sorted(
        ["caller", *[f"caller > a{i}{rest}" for i in range(7) for rest in ("", " > http")]]
    )


async def test_what_the_reader_of_a_batch_traces_is_not_mixed_up_with_it(telemetry: Telemetry) -> None:
    seen: list[tuple[type[Event], str]] = []

    def listen(event: Event) -> None:
        seen.append((type(event), getattr(trace.get_current_span(), "name", "none")))
        telemetry.sink(event)

    loop = AgentLoop(LoopConfig(max_concurrency=2), on_event=listen)
    with telemetry.tracer.start_as_current_span("caller"):
        async with loop.as_completed([Invocation(f"a{i}", agent, (telemetry,)) for i in range(6)]) as results:
            with telemetry.tracer.start_as_current_span("reader"):
                await anyio.sleep(0.5)
                # Makes room for more workers, in the context of this span.
                loop.limiter.max_concurrency = 4
                async for result in results:
                    with telemetry.tracer.start_as_current_span(f"use {result.index}"):
                        await anyio.sleep(1.5)

    assert telemetry.tree() == sorted(
        [
            "caller",
            "caller > reader",
            *[f"caller > a{i}{rest}" for i in range(6) for rest in ("", " > http")],
            *[f"caller > reader > use {i}" for i in range(6)],
        ]
    )
    # Workers begin in the context of the batch's caller, also those that its reader has made room for.
    assert {span for kind, span in seen if kind in (QueuedEvent, StartedEvent)} == {"caller"}


async def test_every_attempt_is_in_the_same_span(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(backoff=NO_JITTER), on_event=telemetry.sink)
    errors: list[Exception] = [OSError("reset"), Overloaded("busy")]
    with telemetry.tracer.start_as_current_span("caller"):
        await loop.run_single("single", fails, [*errors], telemetry)
        await loop.run_all([("batch", fails, ([*errors], telemetry), {})])

    below = [f"http, {left} to come" for left in (0, 1, 2)]
    assert telemetry.tree() == sorted(
        [
            "caller",
            *[
                f"caller > {name}{rest}"
                for name in ("single", "batch")
                for rest in ("", *[f" > {http}" for http in below])
            ],
        ]
    )
    for name in ("single", "batch"):
        span = telemetry.span(f"invoke_agent {name}")
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes is not None
        assert span.attributes["agentloop.attempts"] == 3
        assert events(span) == [
            (
                "agentloop.retry",
                {
                    "error.type": "OSError",
                    "agentloop.verdict": "transient",
                    "agentloop.attempt": 1,
                    "agentloop.delay": 1.0,
                    "agentloop.error": "reset",
                },
            ),
            ("agentloop.attempt", {"agentloop.attempt": 2}),
            (
                "agentloop.retry",
                {
                    "error.type": "test_opentelemetry.Overloaded",
                    "agentloop.verdict": "overload",
                    "agentloop.attempt": 2,
                    "agentloop.delay": 2.0,
                    "agentloop.error": "busy",
                },
            ),
            ("agentloop.attempt", {"agentloop.attempt": 3}),
        ]


async def test_agents_that_run_agents_are_traced_at_every_depth(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=telemetry.sink)

    async def team(members: int) -> None:
        async with loop.run_streaming("writer", write, telemetry, 1) as stream:
            async for _ in stream:
                pass

        await loop.run_all([Invocation(f"member {i}", agent, (telemetry,)) for i in range(members)])

    async def head() -> None:
        await loop.run_single("team", team, 2)

    await loop.run_single("head", head)
    assert telemetry.tree() == [
        "head",
        "head > team",
        "head > team > member 0",
        "head > team > member 0 > http",
        "head > team > member 1",
        "head > team > member 1 > http",
        "head > team > writer",
        "head > team > writer > chunk 0",
    ]


@pytest.mark.parametrize("has_lifetime", [False, True])
async def test_stream_is_a_span_apart_from_its_reader_s(has_lifetime: bool, telemetry: Telemetry) -> None:
    loop = AgentLoop(on_event=telemetry.sink)

    async def read() -> None:
        with telemetry.tracer.start_as_current_span("caller"):
            async with loop.run_streaming("writer", write, telemetry) as stream:
                async for chunk in stream:
                    with telemetry.tracer.start_as_current_span(f"use {chunk}"):
                        await anyio.sleep(1)

            async with loop.stream_all([Invocation("other", write, (telemetry,))]) as both:
                async for _ in both:
                    pass

    if has_lifetime:
        async with loop:
            await read()
    else:
        await read()

    assert telemetry.tree() == [
        "caller",
        "caller > other",
        "caller > other > chunk 0",
        "caller > other > chunk 1",
        "caller > use 0",
        "caller > use 1",
        "caller > writer",
        "caller > writer > chunk 0",
        "caller > writer > chunk 1",
    ]
    for name in ("writer", "other"):
        span = telemetry.span(f"invoke_agent {name}")
        assert [event.name for event in span.events] == ["agentloop.first_chunk"]
        assert span.attributes is not None
        assert span.attributes["agentloop.chunks"] == 2


async def test_failure_is_the_status_of_the_span_and_recorded(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_retries=0, timeout_seconds=5), on_event=telemetry.sink)
    await loop.run_single("wrong", fails, [ValueError("boom")], telemetry)
    await loop.run_single("slow", anyio.sleep, 9)
    wrong, slow = telemetry.span("invoke_agent wrong"), telemetry.span("invoke_agent slow")
    for span, status, kind, text in (
        (wrong, "error", "ValueError", "ValueError: boom"),
        (slow, "timeout", "agentloop.InvocationTimeout", "Timeout after 5s"),
    ):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == text
        assert span.attributes is not None
        assert (span.attributes["agentloop.status"], span.attributes["error.type"]) == (status, kind)
        ((name, exception),) = events(span)
        assert (name, exception["exception.type"]) == ("exception", kind)

    assert "in fails" in events(wrong)[0][1]["exception.stacktrace"]


async def test_cancelled_invocation_has_ended_and_not_failed(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2), on_event=telemetry.sink)
    with anyio.move_on_after(0.5):
        await loop.run_all([Invocation(f"a{i}", agent, (telemetry,)) for i in range(3)])

    async with loop.run_streaming("left early", write, telemetry) as stream:
        await anext(stream)

    spans = [span for span in telemetry.spans if span.name.startswith("invoke_agent")]
    assert {span.name for span in spans} == {"invoke_agent a0", "invoke_agent a1", "invoke_agent left early"}
    for span in spans:
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes is not None
        assert span.attributes["agentloop.status"] == "cancelled"
        assert "error.type" not in span.attributes


async def test_what_was_skipped_has_no_span_and_is_counted(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=telemetry.sink)
    fatal = Invocation("fatal", fails, ([Unauthorized()], telemetry))
    await loop.run_all([fatal, *[Invocation(f"a{i}", agent, (telemetry,)) for i in range(5)]])
    assert telemetry.tree() == ["fatal", "fatal > http, 1 to come"]
    assert telemetry.values("agentloop.skipped") == {(): 5}
    assert telemetry.counts() == {("Unauthorized", "error"): 1}
    assert len(telemetry.metrics()["agentloop.queue.duration"]) == 1


async def test_result_of_a_journal_is_no_call(telemetry: Telemetry, tmp_path: Path) -> None:
    async def ask(x: int) -> int:
        return x

    for count in (1, 2):
        loop = AgentLoop(on_event=telemetry.sink)
        async with Journal(tmp_path / "night.db") as journal:
            await loop.run_all(Invocation.map(ask, range(count)), journal=journal)

    assert telemetry.tree() == ["ask-0", "ask-1"]
    assert "agentloop.skipped" not in telemetry.metrics()
    assert sum(telemetry.counts().values()) == 2


async def test_error_that_cannot_say_what_it_is_ends_the_span_all_the_same(telemetry: Telemetry) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    loop = AgentLoop(LoopConfig(max_retries=1, backoff=NO_JITTER), on_event=telemetry.sink)
    await loop.run_single("mute", fails, [Mute(), Mute()], telemetry)
    (point,) = telemetry.metrics()["gen_ai.invoke_agent.duration"]
    assert point.count == 1
    assert telemetry.values("agentloop.retries")
    span = telemetry.span("invoke_agent mute")
    assert span.status.description == "Mute"
    retry, attempt, exception = events(span)
    assert (retry[0], retry[1]["agentloop.error"]) == ("agentloop.retry", "Mute")
    assert attempt[0] == "agentloop.attempt"
    assert (exception[0], exception[1]["exception.message"]) == ("exception", "Mute")


async def test_error_of_which_nothing_can_be_read_ends_the_span_all_the_same(telemetry: Telemetry) -> None:
    def refuse(*_: object) -> Any:
        raise asyncio.CancelledError

    nameless = type("Nameless", (type,), dict.fromkeys(("__name__", "__module__"), property(refuse)))
    error = nameless("Hostile", (Exception,), {"__str__": refuse, "__notes__": property(refuse)})()
    loop = AgentLoop(LoopConfig(max_retries=0), on_event=telemetry.sink)
    await loop.run_single("hostile", fails, [error], telemetry)
    ((_, exception),) = events(telemetry.span("invoke_agent hostile"))
    assert exception == {
        "exception.type": f"{__name__}.Hostile",
        "exception.message": "Hostile",
        "exception.stacktrace": "Hostile",
    }


async def test_interrupt_while_an_error_is_read_ends_the_span(telemetry: Telemetry) -> None:
    class Interrupted(Exception):
        @property
        def __notes__(self) -> Any:
            raise KeyboardInterrupt

    invocation = Invocation("a", agent)
    telemetry.sink(StartedEvent(invocation))
    with pytest.raises(KeyboardInterrupt):
        telemetry.sink(ResultEvent(invocation, InvocationResult("a", Status.ERROR, exception=Interrupted())))

    assert telemetry.span("invoke_agent a")


async def test_half_a_surrogate_pair_gets_into_no_text(telemetry: Telemetry) -> None:
    sink = OpenTelemetrySink(telemetry.tracer, telemetry.meter, agent_name=lambda _: "named \ud83d")
    for on_event in (telemetry.sink, sink):
        loop = AgentLoop(LoopConfig(max_retries=1, backoff=NO_JITTER), on_event=on_event)
        await loop.run_single("half \ud83d", fails, [ValueError("\ud83d"), ValueError("\ud83d")], telemetry)

    texts = [
        text
        for span in telemetry.spans
        for attributes in (span.attributes, *(event.attributes for event in span.events))
        for text in (span.name, span.status.description, *(attributes or {}).values())
        if isinstance(text, str)
    ]
    assert any("named ?" in text for text in texts)
    assert any("half ?" in text for text in texts)
    assert all(text.encode() for text in texts)


async def test_event_of_a_later_version_is_ignored(telemetry: Telemetry) -> None:
    later: Any = object()
    telemetry.sink(later)
    loop = AgentLoop(on_event=[lambda _: telemetry.sink(later), telemetry.sink])
    await loop.run_single("a", agent, telemetry)
    assert telemetry.tree() == ["a", "a > http"]


# --- metrics


async def test_duration_is_in_seconds_with_the_advised_buckets(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_retries=0), on_event=telemetry.sink)
    await loop.run_all([Invocation(f"a{i}", anyio.sleep, (i,)) for i in (1, 3)])
    await loop.run_single("wrong", fails, [ValueError()], telemetry)
    good, bad = sorted(
        telemetry.metrics()["gen_ai.invoke_agent.duration"], key=lambda point: len(point.attributes)
    )
    assert (good.attributes, good.count, good.sum) == ({"agentloop.status": "success"}, 2, pytest.approx(4))
    failure = {"agentloop.status": "error", "error.type": "ValueError"}
    assert (bad.attributes, bad.count, bad.sum) == (failure, 1, pytest.approx(1))
    bounds = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
    assert good.explicit_bounds == bounds


async def test_waits_for_a_slot_and_for_the_first_chunk_are_timed(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=telemetry.sink)
    await loop.run_all([Invocation(f"a{i}", anyio.sleep, (1,)) for i in range(3)])
    async with loop.run_streaming("writer", write, telemetry) as stream:
        async for _ in stream:
            pass

    metrics = telemetry.metrics()
    (queue,), (first,) = metrics["agentloop.queue.duration"], metrics["agentloop.first_chunk.duration"]
    assert (queue.count, queue.sum, queue.max) == (4, pytest.approx(3), pytest.approx(2))
    assert (first.count, first.sum) == (1, pytest.approx(1))


async def test_what_runs_or_waits_to_be_retried_is_active(telemetry: Telemetry) -> None:
    backoff = Backoff(initial_seconds=0.5, jitter="none")
    loop = AgentLoop(LoopConfig(max_concurrency=2, backoff=backoff), on_event=telemetry.sink)
    seen = []
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "retried", fails, [OSError()], telemetry)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(loop.run_all, [Invocation(f"a{i}", agent, (telemetry,)) for i in range(5)])
        for _ in range(5):
            await anyio.sleep(0.9)
            seen.append(telemetry.values("agentloop.active")[()])

    # The first waits from 1 s to 2 s, at first for its retry and then in line, while two others run.
    assert seen == [2, 3, 2, 1, 0]


async def test_retries_are_counted_by_their_reasons(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(backoff=NO_JITTER), on_event=telemetry.sink)
    await loop.run_single("a", fails, [OSError(), Overloaded(), OSError()], telemetry)
    assert telemetry.values("agentloop.retries") == {
        ("OSError", "transient"): 2,
        ("overload", "test_opentelemetry.Overloaded"): 1,
    }


async def test_names_of_agents_are_told_apart_in_metrics_if_there_are_few(telemetry: Telemetry) -> None:
    telemetry.sink = OpenTelemetrySink(
        telemetry.tracer, telemetry.meter, agent_name=lambda invocation: invocation.agent_id.partition("-")[0]
    )
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=telemetry.sink)
    await loop.run_all(Invocation.map(anyio.sleep, [1, 2], "sleeper"))
    fatal = Invocation("fatal-0", fails, ([Unauthorized()], telemetry))
    await loop.run_all([fatal, *Invocation.map(anyio.sleep, [1, 2], "sleeper")])
    assert [span.name for span in telemetry.spans if span.parent is None] == [
        "invoke_agent sleeper",
        "invoke_agent sleeper",
        "invoke_agent fatal",
    ]
    assert telemetry.counts() == {("sleeper", "success"): 2, ("Unauthorized", "error", "fatal"): 1}
    assert telemetry.values("agentloop.skipped") == {("sleeper",): 2}
    for name, points in telemetry.metrics().items():
        assert all("gen_ai.agent.name" in point.attributes for point in points), name


async def test_what_belongs_to_the_client_s_instrumentation_is_left_to_it(telemetry: Telemetry) -> None:
    loop = AgentLoop(LoopConfig(backoff=NO_JITTER), on_event=telemetry.sink)
    await loop.run_single("a", fails, [OSError()], telemetry)
    assert {name for name in telemetry.metrics() if not name.startswith("agentloop.")} == {
        "gen_ai.invoke_agent.duration"
    }


async def test_one_sink_may_serve_several_loops_and_hears_of_limits_and_stops(telemetry: Telemetry) -> None:
    first, second = (AgentLoop(LoopConfig(max_concurrency=2), on_event=telemetry.sink) for _ in range(2))
    async with anyio.create_task_group() as group:
        group.start_soon(first.run_single, "first", agent, telemetry)
        group.start_soon(second.run_single, "second", agent, telemetry)
        await anyio.sleep(0.5)
        first.limiter.max_concurrency = 5

    assert telemetry.tree() == ["first", "first > http", "second", "second > http"]


async def test_without_an_sdk_nothing_is_made_and_all_works(caplog: pytest.LogCaptureFixture) -> None:
    loop = AgentLoop(LoopConfig(backoff=NO_JITTER), on_event=OpenTelemetrySink())

    async def flaky(errors: list[Exception]) -> str:
        await checkpoint()
        if errors:
            raise errors.pop()

        return "fine"

    result = await loop.run_single("flaky", flaky, [OSError()])
    assert result.unwrap() == "fine"
    assert not caplog.records
