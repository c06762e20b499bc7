"""A loop that is drained: what ends, what goes on, and what comes too late."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from elsewhere import in_use_elsewhere

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Event,
    Invocation,
    InvocationResult,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    Status,
    StopEvent,
)

SLOW_RETRY = Backoff(initial_seconds=20, jitter="none")


async def agent(seconds: float) -> float:
    await anyio.sleep(seconds)
    return seconds


async def stream(seconds: float) -> AsyncIterator[float]:
    for part in range(2):
        await anyio.sleep(seconds)
        yield part


async def fail(seconds: float = 1) -> None:
    await anyio.sleep(seconds)
    raise OSError("again")


async def collect(loop: AgentLoop, verb: str, seconds: list[float]) -> tuple[list[Any], BatchStopped | None]:
    """Run a batch of each verb, and return its results in the order of the input, and what it raised."""
    results: list[InvocationResult[Any]] = []
    inputs = [Invocation("a", stream if verb == "stream_all" else agent, (each,)) for each in seconds]
    try:
        if verb == "run_all":
            return await loop.run_all(inputs), None

        if verb == "as_completed":
            async with loop.as_completed(inputs) as completed:
                async for result in completed:
                    results.append(result)
        else:
            async with loop.stream_all(inputs) as events:
                async for event in events:
                    if not isinstance(event, ChunkEvent):
                        results.append(event.result)
    except BatchStopped as exc:
        return sorted(results, key=lambda result: result.index), exc

    return sorted(results, key=lambda result: result.index), None


async def drained_at(
    seconds: float, loop: AgentLoop, call: Callable[[], Any], entered: bool = False, **options: Any
) -> Any:
    """Make a call, drain the loop meanwhile, and return what the call has returned."""
    returned: list[Any] = []

    async def make() -> None:
        returned.append(await call())

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(make)
            await anyio.sleep(seconds)
            loop.drain(**options)

    if entered:
        async with loop:
            await run()
    else:
        await run()

    return returned[0]


entered_or_not = pytest.mark.parametrize("entered", [False, True], ids=["outside", "entered"])


@entered_or_not
@pytest.mark.parametrize("verb", ["run_all", "as_completed", "stream_all"])
async def test_batch_ends_with_what_runs(verb: str, entered: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    begin = anyio.current_time()
    results, raised = await drained_at(1, loop, lambda: collect(loop, verb, [3, 4, 5, 6]), entered)
    longest = 8 if verb == "stream_all" else 4
    assert anyio.current_time() == begin + longest
    ended = [result.status for result in results]
    assert ended[:2] == [Status.SUCCESS] * 2
    assert set(ended[2:]) <= {Status.SKIPPED}
    assert len(ended) == 4 or verb != "run_all"
    if verb != "run_all":
        assert raised is not None
        assert raised.reason == "drained"
    else:
        assert {id(result.exception) for result in results[2:]} == {id(results[2].exception)}
        assert str(results[2].exception) == "the batch was stopped: drained"


@entered_or_not
@pytest.mark.parametrize("verb", ["run_all", "as_completed", "stream_all"])
@pytest.mark.parametrize(("grace", "took"), [(0, 1), (2, 3)])
async def test_what_runs_is_cancelled_when_the_grace_is_over(
    verb: str, grace: float, took: float, entered: bool
) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    begin = anyio.current_time()
    call = lambda: collect(loop, verb, [50, 60, 70])  # noqa: E731  # the one that is drained
    results, _ = await drained_at(1, loop, call, entered, reason="night over", grace_seconds=grace)
    assert anyio.current_time() == begin + took
    assert [result.status for result in results[:2]] == [Status.CANCELLED] * 2
    assert results[0].error == "InvocationCancelled: night over"


@entered_or_not
async def test_single_invocation_that_runs_ends(entered: bool) -> None:
    loop = AgentLoop()
    result = await drained_at(1, loop, lambda: loop.run_single("a", agent, 3), entered)
    assert result.output == 3


@entered_or_not
@pytest.mark.parametrize(("grace", "status", "took"), [(2, Status.CANCELLED, 3), (9, Status.TIMEOUT, 5)])
async def test_single_invocation_is_cancelled_when_the_grace_is_over(
    grace: float, status: Status, took: float, entered: bool
) -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=5, max_retries=0))
    begin = anyio.current_time()
    call = lambda: loop.run_single("a", agent, 50)  # noqa: E731  # the one that is drained
    result = await drained_at(1, loop, call, entered, grace_seconds=grace)
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

        result = await drained_at(1, loop, lambda: loop.run_single("a", agent, 3), entered)
        assert result.status is Status.SKIPPED
        assert isinstance(result.exception, BatchStopped)

    # The loop beside it goes on.
    limiter.resume()
    if held != "rate":
        assert (await other.run_single("b", agent, 1)).output == 1


@entered_or_not
@pytest.mark.parametrize("verb", ["single", "batch"])
@pytest.mark.parametrize("at", [0.5, 5], ids=["while it runs", "while it waits to be retried"])
async def test_failure_is_final_and_says_why(verb: str, at: float, entered: bool) -> None:
    loop = AgentLoop(LoopConfig(backoff=SLOW_RETRY))
    begin = anyio.current_time()

    async def batch() -> Any:
        return (await loop.run_all([Invocation("a", fail)]))[0]

    call = batch if verb == "batch" else lambda: loop.run_single("a", fail)
    result = await drained_at(at, loop, call, entered)
    assert anyio.current_time() - begin == max(at, 1)
    assert (result.error, result.retries) == ("OSError: again", 0)
    assert result.exception.__notes__ == ["not retried: the batch was stopped: drained"]


@entered_or_not
async def test_open_stream_is_read_to_its_end(entered: bool) -> None:
    loop = AgentLoop()

    async def read() -> Any:
        async with loop.run_streaming("a", stream, 3) as chunks:
            return [chunk async for chunk in chunks]

    assert await drained_at(1, loop, read, entered) == [0, 1]


@entered_or_not
async def test_stream_is_cancelled_when_the_grace_is_over(entered: bool) -> None:
    loop = AgentLoop()
    opened: list[Any] = []

    async def read() -> None:
        async with loop.run_streaming("a", stream, 30) as chunks:
            opened.append(chunks)
            with pytest.raises(Exception, match="drained"):
                [_ async for _ in chunks]

    begin = anyio.current_time()
    await drained_at(1, loop, read, entered, grace_seconds=40)
    assert anyio.current_time() == begin + 41
    assert opened[0].result.status is Status.CANCELLED
    assert opened[0].result.chunks == 1


@entered_or_not
async def test_nested_work_of_what_runs_is_done_whole(entered: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def outer() -> Any:
        inner = await loop.run_all([Invocation("inner", agent, (each,)) for each in (2, 3)])
        single = await loop.run_single("single", agent, 4)
        async with loop.run_streaming("stream", stream, 1) as chunks:
            return [*(result.output for result in inner), single.output, [chunk async for chunk in chunks]]

    batch = lambda: loop.run_all([Invocation("outer", outer)] * 2)  # noqa: E731  # the one that is drained
    first, second = await drained_at(1, loop, batch, entered)
    assert first.output == [2, 3, 4, [0, 1]]
    assert second.status is Status.SKIPPED


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

    async def run() -> Any:
        with pytest.raises(BatchStopped) as caught:
            await loop.run_all(inputs())

        return caught.value.results

    results = await drained_at(7, loop, run, entered)
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
        results, raised = await collect(loop, verb, [5, 5])
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
        call = lambda: loop.run_all([Invocation("a", agent, (50,))] * 2)  # noqa: E731  # drained
        results = await drained_at(1, loop, call, reason="first", grace_seconds=30)

    assert anyio.current_time() == begin + 3
    assert results[1].error == "BatchStopped: the batch was stopped: first"


async def test_each_batch_tells_that_it_stops() -> None:
    events: list[Event] = []
    loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=events.append)
    await drained_at(1, loop, lambda: loop.run_all([Invocation("a", agent, (3,))] * 2), reason="night over")
    assert [event.reason for event in events if isinstance(event, StopEvent)] == ["night over"]


@pytest.mark.parametrize("verb", ["run_all", "as_completed"])
async def test_key_function_that_drains_the_loop_and_raises_fails_its_own_input(verb: str) -> None:
    def by(invocation: Invocation[Any]) -> str:
        loop.drain()
        raise LookupError("no key")

    loop = AgentLoop(limiter=KeyedLimiter(by, lambda _: Limiter(1)))
    results, _ = await collect(loop, verb, [1, 1])
    assert isinstance(results[0].exception, LookupError)
    assert [result.status for result in results[1:]] in ([], [Status.SKIPPED])


async def test_agent_can_drain_the_loop_that_runs_it() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def drain() -> str:
        loop.drain()
        return "done"

    results = await loop.run_all([Invocation("a", drain)] * 2)
    assert [result.status for result in results] == [Status.SUCCESS, Status.SKIPPED]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
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
