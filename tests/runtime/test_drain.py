"""A loop that is drained: what ends, what goes on, and what comes too late."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from agents import (
    backends,
    both_verbs,
    each_batch,
    entered_or_not,
    run,
    run_stream,
    run_until_stopped,
    within,
)
from elsewhere import in_use_elsewhere

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Event,
    Invocation,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    Status,
    StopEvent,
)
from agentloop.testing import Fail, FakeAgent


async def agent(seconds: float) -> float:
    await anyio.sleep(seconds)
    return seconds


async def stream(seconds: float) -> AsyncIterator[float]:
    for part in range(2):
        await anyio.sleep(seconds)
        yield part


def jobs(verb: str, seconds: list[float]) -> list[Invocation[Any]]:
    return [Invocation("a", stream if verb == "stream_all" else agent, (each,)) for each in seconds]


async def drained_at(
    seconds: float,
    loop: AgentLoop,
    call: Callable[..., Any],
    *args: Any,
    entered: bool = False,
    **options: Any,
) -> Any:
    """Make a call, drain the loop meanwhile, and return what the call has returned."""
    returned: list[Any] = []

    async def make() -> None:
        returned.append(await call(*args))

    async with within(loop, entered), anyio.create_task_group() as group:
        group.start_soon(make)
        await anyio.sleep(seconds)
        loop.drain(**options)

    return returned[0]


@entered_or_not
@each_batch
async def test_batch_ends_with_what_runs(verb: str, entered: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    begin = anyio.current_time()
    call = verb, loop, jobs(verb, [3, 4, 5, 6])
    results, stopped = await drained_at(1, loop, run_until_stopped, *call, entered=entered)
    longest = 8 if verb == "stream_all" else 4
    assert anyio.current_time() == begin + longest
    ended = [result.status for result in results]
    assert ended[:2] == [Status.SUCCESS] * 2
    assert set(ended[2:]) <= {Status.SKIPPED}
    assert len(ended) == 4 or verb != "run_all"
    assert stopped.reason == "drained"
    assert {id(result.exception) for result in results[2:]} <= {id(stopped)}
    assert str(stopped) == "the batch was stopped: drained"


@entered_or_not
@each_batch
@pytest.mark.parametrize(("grace", "took"), [(0, 1), (2, 3)])
async def test_running_agents_are_cancelled_when_the_grace_is_over(
    verb: str, grace: float, took: float, entered: bool
) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    begin = anyio.current_time()
    call, options = (verb, loop, jobs(verb, [50, 60, 70])), {"reason": "night over", "grace_seconds": grace}
    results, _ = await drained_at(1, loop, run_until_stopped, *call, entered=entered, **options)
    assert anyio.current_time() == begin + took
    assert [result.status for result in results[:2]] == [Status.CANCELLED] * 2
    assert results[0].error == "InvocationCancelled: night over"


@entered_or_not
@pytest.mark.parametrize(
    ("seconds", "grace", "status", "took"),
    [(3, None, Status.SUCCESS, 3), (50, 2, Status.CANCELLED, 3), (50, 9, Status.TIMEOUT, 5)],
)
async def test_single_invocation_ends_by_itself_or_with_the_grace(
    seconds: float, grace: float | None, status: Status, took: float, entered: bool
) -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=5, max_retries=0))
    begin = anyio.current_time()
    call = loop.run_single, "a", agent, seconds
    result = await drained_at(1, loop, *call, entered=entered, grace_seconds=grace)
    assert (result.status, anyio.current_time() - begin) == (status, took)


@entered_or_not
@pytest.mark.parametrize("held", ["busy", "paused", "rate"])
async def test_single_invocation_that_waits_is_skipped(held: str, entered: bool) -> None:
    limiter = Limiter(1, rates=[Rate(1, per_seconds=1000)] if held == "rate" else [])
    if held == "paused":
        limiter.pause()

    other, loop = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        if held != "paused":
            group.start_soon(other.run_single, "other", agent, 10 if held == "busy" else 0)
            await anyio.sleep(0.5)

        result = await drained_at(1, loop, loop.run_single, "a", agent, 3, entered=entered)
        assert result.status is Status.SKIPPED
        assert isinstance(result.exception, BatchStopped)

    # The loop beside it goes on.
    limiter.resume()
    if held != "rate":
        assert (await other.run_single("b", agent, 1)).output == 1


@entered_or_not
@pytest.mark.parametrize("verb", ["run_single", "run_all"])
@pytest.mark.parametrize("at", [0.5, 5], ids=["while it runs", "while it waits to be retried"])
async def test_failure_is_final_and_says_why(verb: str, at: float, entered: bool) -> None:
    loop = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=20, jitter="none")))
    begin = anyio.current_time()
    fails = Invocation("a", FakeAgent(Fail(OSError("again"), after_seconds=1)))
    [result] = await drained_at(at, loop, run, verb, loop, [fails], entered=entered)
    assert anyio.current_time() - begin == max(at, 1)
    assert (result.error, result.retries) == ("OSError: again", 0)
    assert result.exception.__notes__ == ["not retried: the batch was stopped: drained"]


@entered_or_not
@pytest.mark.parametrize(
    ("seconds", "grace", "chunks", "status", "took"),
    [(3, None, 2, Status.SUCCESS, 6), (30, 40, 1, Status.CANCELLED, 41)],
)
async def test_open_stream_is_read_to_its_end_or_to_that_of_the_grace(
    seconds: float, grace: float | None, chunks: int, status: Status, took: float, entered: bool
) -> None:
    loop = AgentLoop()
    begin = anyio.current_time()
    call = loop, stream, seconds
    got, error, result = await drained_at(1, loop, run_stream, *call, entered=entered, grace_seconds=grace)
    assert anyio.current_time() == begin + took
    assert (got, result.status, result.chunks) == ([0, 1][:chunks], status, chunks)
    assert error is None or "drained" in str(error)


@entered_or_not
async def test_nested_work_of_what_runs_is_done_whole(entered: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def outer() -> Any:
        inner = await loop.run_all([Invocation("inner", agent, (each,)) for each in (2, 3)])
        single = await loop.run_single("single", agent, 4)
        async with loop.run_streaming("stream", stream, 1) as chunks:
            return [*(result.output for result in inner), single.output, [chunk async for chunk in chunks]]

    inputs = [Invocation("outer", outer)] * 2
    first, second = await drained_at(1, loop, loop.run_all, inputs, entered=entered)
    assert (first.output, second.status) == ([2, 3, 4, [0, 1]], Status.SKIPPED)


@entered_or_not
async def test_async_input_without_an_end_is_closed(entered: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    closed = False

    async def inputs() -> AsyncIterator[Any]:
        nonlocal closed
        try:
            while True:
                yield Invocation("a", agent, (2,))
                await anyio.sleep(3)
        finally:
            closed = True

    call = run_until_stopped, "run_all", loop, inputs()
    results, stopped = await drained_at(7, loop, *call, entered=entered)
    assert stopped is not None
    assert closed
    assert [result.output for result in results] == [2, 2, 2]


async def test_later_calls_are_skipped_at_once() -> None:
    loop = AgentLoop()
    loop.drain("maintenance")
    begin = anyio.current_time()
    assert (await loop.run_single("a", agent, 5)).error == "BatchStopped: the batch was stopped: maintenance"
    results = await loop.run_all([Invocation("a", agent, (5,))] * 3)
    assert [result.status for result in results] == [Status.SKIPPED] * 3
    for verb in ("as_completed", "stream_all"):
        results, raised = await run_until_stopped(verb, loop, jobs(verb, [5, 5]))
        assert results == []
        assert raised is not None

    with pytest.raises(BatchStopped, match="maintenance"):
        async with loop.run_streaming("a", stream, 5):
            pass

    assert anyio.current_time() == begin


async def test_views_are_drained_too_and_other_loops_are_not() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    view, other = loop.with_config(max_retries=1), AgentLoop(limiter=loop.limiter)
    view.drain()
    assert (await loop.run_single("a", agent, 1)).status is Status.SKIPPED
    assert (await other.run_single("a", agent, 1)).status is Status.SUCCESS


async def test_first_reason_holds_and_the_shorter_grace() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    begin = anyio.current_time()

    async def drain_again() -> None:
        await anyio.sleep(2)
        loop.drain("second", grace_seconds=1)
        loop.drain("third", grace_seconds=100)

    async with anyio.create_task_group() as group:
        group.start_soon(drain_again)
        call = loop.run_all, jobs("run_all", [50, 50])
        results = await drained_at(1, loop, *call, reason="first", grace_seconds=30)

    assert anyio.current_time() == begin + 3
    assert results[1].error == "BatchStopped: the batch was stopped: first"


async def test_each_batch_tells_that_it_stops() -> None:
    events: list[Event] = []
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=events.append)
    await drained_at(1, loop, loop.run_all, jobs("run_all", [3, 3]), reason="night over")
    assert [event.reason for event in events if isinstance(event, StopEvent)] == ["night over"]


@both_verbs
async def test_key_function_that_drains_the_loop_and_raises_fails_its_own_input(verb: str) -> None:
    def by(invocation: Invocation[Any]) -> str:
        loop.drain()
        raise LookupError("no key")

    loop = AgentLoop(limiter=KeyedLimiter(by, lambda _: Limiter(1)))
    results, _ = await run_until_stopped(verb, loop, jobs(verb, [1, 1]))
    assert isinstance(results[0].exception, LookupError)
    assert [result.status for result in results[1:]] in ([], [Status.SKIPPED])


async def test_agent_can_drain_the_loop_that_runs_it() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def drain() -> str:
        loop.drain()
        return "done"

    results = await loop.run_all([Invocation("a", drain)] * 2)
    assert [result.status for result in results] == [Status.SUCCESS, Status.SKIPPED]


@backends
def test_loop_that_runs_in_another_thread_is_not_drained_from_here(backend: str) -> None:
    loop = AgentLoop()
    with in_use_elsewhere(loop, backend):
        assert threading.current_thread() is threading.main_thread()
        with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
            loop.drain()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reason": 5}, TypeError, "reason must be of type str, got 5"),
        ({"grace_seconds": -1}, ValueError, "grace_seconds must be at least 0"),
        ({"grace_seconds": "5"}, TypeError, "grace_seconds must be a number or None"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    loop = AgentLoop()
    with pytest.raises(error, match=message):
        loop.drain(**options)

    async def main() -> Status:
        return (await loop.run_single("a", agent, 0)).status

    assert anyio.run(main) is Status.SUCCESS
