"""What a sink is told, and what the recorder makes of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from agents import agent_for, both_verbs, each_verb, nothing, run, run_stream
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    FirstChunkEvent,
    Invocation,
    InvocationResult,
    Limiter,
    LimitEvent,
    LoopConfig,
    MetricsRecorder,
    QueuedEvent,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    Verdict,
    VerdictKind,
)
from agentloop._metrics.measurements import REPORTS_AT_MOST
from agentloop._metrics.recorder import measurements_of
from agentloop._runtime import observer
from agentloop.testing import Fail, FakeAgent, FakeHTTPError, Reply

var: ContextVar[str] = ContextVar("var", default="nobody's")


def takes_a_second(*errors: Exception) -> FakeAgent:
    """Return an agent that fails with these errors first."""
    return FakeAgent(*(Fail(error, after_seconds=1) for error in errors), Reply("done", after_seconds=1))


async def words(*gaps: float) -> AsyncIterator[str]:
    for gap in gaps:
        await anyio.sleep(gap)
        yield "word"


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def loop(events: list[Event]) -> AgentLoop:
    config = LoopConfig(max_concurrency=1, backoff=Backoff(initial_seconds=0.5, jitter="none"))
    return AgentLoop(config, on_event=events.append)


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__.removesuffix("Event") for event in events]


# --- which events there are


async def test_invocation_is_queued_started_and_finished(loop: AgentLoop, events: list[Event]) -> None:
    start = anyio.current_time()
    result = await loop.run_single("a", takes_a_second())
    limit, queued, started, finished = events
    assert limit == LimitEvent(1, start)
    assert isinstance(queued, QueuedEvent)
    assert isinstance(started, StartedEvent)
    assert isinstance(finished, ResultEvent)
    assert queued.id == started.id == finished.id > 0
    assert queued.invocation is started.invocation is finished.invocation
    assert finished.result is result
    assert started.attempt == 1
    assert [event.at - start for event in (queued, started, finished)] == [0, 0, pytest.approx(1)]


async def test_retry_says_why_and_how_long_it_waits(loop: AgentLoop, events: list[Event]) -> None:
    error = FakeHTTPError(503)
    await loop.run_single("a", takes_a_second(error))
    assert kinds(events) == ["Limit", "Queued", "Started", "Retry", "Started", "Result"]
    retry, again = events[3:5]
    assert isinstance(retry, RetryEvent)
    assert isinstance(again, StartedEvent)
    assert (retry.attempt, again.attempt) == (1, 2)
    assert retry.error is error
    assert retry.verdict.kind is VerdictKind.TRANSIENT
    assert retry.delay_seconds == pytest.approx(0.5)
    assert again.at - retry.at == pytest.approx(0.5)


async def test_batch_tells_the_same_of_each_invocation(loop: AgentLoop, events: list[Event]) -> None:
    results = await loop.run_all([("a", takes_a_second(OSError()), (), {}), ("b", takes_a_second(), (), {})])
    by_id: dict[int, list[Event]] = {}
    for event in events[1:]:
        assert not isinstance(event, LimitEvent | StopEvent)
        by_id.setdefault(event.id, []).append(event)

    a, b = by_id.values()
    assert kinds(a) == ["Queued", "Started", "Retry", "Started", "Result"]
    assert kinds(b) == ["Queued", "Started", "Result"]
    assert [story[-1].result for story in (a, b)] == results


async def test_stream_has_one_first_chunk(loop: AgentLoop, events: list[Event]) -> None:
    start = anyio.current_time()
    async with loop.run_streaming("a", words, 2, 1, 1) as stream:
        assert [chunk async for chunk in stream] == ["word"] * 3

    assert kinds(events) == ["Limit", "Queued", "Started", "FirstChunk", "Result"]
    assert isinstance(events[3], FirstChunkEvent)
    assert events[3].at - start == pytest.approx(2)
    assert events[4].result is stream.result


async def test_fatal_verdict_stops_a_batch_and_says_why(loop: AgentLoop, events: list[Event]) -> None:
    results = await loop.run_all(
        [Invocation("a", takes_a_second(FakeHTTPError(401))), Invocation("b", takes_a_second())]
    )
    assert [result.status for result in results] == [Status.ERROR, Status.SKIPPED]
    assert kinds(events) == ["Limit", "Queued", "Started", "Stop", "Result", "Queued", "Result"]
    assert events[3].reason == "'a' failed with FakeHTTPError: HTTP 401"


async def test_limit_is_told_as_a_run_begins_and_when_it_changes(events: list[Event]) -> None:
    limiter = Limiter(3)
    loop = AgentLoop(limiter=limiter, on_event=events.append)
    limiter.max_concurrency = 4
    assert not events
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "a", anyio.sleep, 2)
        await anyio.sleep(1)
        limiter.max_concurrency = 2

    limits = [event for event in events if isinstance(event, LimitEvent)]
    assert [event.limit for event in limits] == [4, 2]
    assert limits[1].at == pytest.approx(anyio.current_time() - 1)


async def test_limiter_does_not_keep_a_loop_alive_for_its_sink(events: list[Event]) -> None:
    limiter = Limiter(3)
    await AgentLoop(limiter=limiter, on_event=lambda event: events.append(event)).run_single("a", checkpoint)
    del events[:]
    limiter.max_concurrency = 2
    assert not events


async def test_cancelled_caller_makes_a_last_event(loop: AgentLoop, events: list[Event]) -> None:
    with anyio.move_on_after(0.5):
        await loop.run_single("a", takes_a_second())

    assert kinds(events) == ["Limit", "Queued", "Started", "Result"]
    assert events[-1].result.status is Status.CANCELLED


async def test_view_shares_the_sink(loop: AgentLoop, events: list[Event]) -> None:
    await loop.with_config(timeout_seconds=1, max_retries=0).run_single("a", anyio.sleep, 9)
    assert kinds(events) == ["Limit", "Queued", "Started", "Result"]


# --- the sink


async def test_started_event_is_told_in_the_context_of_the_agent() -> None:
    seen: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StartedEvent):
            seen.append(var.get())
            var.set(f"{event.invocation.agent_id}, attempt {event.attempt}")

    async def agent(*errors: Exception) -> str:
        await checkpoint()
        failing.append(var.get())
        if len(failing) == 1:
            raise OSError

        return var.get()

    failing: list[str] = []
    var.set("the caller's")
    loop = AgentLoop(on_event=on_event)
    assert (await loop.run_single("a", agent)).output == "a, attempt 2"
    results = await loop.run_all([Invocation(name, agent) for name in "bc"])
    assert [result.output for result in results] == ["b, attempt 1", "c, attempt 1"]
    assert (failing[0], seen) == ("a, attempt 1", ["the caller's"] * 4)
    assert var.get() == "the caller's"


async def test_several_sinks_are_told_in_turn() -> None:
    told: list[tuple[str, type[Event]]] = []
    sinks = (lambda event, name=name: told.append((name, type(event))) for name in "ab")
    loop = AgentLoop(on_event=sinks)
    await loop.with_config(max_retries=0).run_single("a", takes_a_second())
    assert told == [
        (name, kind) for kind in (LimitEvent, QueuedEvent, StartedEvent, ResultEvent) for name in "ab"
    ]


async def test_sinks_that_raise_harm_nothing_and_are_each_logged_once(
    caplog: pytest.LogCaptureFixture, events: list[Event]
) -> None:
    def first(event: Event) -> None:
        raise ValueError("the first")

    def second(event: Event) -> None:
        raise ValueError("the second")

    loop = AgentLoop(on_event=[first, second, events.append])
    with caplog.at_level(logging.DEBUG, "agentloop"):
        results = await loop.run_all([Invocation("a", checkpoint)] * 5)

    assert [result.status for result in results] == [Status.SUCCESS] * 5
    assert [type(event) for event in events].count(ResultEvent) == 5
    told = [record.getMessage() for record in caplog.records]
    assert ["first" in told[0], "second" in told[1], len(told)] == [True, True, 2]
    assert all("on_event=<function" in text for text in told)
    assert "ValueError: the first" in caplog.text


async def test_no_sink_at_all_may_be_given_as_an_empty_list() -> None:
    assert (await AgentLoop(on_event=[]).run_single("a", checkpoint)).success


@each_verb
async def test_cancellation_that_a_sink_raises_is_its_error(
    verb: str, caplog: pytest.LogCaptureFixture, events: list[Event]
) -> None:
    cancelled = asyncio.CancelledError()
    errors = [cancelled, BaseExceptionGroup("", [BaseExceptionGroup("", [cancelled, KeyError()])])]
    for error in errors:

        def on_event(event: Event, error: BaseException = error) -> None:
            raise error

        loop = AgentLoop(on_event=[on_event, events.append])
        [result] = await run(verb, loop, [Invocation("a", agent_for(verb, checkpoint))])
        assert result.success

    assert [type(event) for event in events].count(ResultEvent) == len(caplog.records) == len(errors)


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), SystemExit(), BaseExceptionGroup("", [KeyError(), SystemExit()])]
)
def test_interrupt_leaves_a_sink(interrupt: BaseException) -> None:
    def on_event(event: Event) -> None:
        raise interrupt

    with pytest.raises(type(interrupt)):
        observer.Sink([on_event])(LimitEvent(1))


def test_error_of_a_sink_that_cannot_even_be_logged_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RecursionError

    def on_event(event: Event) -> None:
        raise ValueError("the sink")

    monkeypatch.setattr(observer._logger, "exception", refuse)
    observer.Sink([on_event])(LimitEvent(1))


def test_coroutine_that_a_sink_returns_is_its_error(caplog: pytest.LogCaptureFixture) -> None:
    async def tell(event: Event) -> None:
        pass

    observer.Sink([lambda event: tell(event)])(LimitEvent(1))
    assert "TypeError: on_event must be a plain function, and this one returned <coroutine" in caplog.text


async def test_nothing_is_built_without_a_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    for name in ("QueuedEvent", "StartedEvent", "RetryEvent", "FirstChunkEvent", "ResultEvent", "StopEvent"):
        monkeypatch.setattr(observer, name, refuse)

    loop = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=0.01)))
    assert (await loop.run_single("a", takes_a_second(OSError()))).retries == 1
    async with loop.run_streaming("a", words, 1) as stream:
        assert [chunk async for chunk in stream] == ["word"]

    await loop.run_all([Invocation("a", takes_a_second(FakeHTTPError(401)))] * 2)


@pytest.mark.parametrize(
    "on_event",
    [5, "print", b"print", anyio.sleep, [print, 5], [print, anyio.sleep], {"print": print}],
    ids=["5", "a str", "bytes", "an async function", "a list with 5", "a list with an async one", "a dict"],
)
def test_sink_that_is_no_plain_function_is_refused(on_event: Any) -> None:
    with pytest.raises(TypeError, match=r"^on_event must be a plain function, got "):
        AgentLoop(on_event=on_event)


# --- what the recorder is told


async def test_attempts_waits_and_overloads_are_recorded(loop: AgentLoop) -> None:
    await loop.run_single("a", takes_a_second(FakeHTTPError(429), OSError()))
    await loop.run_single("b", takes_a_second())
    # One that is not retried counts too.
    await loop.with_config(max_retries=0).run_single("a", takes_a_second(FakeHTTPError(429)))
    now, second = loop.metrics.snapshot(), pytest.approx(1000)
    assert (now.retries, now.overloads, now.in_flight) == (2, 2, 0)
    assert (now.attempt.count, now.attempt.min_ms, now.attempt.max_ms) == (5, second, second)
    assert (now.backoff.count, now.backoff.sum_ms) == (2, pytest.approx(1500))
    assert (now.latency.count, now.latency.max_ms) == (3, pytest.approx(4500))


async def test_attempts_of_what_ends_while_it_waits_to_be_retried_are_recorded(loop: AgentLoop) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "a", takes_a_second(OSError(), OSError()))
        await anyio.sleep(3)
        group.cancel_scope.cancel()

    now = loop.metrics.snapshot()
    assert now.counts[Status.CANCELLED] == 1
    assert (now.attempt.count, now.attempt.sum_ms) == (2, pytest.approx(2000))


async def test_in_flight_is_what_was_started_and_has_not_ended(loop: AgentLoop) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", takes_a_second())] * 3)
        await anyio.sleep(0.5)
        assert loop.metrics.snapshot().in_flight == 1
        loop.reset_metrics()
        assert loop.metrics.snapshot().in_flight == 1

    assert loop.metrics.snapshot().in_flight == 0


async def test_time_to_the_first_chunk_and_between_chunks_is_recorded(loop: AgentLoop) -> None:
    await run_stream(loop, words, 3, 1, 2)
    now = loop.metrics.snapshot()
    gaps = now.chunk_gap
    assert (now.first_chunk.count, now.first_chunk.max_ms) == (1, pytest.approx(3000))
    assert (gaps.count, gaps.min_ms, gaps.max_ms) == (2, pytest.approx(1000), pytest.approx(2000))


async def test_time_that_a_reader_takes_is_in_no_gap(loop: AgentLoop) -> None:
    async with loop.run_streaming("a", words, *[0.25] * 40) as stream:
        async for _ in stream:
            await anyio.sleep(1)

    gaps = loop.metrics.snapshot().chunk_gap
    assert (gaps.count, gaps.max_ms) == (39, pytest.approx(250))


async def test_gap_after_every_chunk_of_a_long_stream_is_recorded(loop: AgentLoop) -> None:
    chunks, _, _ = await run_stream(loop, words, *[0.25] * 300, *[0.5] * 301)
    assert len(chunks) == 601
    gaps = loop.metrics.snapshot().chunk_gap
    assert (gaps.count, gaps.sum_ms) == (600, pytest.approx(250 * 299 + 500 * 301))


async def test_nothing_is_recorded_where_metrics_are_off(loop: AgentLoop) -> None:
    quiet = loop.with_config(collect_metrics=False)
    await quiet.run_single("a", takes_a_second(FakeHTTPError(429)))
    async with quiet.run_streaming("a", words, 1, 1) as stream:
        assert [chunk async for chunk in stream] == ["word"] * 2

    await quiet.run_all([Invocation("a", checkpoint)] * observer.COUNTED_AT_ONCE)
    assert loop.metrics.snapshot() == AgentLoop().metrics.snapshot()


async def test_single_invocations_are_all_counted(loop: AgentLoop) -> None:
    for _ in range(observer.COUNTED_AT_ONCE + 1):
        await loop.run_single("a", checkpoint)

    assert loop.metrics.snapshot().counts[Status.SUCCESS] == observer.COUNTED_AT_ONCE + 1


@both_verbs
@pytest.mark.parametrize("settings", [{}, {"max_retries": 1}], ids=["loop", "views"])
async def test_recorder_keeps_no_figures_of_many_small_batches(verb: str, settings: dict[str, Any]) -> None:
    loop = AgentLoop()
    for _ in range(300):
        await run(verb, loop.with_config(**settings) if settings else loop, [Invocation("a", nothing)] * 10)

    assert len(measurements_of(loop.metrics)._latencies_reported) < observer.COUNTED_AT_ONCE
    assert loop.metrics.snapshot().counts[Status.SUCCESS] == 3000


async def test_recorder_that_goes_its_own_way_with_results_is_told_no_more_than_it_counts() -> None:
    class Other(MetricsRecorder):
        """Keeps nothing of the results."""

        def record(self, result: InvocationResult[Any]) -> None:
            pass

    recorder = Other()
    loop = AgentLoop(metrics=recorder)
    await loop.run_all(Invocation.map(anyio.sleep, [0] * 3000))
    assert len(measurements_of(recorder)._in_flight_reported) <= 2 * REPORTS_AT_MOST
    assert recorder.snapshot().in_flight == 0


def test_retry_says_in_one_line_what_the_attempt_raised() -> None:
    retry = RetryEvent(
        Invocation("a", checkpoint), 1, ValueError("two\nlines"), Verdict(VerdictKind.TRANSIENT), 1
    )
    assert retry.reason == "ValueError: two lines"
