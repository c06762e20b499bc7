"""Exceptions out of a user's plain functions: a cancellation that nothing asked for is their error too."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from agents import agent_for, double, each_batch, each_verb, run, run_into, run_until_stopped

from agentloop import (
    AgentLoop,
    Event,
    Invocation,
    InvocationCancelled,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    StartedEvent,
    Status,
    VerdictKind,
    classify,
)
from agentloop.testing import FakeAgent, FakeHTTPError


def cancelled() -> BaseException:
    """Make what the backend cancels with, as a future that was cancelled raises it."""
    cancelled_class = anyio.get_cancelled_exc_class()
    if cancelled_class is asyncio.CancelledError:
        return asyncio.CancelledError("from a callback")

    return cancelled_class._create(source="explicit")


KINDS = {
    "exception": lambda: KeyError("callback"),
    "cancellation": cancelled,
    "group": lambda: BaseExceptionGroup("all", [cancelled(), KeyError("callback")]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Bad:
    """A function that fails at its second call."""

    def __init__(self, kind: str, returns: Any = 1) -> None:
        self.make = KINDS[kind]
        self.returns = returns
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise self.make()

        return self.returns


def inputs_for(verb: str, agent: Any = double) -> Iterator[Invocation[Any]]:
    return Invocation.map(agent_for(verb, agent), range(4), "a")


@each_kind
@each_verb
@pytest.mark.parametrize("callback", ["cost", "key", "make"])
async def test_input_whose_cost_or_key_fails_is_an_error_alone(callback: str, verb: str, kind: str) -> None:
    bad = Bad(kind)
    if callback == "cost":
        limiter = Limiter(2, rates=[Rate(1000, cost=bad)])
    elif callback == "key":
        limiter = KeyedLimiter(bad, lambda key: Limiter(2))
    else:
        bad.calls = 1
        keys = iter("bcde")
        limiter = KeyedLimiter(lambda invocation: next(keys), lambda key: bad() and Limiter(2))

    with anyio.fail_after(60):
        results = await run(verb, AgentLoop(limiter=limiter), inputs_for(verb))

    assert sorted(str(result.status) for result in results) == ["error", "success", "success", "success"]
    [failed] = [result for result in results if not result.success]
    assert (failed.latency_ms, failed.retries, failed.failures) == (0, 0, ())
    if kind == "exception":
        assert isinstance(failed.exception, KeyError)
    else:
        assert isinstance(failed.exception, InvocationCancelled)
        assert failed.exception.__cause__ is not None

    assert limiter.statistics().running == limiter.statistics().waiting == 0


@each_kind
@each_verb
async def test_settle_that_fails_is_logged_and_changes_nothing(
    verb: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = AgentLoop(limiter=Limiter(2, rates=[Rate(1000, settle=Bad(kind))]))
    with anyio.fail_after(60):
        assert all(result.success for result in await run(verb, loop, inputs_for(verb)))

    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "settle=" in caplog.text


@each_kind
@each_verb
async def test_classify_that_fails_is_logged_once_and_its_failure_is_final(
    verb: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(exc: Exception) -> Any:
        raise KINDS[kind]()

    loop = AgentLoop(LoopConfig(classify=judge))
    with anyio.fail_after(60):
        results = await run(verb, loop, inputs_for(verb, FakeAgent(*map(OSError, range(4)))))

    assert [(result.status, result.retries) for result in results] == [(Status.ERROR, 0)] * 4
    assert all(isinstance(result.exception, OSError) for result in results)
    assert all("classify failed" in result.exception.__notes__[0] for result in results if result.exception)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "classify=" in caplog.text


@each_kind
@pytest.mark.parametrize(
    ("source", "verb"),
    # run_all() reads a generator to its end, and then there is nothing left to close.
    [
        *itertools.product(["agent_id", "generator"], ["run_all", "as_completed", "stream_all"]),
        ("close", "as_completed"),
        ("close", "stream_all"),
    ],
)
async def test_input_that_fails_raises_after_the_last_result(source: str, verb: str, kind: str) -> None:
    agent, fatal = agent_for(verb, double), agent_for(verb, FakeAgent(FakeHTTPError(401)))

    def generator() -> Iterator[Any]:
        try:
            yield ("a", agent, (1,), {})
            yield ("a", agent, (2,), {})
            if source == "generator":
                raise KINDS[kind]()

            yield ("a", fatal, (3,), {})
            yield from [("a", agent, (4,), {})] * 50
        finally:
            if source == "close":
                raise KINDS[kind]()

    inputs = generator() if source != "agent_id" else Invocation.map(agent, range(9), Bad(kind, "name"))
    results: list[Any] = []
    with anyio.fail_after(60), pytest.raises(KeyError if kind == "exception" else InvocationCancelled):
        await run_into(results, verb, AgentLoop(LoopConfig(max_concurrency=1)), inputs)

    if verb != "run_all":
        assert len(results) == {"agent_id": 1, "generator": 2, "close": 3}[source]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("callback", ["cost", "settle", "classify", "input", "close", "on_event"])
async def test_interrupt_out_of_a_callback_ends_the_batch(callback: str, kind: Any) -> None:
    def interrupt(*args: Any) -> Any:
        raise kind

    async def fatal(x: int) -> None:
        raise FakeHTTPError(401)

    def inputs() -> Iterator[Any]:
        try:
            yield ("a", FakeAgent(OSError()) if callback == "classify" else double, (1,), {})
            if callback == "input":
                interrupt()

            yield ("a", fatal, (1,), {})
            yield ("a", double, (1,), {})
        finally:
            if callback == "close":
                interrupt()

    rate = {callback: interrupt} if callback in ("cost", "settle") else {}
    config = LoopConfig(classify=interrupt if callback == "classify" else classify)
    limiter = Limiter(10, rates=[Rate(100, **rate)])

    def on_event(event: Event) -> None:
        if callback == "on_event" and isinstance(event, StartedEvent):
            interrupt()

    with pytest.raises(kind):
        async with AgentLoop(config, limiter=limiter, on_event=on_event).as_completed(inputs()) as results:
            async for _ in results:
                if callback == "close":
                    break

    assert limiter.statistics().running == 0


# -- functions that are not async


@each_batch
async def test_blocking_function_stops_the_batch_at_its_first_call(verb: str) -> None:
    calls = 0

    def blocking(x: int) -> int:
        nonlocal calls
        calls += 1
        return x

    loop = AgentLoop(LoopConfig(max_concurrency=10))
    results, stopped = await run_until_stopped(verb, loop, Invocation.map(blocking, range(500)))
    if verb == "run_all":
        assert len(results) == 500
        assert {result.status for result in results[1:]} == {Status.SKIPPED}

    error = stopped.__cause__
    assert calls == 1
    assert isinstance(error, TypeError)
    assert classify(error).kind is VerdictKind.FATAL
    assert error is results[0].exception
    assert "blocking" in str(error)


async def test_blocking_function_in_a_single_invocation_stops_nothing_else() -> None:
    loop = AgentLoop()
    result = await loop.run_single("a", lambda: 1)
    assert (result.status, result.retries) == (Status.ERROR, 0)
    assert (await loop.run_single("b", double, 1)).output == 2
