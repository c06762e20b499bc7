"""run_streaming: what an agent yields, read while it runs."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import anyio
import pytest
from agents import (
    backends,
    count,
    count_at_once,
    double,
    entered_or_not,
    make_loop,
    one_a_second,
    read,
    run,
    run_scheduled,
    run_stream,
    stray_cancellation,
    within,
)
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    AgentStream,
    Backoff,
    FirstChunkTimeout,
    IdleTimeout,
    Invocation,
    InvocationCancelled,
    InvocationTimeout,
    Status,
)
from agentloop._stream.channel import BUFFER, LOW
from agentloop.testing import Chunks, Fail, FakeAgent, FakeHTTPError, Reply, Stall

# Streams that end in no way of their own: with no chunk, and with one.
STALLED, STALLS = Chunks(then=Stall()), Chunks([0], after_seconds=1, then=Stall())


each_count = pytest.mark.parametrize("agent", [count, count_at_once, one_a_second])


# -- chunks


@each_count
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 200])
async def test_chunks_arrive_in_order_and_all_of_them(agent: Any, size: int) -> None:
    chunks, error, result = await run_stream(make_loop(max_concurrency=1), agent, size)
    assert (chunks, error) == (list(range(size)), None)
    assert (result.status, result.output, result.exception) == (Status.SUCCESS, None, None)
    assert (result.chunks, result.retries, result.failures, result.index) == (size, 0, (), 0)
    assert (result.first_chunk_ms is None) == (size == 0)


async def test_arguments_reach_the_agent() -> None:
    async def agent(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        yield args
        yield kwargs

    async with AgentLoop().run_streaming("a", agent, 1, 2, agent_id="b", stream_fn="c") as stream:
        assert (await read(stream))[0] == [(1, 2), {"agent_id": "b", "stream_fn": "c"}]


async def test_chunks_of_every_type_are_carried() -> None:
    values = [None, False, StopAsyncIteration(), (), ValueError("data"), anyio.EndOfStream()]
    chunks, error, _ = await run_stream(AgentLoop(), FakeAgent(Chunks(values)))
    assert (chunks, error) == (values, None)


async def test_end_is_told_each_time_anew() -> None:
    async with AgentLoop().run_streaming("a", count, 2) as stream:
        assert [chunk async for chunk in stream] == [0, 1]
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(stream)


async def test_two_readers_share_the_chunks() -> None:
    seen: list[int] = []
    async with AgentLoop().run_streaming("a", one_a_second, 50) as stream:

        async def reader() -> None:
            async for chunk in stream:
                seen.append(chunk)

        async with anyio.create_task_group() as group:
            group.start_soon(reader)
            group.start_soon(reader)

    assert seen == list(range(50))


async def test_result_says_when_it_began_and_how_long_it_took() -> None:
    loop = make_loop(max_concurrency=1)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "hog", anyio.sleep, 4)
        await anyio.wait_all_tasks_blocked()
        _, _, result = await run_stream(loop, FakeAgent(Chunks([1, 2], after_seconds=2, gap_seconds=3)))

    assert (result.agent_id, result.queue_ms) == ("a", pytest.approx(4000))
    assert result.latency_ms == pytest.approx(5000)
    assert result.first_chunk_ms == pytest.approx(2000)


# -- backpressure


@pytest.mark.parametrize("agent", [count, count_at_once])
async def test_agent_is_no_more_than_the_buffer_ahead_of_its_reader(agent: Any) -> None:
    produced = 0

    async def watched() -> AsyncGenerator[int]:
        nonlocal produced
        async for chunk in agent(100):
            produced += 1
            yield chunk

    async with AgentLoop().run_streaming("a", watched) as stream:
        await anyio.wait_all_tasks_blocked()
        assert produced == BUFFER
        taken = 0
        async for _ in stream:
            taken += 1
            await anyio.wait_all_tasks_blocked()
            assert produced <= taken + BUFFER
            assert produced >= min(100, taken + LOW)

    assert produced == 100


async def test_slow_reader_slows_the_agent() -> None:
    times = []

    async def agent() -> AsyncGenerator[int]:
        for i in range(40):
            yield i
            times.append(anyio.current_time())

    start = anyio.current_time()
    async with AgentLoop().run_streaming("a", agent) as stream:
        async for _ in stream:
            await anyio.sleep(1)

    # The agent goes on when few are left: the first is read at once, each other one a second later.
    assert times[15] - start == pytest.approx(BUFFER - LOW - 1)
    assert times[-1] - start > 20


# -- slots


async def test_slot_is_held_while_the_agent_runs_and_given_back_when_it_has_ended() -> None:
    loop = make_loop(max_concurrency=1)
    async with loop.run_streaming("a", one_a_second, 3) as stream:
        assert (await anext(stream)) == 0
        assert loop.statistics().running == 1
        with anyio.move_on_after(0.5) as scope:
            await loop.run_single("b", double, 1)

        assert scope.cancelled_caught
        await anyio.sleep(5)
        # Not when it was read to its end.
        assert loop.statistics().running == 0
        assert (await loop.run_single("b", double, 1)).output == 2
        assert (await read(stream))[0] == [1, 2]


async def test_slot_is_not_held_while_waiting_to_be_retried() -> None:
    loop = make_loop(max_concurrency=1, max_retries=1)
    async with loop.run_streaming("a", FakeAgent(OSError(), Chunks([2]))) as stream:
        await anyio.wait_all_tasks_blocked()
        assert (loop.statistics().running, loop.statistics().waiting) == (0, 1)
        assert (await loop.run_single("b", double, 1)).output == 2
        assert (await read(stream))[0] == [2]


async def test_no_more_streams_than_the_limit_run() -> None:
    agent, loop = FakeAgent(Chunks(range(30), gap_seconds=0.1)), make_loop(max_concurrency=3)
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(run_stream, loop, agent)

    assert (len(agent.calls), agent.peak) == (10, 3)


async def run_nested(verb: str, loop: AgentLoop) -> bool:
    """Run others, and return whether all is well."""
    if verb == "left early":
        async with loop.run_streaming("child", count, 50) as stream:
            return await anext(stream) == 0

    agent = count if "stream" in verb else double
    return all(result.success for result in await run(verb, loop, Invocation.map(agent, [20, 30])))


each_nested = pytest.mark.parametrize(
    "nested", ["run_single", "run_all", "as_completed", "run_streaming", "stream_all", "left early"]
)


@entered_or_not
@each_nested
async def test_streaming_agent_runs_others_on_the_same_loop_at_limit_1(nested: str, entered: bool) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def agent() -> AsyncGenerator[bool]:
        for _ in range(2 * BUFFER):
            yield await run_nested(nested, loop)

    with anyio.fail_after(100):
        async with within(loop, entered):
            chunks, error, _ = await run_stream(loop, agent)

    assert (error, chunks) == (None, [True] * 2 * BUFFER)


@pytest.mark.long
@entered_or_not
@each_count
@each_nested
async def test_agent_that_reads_a_stream_runs_others_between_chunks_at_limit_1(
    nested: str, agent: Any, entered: bool
) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def reader() -> int:
        total = 0
        async with loop.run_streaming("child", agent, 2 * BUFFER) as stream:
            async for chunk in stream:
                assert await run_nested(nested, loop)
                total += chunk

        return total

    with anyio.fail_after(1000):
        async with within(loop, entered):
            result = await loop.run_single("a", reader)

    assert result.unwrap() == sum(range(2 * BUFFER))


@each_count
async def test_agent_reads_two_streams_in_step_at_limit_1(agent: Any) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def reader() -> list[tuple[int, int]]:
        async with loop.run_streaming("b", agent, 50) as first, loop.run_streaming("c", agent, 50) as second:
            return [(chunk, await anext(second)) async for chunk in first]

    with anyio.fail_after(1000):
        result = await loop.run_single("a", reader)

    assert result.unwrap() == [(i, i) for i in range(50)]


async def nest_at_limit_1(depth: int) -> None:
    loop = make_loop(max_concurrency=1)

    async def agent(depth: int) -> AsyncGenerator[int]:
        if depth == 0:
            async for chunk in count(3 * BUFFER):
                yield chunk
        else:
            async with loop.run_streaming("deeper", agent, depth - 1) as stream:
                async for chunk in stream:
                    assert (await loop.run_single("b", double, chunk)).output == 2 * chunk
                    yield chunk

    with anyio.fail_after(100):
        chunks, error, _ = await run_stream(loop, agent, depth)

    assert (error, chunks) == (None, list(range(3 * BUFFER)))


async def test_streams_nest_to_any_depth_at_limit_1() -> None:
    await nest_at_limit_1(5)


@pytest.mark.long
@backends
@pytest.mark.parametrize("depth", [2, 5])
def test_streams_in_streams_at_limit_1_come_to_their_end_in_any_schedule(backend: Any, depth: int) -> None:
    # A stream that comes back for its slot while its own reader is without one has to get it from there.
    for seed in range(10):
        run_scheduled(backend, seed, nest_at_limit_1, depth)


async def test_nested_stream_whose_reader_pauses_holds_no_slot() -> None:
    loop = make_loop(max_concurrency=1)
    held = []

    async def agent() -> None:
        async with loop.run_streaming("child", count, 100) as stream:
            await anyio.sleep(1)
            held.append(loop.statistics().running)
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(loop.run_single, "b", anyio.sleep, 1)

            held.append(loop.statistics().running)
            assert (await read(stream))[0] == list(range(100))

    start = anyio.current_time()
    (await loop.run_single("a", agent)).unwrap()
    # Its own slot, which it lends to one at a time.
    assert held == [1, 1]
    assert anyio.current_time() - start == pytest.approx(4)


@pytest.mark.parametrize("how", ["leave", "deadline"])
async def test_nested_stream_that_waits_to_get_its_slot_back_can_be_ended(how: str) -> None:
    loop = make_loop(max_concurrency=1, total_timeout_seconds=50 if how == "leave" else 5)
    results = []
    finished = False

    async def chunks() -> AsyncGenerator[int]:
        nonlocal finished
        try:
            for i in range(100):
                yield i
        finally:
            finished = True

    async def agent() -> None:
        async with loop.run_streaming("child", chunks) as stream:
            await anyio.wait_all_tasks_blocked()
            async with anyio.create_task_group() as group:
                # It is lent the slot for so long that the stream, which would go on, cannot.
                group.start_soon(loop.with_config(total_timeout_seconds=None).run_single, "b", anyio.sleep, 9)
                await anyio.wait_all_tasks_blocked()
                for _ in range(BUFFER):
                    await anext(stream)

                await anyio.sleep(1 if how == "leave" else 6)
                if how == "leave":
                    group.cancel_scope.cancel()
                else:
                    with pytest.raises(InvocationTimeout, match="Timeout after 5s in total"):
                        await anext(stream)

        results.append(stream.result)

    (await loop.with_config(total_timeout_seconds=None).run_single("a", agent)).unwrap()
    assert results[0].status is (Status.CANCELLED if how == "leave" else Status.TIMEOUT)
    assert finished


# -- time-outs


@pytest.mark.parametrize(
    ("timeout", "total", "first", "idle", "script", "expected", "seconds"),
    [
        (3.5, None, None, None, Chunks(range(9), gap_seconds=1), InvocationTimeout(3.5), 3.5),
        (None, 3.5, None, None, Chunks(range(9), gap_seconds=1), InvocationTimeout(3.5, True), 3.5),
        (None, None, 0.5, None, STALLED, FirstChunkTimeout(0.5), 0.5),
        (None, None, None, 3.5, Chunks([0, 1], after_seconds=5, then=Stall()), IdleTimeout(3.5), 8.5),
        # The shortest is the one that is named, and the total one if it is not the longer one.
        (1, None, 2, None, STALLED, InvocationTimeout(1), 1),
        (2, None, 1, None, STALLED, FirstChunkTimeout(1), 1),
        (None, 1, 2, None, STALLED, InvocationTimeout(1, True), 1),
        (1, 2, None, None, STALLED, InvocationTimeout(1), 1),
        (1, 1, None, None, STALLED, InvocationTimeout(1, True), 1),
        (6, None, None, 3, STALLS, IdleTimeout(3), 4),
        (3, None, None, 3, STALLS, InvocationTimeout(3), 3),
        (None, 3, None, 3, STALLS, InvocationTimeout(3, True), 3),
        (9, None, 3, None, STALLS, InvocationTimeout(9), 9),
        (None, 9, 3, None, STALLS, InvocationTimeout(9, True), 9),
    ],
)
async def test_shortest_time_limit_ends_a_stream_after_its_chunks(
    timeout: Any,
    total: Any,
    first: Any,
    idle: Any,
    script: Chunks,
    expected: InvocationTimeout,
    seconds: float,
) -> None:
    loop = make_loop(
        # What passes its total time is not retried.
        max_retries=3 if total and not timeout else 0,
        timeout_seconds=timeout,
        total_timeout_seconds=total,
        first_chunk_timeout_seconds=first,
        idle_timeout_seconds=idle,
    )
    chunks, error, result = await run_stream(loop, FakeAgent(script))
    assert chunks == [*script.chunks[: len(chunks)]]
    assert len(chunks) == result.chunks == min(len(script.chunks), 4)
    assert type(error) is type(expected)
    assert (error.seconds, error.total) == (expected.seconds, expected.total)
    assert (result.status, result.exception) == (Status.TIMEOUT, error)
    assert str(error) == str(expected) == result.error
    assert result.latency_ms == pytest.approx(1000 * seconds)
    assert (result.first_chunk_ms is None) == (script is STALLED)


async def test_idle_time_out_counts_from_the_last_chunk_exactly() -> None:
    async def agent(gaps: list[float]) -> AsyncGenerator[float]:
        for gap in gaps:
            await anyio.sleep(gap)
            yield gap

    rng = random.Random(1)
    for _ in range(20):
        gaps = [rng.uniform(0.1, 1.01) for _ in range(60)]
        expected = next((i for i, gap in enumerate(gaps) if i and gap > 1), len(gaps))
        loop = make_loop(idle_timeout_seconds=1, first_chunk_timeout_seconds=2)
        chunks, error, result = await run_stream(loop, agent, gaps)
        assert chunks == gaps[:expected]
        if expected < len(gaps):
            assert type(error) is IdleTimeout
            assert result.latency_ms == pytest.approx(1000 * (sum(chunks) + 1))
        else:
            assert error is None


async def test_stream_within_all_its_time_limits_ends_well() -> None:
    loop = make_loop(
        timeout_seconds=10, total_timeout_seconds=11, first_chunk_timeout_seconds=2, idle_timeout_seconds=2
    )
    chunks, error, _ = await run_stream(loop, one_a_second, 9)
    assert (chunks, error) == (list(range(9)), None)


@pytest.mark.parametrize(
    ("timeout", "total", "first", "idle", "script", "expected", "retries"),
    [
        # Between two attempts there is a second.
        (None, 4, 2, None, [STALLED], InvocationTimeout(4, True), 1),
        (None, 3.5, 2, None, [Fail(OSError(), after_seconds=1), STALLED], InvocationTimeout(3.5, True), 1),
        (None, 4, 2, None, [STALLED, Chunks([0], then=Stall())], InvocationTimeout(4, True), 1),
        (3, None, 2, None, [STALLED, STALLS], InvocationTimeout(3), 1),
        (3, 5, 2, None, [STALLED, STALLS], InvocationTimeout(5, True), 1),
        (None, 9, 2, 1.5, [STALLED, STALLS], IdleTimeout(1.5), 1),
        (None, 5, 2, 3, [STALLED, STALLS], InvocationTimeout(5, True), 1),
        (None, 9, None, 1, [STALLS], IdleTimeout(1), 0),
        (2, 4, None, None, [STALLED], InvocationTimeout(4, True), 1),
        (2, 9, 4, None, [Fail(OSError(), after_seconds=1), STALLED], InvocationTimeout(9, True), 3),
        # There is no time for another attempt.
        (None, 2.5, 2, None, [STALLED], FirstChunkTimeout(2), 0),
    ],
)
async def test_time_out_of_a_retried_stream_is_that_of_its_last_attempt(
    timeout: Any, total: Any, first: Any, idle: Any, script: Any, expected: InvocationTimeout, retries: int
) -> None:
    loop = make_loop(
        max_retries=5,
        backoff=Backoff(initial_seconds=1, multiplier=1, jitter="none"),
        timeout_seconds=timeout,
        total_timeout_seconds=total,
        first_chunk_timeout_seconds=first,
        idle_timeout_seconds=idle,
    )
    _, error, result = await run_stream(loop, FakeAgent(*script))
    assert type(error) is type(expected)
    assert (error.seconds, error.total) == (expected.seconds, expected.total)
    assert (str(error), result.retries) == (str(expected), retries)
    assert result.failures[-1] is error
    if expected.total:
        assert result.latency_ms == pytest.approx(1000 * expected.seconds)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_seconds": 5},
        {"timeout_seconds": None, "idle_timeout_seconds": 0.5},
        {"first_chunk_timeout_seconds": 0.5},
        {"timeout_seconds": 5, "idle_timeout_seconds": 0.5, "first_chunk_timeout_seconds": 0.5},
    ],
)
async def test_time_that_the_reader_takes_is_not_counted(settings: Any, nested: bool) -> None:
    loop = make_loop(max_concurrency=1, **settings)
    agent = FakeAgent(Chunks(range(100), after_seconds=0.01, gap_seconds=0.01))

    async def read_slowly() -> list[int]:
        chunks = []
        async with loop.run_streaming("a", agent) as stream:
            await anyio.sleep(50)
            async for chunk in stream:
                chunks.append(chunk)
                await anyio.sleep(3)

        return chunks

    outer = loop.with_config(timeout_seconds=None)
    chunks = (await outer.run_single("r", read_slowly)).unwrap() if nested else await read_slowly()
    assert chunks == list(range(100))


@pytest.mark.parametrize(
    ("settings", "waits", "expected", "last", "seconds"),
    [
        ({"timeout_seconds": 7}, (3, 3, 3), InvocationTimeout(7), [100], 50 + 3 + 1),
        ({"idle_timeout_seconds": 3}, (0, 2, 4), IdleTimeout(3), [100], 50 + 2 + 3),
        ({"total_timeout_seconds": 20}, (0, 0, 0), InvocationTimeout(20, True), [], 20),
    ],
)
async def test_time_that_the_reader_takes_counts_for_the_total_alone(
    settings: Any, waits: Any, expected: InvocationTimeout, last: list[int], seconds: float
) -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(waits[0])
        for i in range(BUFFER):
            yield i

        await anyio.sleep(waits[1])
        yield 100
        await anyio.sleep(waits[2])

    chunks, error, result = await run_stream(make_loop(**settings), agent, pause=50)
    assert chunks == [*range(BUFFER), *last]
    assert type(error) is type(expected)
    assert (str(error), result.latency_ms) == (str(expected), pytest.approx(1000 * seconds))


@pytest.mark.parametrize("chunks", [0, 1])
async def test_error_made_of_our_time_out_is_its_cause(chunks: int) -> None:
    async def agent() -> AsyncGenerator[int]:
        for i in range(chunks):
            yield i

        try:
            await anyio.sleep_forever()
        finally:
            raise ConnectionError("made of it")

    for settings, kind in (
        ({"timeout_seconds": 1}, InvocationTimeout),
        ({"total_timeout_seconds": 1}, InvocationTimeout),
        ({"idle_timeout_seconds": 1} if chunks else {"first_chunk_timeout_seconds": 1}, None),
    ):
        _, error, result = await run_stream(make_loop(**settings), agent)
        assert type(error) is (kind or (IdleTimeout if chunks else FirstChunkTimeout))
        assert (type(error.__cause__), result.status) == (ConnectionError, Status.TIMEOUT)


async def test_agent_that_ends_in_spite_of_its_time_out_has_ended_well() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        with anyio.CancelScope(shield=True):
            await anyio.sleep(5)

        yield 2

    chunks, error, result = await run_stream(make_loop(timeout_seconds=1), agent)
    assert (chunks, error) == ([1, 2], None)
    assert result.success


async def test_error_of_an_agent_whose_iterator_closes_slowly_is_no_time_out() -> None:
    closed = 0

    class Chunks:
        def __init__(self, failures: int) -> None:
            self.steps = [1] * (2 - failures)

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            await anyio.sleep(0.5)
            if self.steps:
                return self.steps.pop()

            raise ValueError("mine")

        async def aclose(self) -> None:
            nonlocal closed
            await anyio.sleep(2)
            closed += 1

    for failures in (1, 2):
        loop = make_loop(timeout_seconds=2, idle_timeout_seconds=1, first_chunk_timeout_seconds=1)
        _, error, result = await run_stream(loop, Chunks, failures)
        assert (type(error), result.status) == (ValueError, Status.ERROR)

    assert closed == 2


async def test_deadline_is_visible_to_the_agent() -> None:
    seen = []

    async def agent() -> AsyncGenerator[int]:
        for i in range(3 * BUFFER):
            seen.append(anyio.current_effective_deadline() - anyio.current_time())
            yield i

    async with make_loop(timeout_seconds=30, idle_timeout_seconds=5).run_streaming("a", agent) as stream:
        async for _ in stream:
            await anyio.sleep(1)

    assert set(seen) == {30}
    seen.clear()
    async with make_loop(timeout_seconds=30, total_timeout_seconds=60).run_streaming("a", agent) as stream:
        async for _ in stream:
            await anyio.sleep(1)

    assert seen[0] == 30
    # The last ones are produced when the total is nearer than the end of the attempt.
    assert seen[-1] == 60 - (3 * (BUFFER - LOW) - 1)
    seen.clear()
    await run_stream(make_loop(timeout_seconds=30, first_chunk_timeout_seconds=3), agent)
    assert seen[:2] == [3, 30]
    seen.clear()
    await run_stream(make_loop(timeout_seconds=None), agent)
    assert set(seen) == {math.inf}


# -- retries


@pytest.mark.parametrize("failures", [0, 1, 2, 3, 4])
async def test_failure_before_the_first_chunk_is_retried(failures: int) -> None:
    agent = FakeAgent(*[OSError(i + 1) for i in range(failures)], Chunks([failures + 1]))
    chunks, error, result = await run_stream(make_loop(max_retries=3), agent)
    assert (len(agent.calls), result.retries) == (min(failures, 3) + 1, min(failures, 3))
    assert [str(failure) for failure in result.failures] == [str(i + 1) for i in range(failures)]
    # 1, 2 and 4 seconds of backoff.
    assert result.latency_ms == pytest.approx(1000 * (2 ** min(failures, 3) - 1))
    if failures < 4:
        assert (chunks, result.first_chunk_ms) == ([failures + 1], result.latency_ms)
        assert error is None
        assert result.success
    else:
        assert chunks == []
        assert error is result.exception is result.failures[-1]


@pytest.mark.parametrize("failure", [OSError(), FakeHTTPError(429, 3), Stall()])
async def test_failure_after_a_chunk_is_not_retried(failure: Any) -> None:
    agent = FakeAgent(Chunks([1], then=failure))
    chunks, error, result = await run_stream(make_loop(max_retries=3, timeout_seconds=2), agent)
    assert (chunks, len(agent.calls), result.retries) == ([1], 1, 0)
    assert result.exception is error
    assert error is failure or type(error) is InvocationTimeout


async def test_overload_waits_as_long_as_it_was_asked_to() -> None:
    # Retries through overload do not count.
    agent = FakeAgent(*[FakeHTTPError(429, 20)] * 3, Chunks([4]))
    chunks, _, result = await run_stream(make_loop(max_retries=1), agent)
    assert (chunks, result.retries) == ([4], 3)
    assert 60_000 <= result.latency_ms <= 75_000


@pytest.mark.parametrize("retry", [False, True])
async def test_first_chunk_time_out_is_retried_if_time_outs_are(retry: bool) -> None:
    agent = FakeAgent(STALLED, STALLED, Chunks([3, 3], after_seconds=1, gap_seconds=3))
    loop = make_loop(max_retries=5, retry_on_timeout=retry, first_chunk_timeout_seconds=2, timeout_seconds=9)
    chunks, error, result = await run_stream(loop, agent)
    if retry:
        assert chunks == [3, 3]
        assert [type(failure) for failure in result.failures] == [FirstChunkTimeout] * 2
        # Two time-outs, 1 and 2 seconds of backoff, and one second.
        assert result.first_chunk_ms == pytest.approx(8000)
    else:
        assert (chunks, type(error)) == ([], FirstChunkTimeout)


async def test_attempt_is_timed_anew() -> None:
    agent = FakeAgent(Fail(OSError(), after_seconds=4), Chunks(range(4), after_seconds=5, gap_seconds=1))
    loop = make_loop(max_retries=1, timeout_seconds=7.5, first_chunk_timeout_seconds=6)
    chunks, error, result = await run_stream(loop, agent)
    assert (chunks, type(error)) == ([0, 1, 2], InvocationTimeout)
    assert [type(failure) for failure in result.failures] == [OSError, InvocationTimeout]


async def test_generator_of_a_failed_attempt_is_closed_before_the_next_begins() -> None:
    story: list[Any] = []

    class Chunks:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            story.append("next")
            if len(story) < 4:
                raise OSError

            raise StopAsyncIteration

        async def aclose(self) -> None:
            await anyio.sleep(1)
            story.append("close")

    _, _, result = await run_stream(make_loop(max_retries=3), Chunks)
    assert (story, result.retries) == (["next", "close"] * 3, 2)


async def test_total_time_that_is_up_during_a_retry_says_so() -> None:
    agent = FakeAgent(Chunks(then=Fail(OSError, after_seconds=1)))
    _, error, result = await run_stream(make_loop(max_retries=5, total_timeout_seconds=3.5), agent)
    assert type(error) is OSError
    assert error.__notes__ == ["not retried: total_timeout_seconds=3.5 would pass during the wait"]
    assert result.retries == 1


async def test_total_time_that_is_up_while_waiting_for_a_slot_is_a_time_out() -> None:
    loop = make_loop(max_concurrency=1, max_retries=5, total_timeout_seconds=5)
    async with anyio.create_task_group() as group:
        async with loop.run_streaming("a", FakeAgent(Chunks(then=OSError))) as stream:
            await anyio.wait_all_tasks_blocked()
            group.start_soon(loop.with_config(total_timeout_seconds=None).run_single, "hog", anyio.sleep, 9)
            _, error = await read(stream)
            assert isinstance(error, InvocationTimeout)
            assert isinstance(error.__cause__, OSError)
            assert stream.result.latency_ms == pytest.approx(5000)


# -- errors


@pytest.mark.parametrize("chunks", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("error", [ValueError("mine"), ExceptionGroup("mine", [ValueError(), OSError()])])
async def test_error_is_the_object_that_was_raised_after_the_chunks(error: Exception, chunks: int) -> None:
    agent = FakeAgent(Chunks(range(chunks), then=error))
    seen, caught, result = await run_stream(make_loop(), agent, pause=1)
    assert seen == list(range(chunks))
    assert caught is error
    assert (result.exception, result.status) == (error, Status.ERROR)
    assert result.error.startswith(f"{type(error).__name__}: mine")
    assert (error.__cause__, error.__context__) == (None, None)


async def test_error_waits_until_the_chunks_were_read() -> None:
    async with make_loop().run_streaming("a", FakeAgent(Chunks(range(5), then=ValueError))) as stream:
        await anyio.sleep(1)
        assert stream.result.status is Status.ERROR
        chunks, error = await read(stream)

    assert (chunks, type(error)) == (list(range(5)), ValueError)


def frames(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next


async def test_error_is_raised_again_without_growing() -> None:
    error = ValueError("mine")

    async def deeper() -> None:
        raise error

    async def agent() -> AsyncGenerator[int]:
        yield 1
        await deeper()

    seen = []
    async with make_loop().run_streaming("a", agent) as stream:
        assert await anext(stream) == 1
        for _ in range(5):
            with pytest.raises(ValueError, match="mine") as caught:
                await anext(stream)

            assert caught.value is error
            seen.append(list(frames(error.__traceback__)))

    # Nothing of ours stands between the reader and the agent but what raises it.
    assert seen[0][0] == "test_error_is_raised_again_without_growing"
    assert seen[0][-2:] == ["agent", "deeper"]
    assert (len(seen[0]), seen) == (4, [seen[0]] * 5)


@pytest.mark.parametrize(
    "error", [None, ValueError("body"), ExceptionGroup("body", [OSError()]), KeyboardInterrupt()], ids=type
)
@pytest.mark.parametrize("agents_error", [None, ValueError("agent")])
async def test_error_of_the_body_comes_out_and_that_of_the_agent_is_in_the_result(
    error: BaseException | None, agents_error: Exception | None
) -> None:
    loop = make_loop()
    with nullcontext() if error is None else pytest.raises(type(error)) as caught:
        async with loop.run_streaming("a", FakeAgent(Chunks([1], then=agents_error or Stall()))) as stream:
            await anyio.sleep(1)
            if error is not None:
                raise error

    if error is not None:
        assert caught.value is error
        assert (error.__cause__, error.__context__) == (None, None)

    status = Status.ERROR if agents_error else Status.CANCELLED
    assert (stream.result.status, loop.metrics.snapshot().counts[status]) == (status, 1)
    assert stream.result.error == "ValueError: agent" or not agents_error


async def test_agents_error_that_the_reader_lets_through_comes_out_once() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with make_loop().run_streaming("a", FakeAgent(Chunks([1], then=error))) as stream:
            async for _ in stream:
                pass

    assert caught.value is error


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_agent_that_raises_an_end_of_iteration_does_not_look_complete(kind: Any) -> None:
    chunks, error, result = await run_stream(make_loop(), FakeAgent(Chunks([1], then=kind)))
    assert chunks == [1]
    # As the language has it for generators.
    assert isinstance(error, RuntimeError)
    assert (type(error.__cause__), result.status) == (kind, Status.ERROR)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_function_that_raises_an_end_of_iteration_does_not_look_complete(kind: Any) -> None:
    def stops() -> AsyncIterator[int]:
        raise kind

    _, error, result = await run_stream(make_loop(), stops)
    assert type(error) is RuntimeError
    assert type(result.exception) is StopAsyncIteration or kind is StopIteration
    assert error.__cause__ is result.exception or kind is StopIteration
    assert str(error) == "the agent raised StopAsyncIteration" or kind is StopIteration


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
@entered_or_not
@pytest.mark.parametrize("reads", [False, True])
async def test_interrupt_propagates_out_of_the_block(kind: Any, entered: bool, reads: bool) -> None:
    error, loop = kind(), make_loop()
    stream = loop.run_streaming("a", FakeAgent(Chunks([1], then=error)))
    with pytest.raises(kind) as caught:
        async with within(loop, entered), stream:
            if reads:
                assert await anext(stream) == 1
                await anext(stream)
            else:
                # In an entered loop it is the loop's block that is cancelled.
                await (anyio.sleep(1) if entered else anyio.sleep_forever())

    assert caught.value is error
    assert stream.result.status is Status.CANCELLED
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


async def test_stray_cancellation_is_an_error_of_the_stream() -> None:
    stray = await stray_cancellation()
    agent = FakeAgent(Chunks([1], then=stray))
    chunks, error, result = await run_stream(make_loop(max_retries=3), agent)
    assert chunks == [1]
    assert isinstance(error, InvocationCancelled)
    assert error.__cause__ is stray
    assert (result.status, result.retries) == (Status.CANCELLED, 0)


# -- cancellation of the reader


async def cancel_while_waiting(stream: AgentStream[int]) -> None:
    await anext(stream)
    await anyio.sleep_forever()


async def cancel_while_reading(stream: AgentStream[int]) -> None:
    async for _ in stream:
        pass


@entered_or_not
@pytest.mark.parametrize("body", [cancel_while_waiting, cancel_while_reading])
@pytest.mark.parametrize("how", ["deadline", "scope", "both"])
async def test_cancelled_reader_cancels_the_agent_and_waits_for_it(
    body: Any, how: str, entered: bool
) -> None:
    cleaned = False

    async def agent() -> AsyncGenerator[int]:
        nonlocal cleaned
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2)

            cleaned = True

    async def go() -> None:
        async with stream:
            await body(stream)

    loop = make_loop(timeout_seconds=1 if how == "both" else None)
    stream = loop.run_streaming("a", agent)
    start = anyio.current_time()
    async with within(loop, entered):
        with anyio.CancelScope() as scope:
            if how == "scope":
                async with anyio.create_task_group() as group:
                    group.start_soon(go)
                    await anyio.sleep(1)
                    scope.cancel()
            else:
                scope.deadline = start + 1
                await go()

        assert scope.cancelled_caught
        assert cleaned
        assert anyio.current_time() - start == pytest.approx(3)
        # Which of two that come in one moment is first is up to the event loop.
        either = {Status.CANCELLED, Status.TIMEOUT} if how == "both" else {Status.CANCELLED}
        assert stream.result.status in either


async def test_reader_that_is_cancelled_from_the_start_starts_no_agent() -> None:
    agent = FakeAgent(Chunks([1]))
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with make_loop().run_streaming("a", agent) as stream:
            await anext(stream)

    assert scope.cancelled_caught
    assert (agent.calls, stream.result.status) == ([], Status.SKIPPED)
    assert isinstance(stream.result.exception, InvocationCancelled)


async def test_cancellation_while_waiting_for_a_chunk_loses_none() -> None:
    chunks = []
    async with AgentLoop().run_streaming("a", one_a_second, 50) as stream:
        while True:
            with anyio.move_on_after(0.3):
                try:
                    chunks.append(await anext(stream))
                except StopAsyncIteration:
                    break

    assert chunks == list(range(50))


async def test_chunk_that_is_there_is_not_taken_by_a_cancelled_reader() -> None:
    async with AgentLoop().run_streaming("a", count, 5) as stream:
        await anyio.sleep(1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(stream)

        assert scope.cancelled_caught
        assert (await read(stream))[0] == list(range(5))


# -- what is no stream


@pytest.mark.parametrize(
    ("agent", "what"),
    [
        (FakeAgent(Reply(1)), "coroutine"),
        (lambda: (i for i in range(1)), "generator"),
        (lambda: None, "NoneType"),
        (lambda: [1], "list"),
    ],
)
async def test_function_that_gives_no_async_iterable_is_refused(agent: Any, what: str) -> None:
    _, error, result = await run_stream(make_loop(max_retries=3), agent)
    assert type(error) is TypeError
    assert f"returned a {what}, which `async for` cannot iterate over" in str(error)
    assert "pass an async generator function" in str(error)
    # That would be the same each time.
    assert (result.status, result.retries) == (Status.ERROR, 0)


async def test_bad_arguments_are_refused_at_once() -> None:
    loop: Any = AgentLoop()
    for bad in (None, 5, "agent", [count]):
        with pytest.raises(TypeError, match="must be an async function"):
            loop.run_streaming("a", bad)

    with pytest.raises(TypeError, match=r"not fn\(x\) but fn, x"):
        loop.run_streaming("a", double(1))

    with pytest.raises(TypeError, match=r"must be an async generator function.*not fn\(x\) but fn, x"):
        loop.run_streaming("a", count(5))

    with pytest.raises(TypeError, match="agent_id must be a str"):
        loop.run_streaming(5, count, 5)


async def test_wrong_arguments_are_the_agents_error() -> None:
    _, error, result = await run_stream(make_loop(max_retries=3), count)
    assert (type(error), result.retries) == (TypeError, 0)


class Numbers:
    """An iterator that is no generator."""

    def __init__(self, upto: int) -> None:
        self.rest = list(range(upto))

    def __aiter__(self) -> Numbers:
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        if not self.rest:
            raise StopAsyncIteration

        return self.rest.pop(0)


class ClosingNumbers(Numbers):
    closed = 0

    async def aclose(self) -> None:
        await checkpoint()
        self.closed += 1


class BareNumbers:
    """An iterable whose iterator is no iterable."""

    def __init__(self, upto: int) -> None:
        self.upto = upto

    def __aiter__(self) -> Any:
        numbers = Numbers(self.upto)

        class Bare:
            async def __anext__(self) -> int:
                return await numbers.__anext__()

        return Bare()


@pytest.mark.parametrize("size", [0, 5, 50])
@pytest.mark.parametrize("kind", [Numbers, ClosingNumbers, BareNumbers])
async def test_any_async_iterable_is_streamed(kind: Any, size: int) -> None:
    chunks, error, _ = await run_stream(make_loop(), kind, size)
    assert (chunks, error) == (list(range(size)), None)


@pytest.mark.parametrize("size", [5, 50])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", [Numbers, ClosingNumbers])
async def test_iterator_is_closed_once_if_it_can_be(kind: Any, early: bool, size: int) -> None:
    iterator = kind(size)
    async with make_loop().run_streaming("a", lambda: iterator) as stream:
        await anyio.wait_all_tasks_blocked()
        if not early:
            assert len((await read(stream))[0]) == size

    assert getattr(iterator, "closed", 1) == 1


async def test_iterator_that_fails_to_close_after_its_end_has_failed() -> None:
    closed = 0

    class Failing(Numbers):
        async def aclose(self) -> None:
            nonlocal closed
            closed += 1
            await anyio.sleep(3)
            raise OSError("close")

    chunks, error, result = await run_stream(make_loop(idle_timeout_seconds=1), Failing, 3)
    assert (chunks, type(error), result.status, closed) == ([0, 1, 2], OSError, Status.ERROR, 1)


async def test_iterable_that_fails_to_begin_is_an_error() -> None:
    class Failing:
        def __aiter__(self) -> Any:
            raise OSError("begin")

    class Wrong:
        def __aiter__(self) -> Any:
            return 5

    for kind, expected in ((Failing, OSError), (Wrong, TypeError)):
        _, error, result = await run_stream(make_loop(max_retries=1), kind)
        assert type(error) is expected
        assert result.retries == (kind is Failing)


async def test_iterating_without_async_with_says_what_to_write() -> None:
    stream = AgentLoop().run_streaming("a", count, 5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"write `async with loop.run_streaming\(...\) as stream:`"):
            await anext(aiter(stream))


async def test_stream_is_entered_once() -> None:
    stream = AgentLoop().run_streaming("a", count, 5)
    async with stream as same:
        assert same is stream
        with pytest.raises(RuntimeError, match="can be read in one `async with` block only"):
            await stream.__aenter__()

        assert (await read(stream))[0] == list(range(5))

    with pytest.raises(RuntimeError, match="can be read in one `async with` block only"):
        await stream.__aenter__()


async def test_there_is_no_result_before_the_end() -> None:
    stream = AgentLoop().run_streaming("a", one_a_second, 1)
    with pytest.raises(RuntimeError, match="read it after the `async with` block"):
        _ = stream.result

    async with stream:
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="read it after the `async with` block"):
            _ = stream.result

    assert stream.result.status is Status.CANCELLED


async def test_repr_shows_the_state() -> None:
    stream = AgentLoop().run_streaming("writer", one_a_second, 3)
    assert repr(stream) == "<AgentStream 'writer' not entered>"
    async with stream:
        assert repr(stream) == "<AgentStream 'writer' running>"
        await read(stream)
        assert repr(stream) == "<AgentStream 'writer' success after 3 chunks>"


def test_stream_can_be_described_outside_an_event_loop() -> None:
    assert isinstance(AgentLoop().run_streaming("a", count, 1), AgentStream)


async def test_limiter_that_is_in_use_elsewhere_refuses_and_leaves_nothing_open() -> None:
    loop = make_loop()

    async def main() -> None:
        for view in (loop.run_streaming("b", count, 1), loop.stream_all([Invocation("b", count, (1,))])):
            with pytest.raises(RuntimeError, match="in use in another event loop"):
                await view.__aenter__()

    async with loop.run_streaming("a", one_a_second, 5) as stream:
        await anext(stream)
        await anyio.to_thread.run_sync(anyio.run, main)

    gc.collect()


# -- context variables

variable: ContextVar[str] = ContextVar("variable", default="unset")


@entered_or_not
@pytest.mark.parametrize("iterable", [False, True])
async def test_context_variables_stay_within_the_stream(entered: bool, iterable: bool) -> None:
    async def chunks(name: str) -> AsyncGenerator[str]:
        yield variable.get()
        token = variable.set(name)
        for _ in range(40):
            await checkpoint()
            yield variable.get()

        # A token can be reset only in the context that it was made in.
        variable.reset(token)
        yield variable.get()
        variable.set("left behind")

    class Wrapped:
        def __init__(self, name: str) -> None:
            self.iterator = chunks(name)

        def __aiter__(self) -> Any:
            return self.iterator

    async def go(name: str) -> None:
        read, _, _ = await run_stream(loop, Wrapped if iterable else chunks, name)
        assert read == ["the reader's", *[name] * 40, "the reader's"]

    loop = make_loop(max_concurrency=2)
    variable.set("the reader's")
    async with within(loop, entered), anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(go, str(i))

    assert variable.get() == "the reader's"


async def test_generator_is_closed_in_its_own_context() -> None:
    seen = []

    async def agent() -> AsyncGenerator[int]:
        token = variable.set("mine")
        try:
            for i in range(100):
                yield i
        finally:
            await checkpoint()
            seen.append(variable.get())
            variable.reset(token)

    variable.set("the reader's")
    async with make_loop().run_streaming("a", agent) as stream:
        await anext(stream)
        await anyio.wait_all_tasks_blocked()

    assert seen == ["mine"]
    assert stream.result.exception is not None
    assert stream.result.exception.__cause__ is None


# -- scopes of the agent's own, in which it yields


async def scope_around_the_stream(upto: int) -> AsyncGenerator[int]:
    with anyio.CancelScope():
        for i in range(upto):
            yield i


async def deadline_around_the_stream(upto: int) -> AsyncGenerator[int]:
    with anyio.fail_after(1000), anyio.move_on_after(1000):
        for i in range(upto):
            await checkpoint()
            yield i


async def tasks_around_the_stream(upto: int) -> AsyncGenerator[int]:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 1000)
        for i in range(upto):
            yield i

        group.cancel_scope.cancel()


async def shield_around_the_stream(upto: int) -> AsyncGenerator[int]:
    with anyio.CancelScope(shield=True):
        for i in range(upto):
            yield i


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["read", "leave", "raise", "cancel", "time out"])
@pytest.mark.parametrize(
    "agent",
    [scope_around_the_stream, deadline_around_the_stream, tasks_around_the_stream, shield_around_the_stream],
)
async def test_agent_may_yield_in_scopes_of_its_own(agent: Any, how: str, nested: bool) -> None:
    loop = make_loop(max_concurrency=1, total_timeout_seconds=5 if how == "time out" else None)
    stream = loop.run_streaming("a", agent, 50)
    results = []

    async def body() -> None:
        async with stream:
            assert await anext(stream) == 0
            await anyio.sleep(1)
            if how == "raise":
                raise ValueError("body")

            if how == "cancel":
                await anyio.sleep_forever()

            if how == "time out":
                await anyio.sleep(10)

            if how != "leave":
                results.append(await read(stream))

    with anyio.fail_after(50), anyio.move_on_after(2 if how == "cancel" else None):
        with pytest.raises(ValueError, match="body") if how == "raise" else nullcontext():
            if nested:
                (await loop.with_config(total_timeout_seconds=None).run_single("r", body)).unwrap()
            else:
                await body()

    status = stream.result.status
    if how == "read" or (how == "time out" and agent is shield_around_the_stream):
        # No scope of ours reaches into a shielded one.
        assert (results, status) == ([(list(range(1, 50)), None)], Status.SUCCESS)
    elif how == "time out":
        assert results[0][0] in (list(range(1, BUFFER)), list(range(1, BUFFER + 1)))
        assert status is Status.TIMEOUT
    else:
        assert status is Status.CANCELLED


@pytest.mark.parametrize(
    ("scope", "end", "failure"), [(anyio.fail_after, [], TimeoutError), (anyio.move_on_after, [100], None)]
)
async def test_agents_own_time_limit_counts_while_it_waits_for_its_reader(
    scope: Any, end: list[int], failure: Any
) -> None:
    async def agent() -> AsyncGenerator[int]:
        with scope(5):
            for i in range(50):
                yield i

        await anyio.sleep(1)
        yield 100

    chunks, error, result = await run_stream(make_loop(timeout_seconds=20), agent, pause=50)
    assert chunks == [*range(BUFFER), *end]
    assert failure is None or type(error) is failure
    assert result.status is (Status.ERROR if failure else Status.SUCCESS)


async def test_agents_own_child_that_fails_ends_the_stream_with_its_group() -> None:
    async def agent() -> AsyncGenerator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(FakeAgent(Fail(OSError, after_seconds=5)))
            for i in range(50):
                yield i

    chunks, error, _ = await run_stream(make_loop(), agent, pause=50)
    assert chunks == list(range(BUFFER))
    assert isinstance(error, ExceptionGroup)
    assert [type(exc) for exc in error.exceptions] == [OSError]


async def test_agents_time_is_limited_on_after_its_own_scope_has_ended() -> None:
    async def agent() -> AsyncGenerator[int]:
        with anyio.move_on_after(5):
            for i in range(50):
                yield i

        await anyio.sleep_forever()

    chunks, error, result = await run_stream(make_loop(timeout_seconds=9), agent, pause=50)
    assert (chunks, type(error)) == (list(range(BUFFER)), InvocationTimeout)
    assert result.latency_ms == pytest.approx(14_000)


async def test_nested_agent_whose_own_scope_ends_while_it_has_no_slot_has_one_when_it_goes_on() -> None:
    loop = make_loop(max_concurrency=1)
    went_on: list[int] = []

    async def agent() -> AsyncGenerator[int]:
        with anyio.move_on_after(5):
            for i in range(50):
                yield i

        went_on.append(working)
        yield -1

    async def read() -> list[int]:
        nonlocal working
        async with loop.run_streaming("a", agent) as stream:
            chunks = [await anext(stream)]
            working = 1
            await loop.run_single("b", anyio.sleep, 10)
            working = 0
            return chunks + [chunk async for chunk in stream]

    working = 0
    result = await loop.run_single("a", read)
    assert result.unwrap() == [*range(BUFFER), -1]
    assert went_on == [0]


@pytest.mark.parametrize("error", [OSError("child"), Stop()])
async def test_child_that_fails_while_the_generator_is_closed_is_its_cause_or_an_interrupt(
    error: BaseException,
) -> None:
    async def fail() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    async def agent() -> AsyncGenerator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            await checkpoint()
            for i in range(50):
                yield i

    stream = make_loop().run_streaming("a", agent)
    with pytest.raises(BaseExceptionGroup) if isinstance(error, Stop) else nullcontext() as caught:
        async with stream:
            await anyio.wait_all_tasks_blocked()

    assert stream.result.status is Status.CANCELLED
    if caught is not None:
        assert caught.value.subgroup(Stop) is not None
    else:
        cause = stream.result.exception.__cause__
        assert isinstance(cause, ExceptionGroup)
        assert [str(exc) for exc in cause.exceptions] == ["child"]


# -- metrics


async def test_each_stream_is_recorded_once() -> None:
    loop = make_loop(max_retries=2, timeout_seconds=3)
    await run_stream(loop, count, 5)
    await run_stream(loop, FakeAgent(Chunks(then=OSError)))
    await run_stream(loop, FakeAgent(Chunks([0], then=OSError)))
    await run_stream(loop, one_a_second, 9)
    async with loop.run_streaming("a", one_a_second, 9) as stream:
        await anext(stream)

    snapshot = loop.metrics.snapshot()
    assert {status: number for status, number in snapshot.counts.items() if number} == {
        Status.SUCCESS: 1,
        Status.ERROR: 2,
        Status.TIMEOUT: 1,
        Status.CANCELLED: 1,
    }
    assert (snapshot.retries, snapshot.latency.count) == (2, 5)


async def test_metrics_can_be_switched_off() -> None:
    loop = make_loop(collect_metrics=False)
    chunks, _, _ = await run_stream(loop, count, 500)
    assert len(chunks) == 500
    assert sum(loop.metrics.snapshot().counts.values()) == 0
