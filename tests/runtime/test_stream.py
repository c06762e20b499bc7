"""run_streaming: what an agent yields, read while it runs."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import anyio
import pytest
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
    LoopConfig,
    Status,
)
from agentloop._stream.channel import BUFFER, LOW
from agentloop.testing import virtual_clock

PLAIN = Backoff(initial_seconds=1, jitter="none")


async def count(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        await checkpoint()
        yield i


async def count_at_once(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        yield i


async def one_a_second(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        await anyio.sleep(1)
        yield i


async def double(x: int) -> int:
    await checkpoint()
    return 2 * x


class Overloaded(Exception):
    status_code = 429

    def __init__(self, retry_after: str) -> None:
        self.headers = {"retry-after": retry_after}


class Unauthorized(Exception):
    status_code = 401


def make_loop(**settings: Any) -> AgentLoop:
    return AgentLoop(LoopConfig(**{"max_retries": 0, "backoff": PLAIN, **settings}))


async def read(stream: AgentStream[Any]) -> tuple[list[Any], BaseException | None]:
    """Read to the end, and say what the end was."""
    chunks = []
    try:
        async for chunk in stream:
            chunks.append(chunk)
    except Exception as exc:
        return chunks, exc

    return chunks, None


async def run(loop: AgentLoop, agent: Callable[..., Any], *args: Any) -> tuple[list[Any], Any, Any]:
    async with loop.run_streaming("a", agent, *args) as stream:
        chunks, error = await read(stream)

    return chunks, error, stream.result


# -- chunks


@pytest.mark.parametrize("agent", [count, count_at_once, one_a_second])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 200])
async def test_chunks_arrive_in_order_and_all_of_them(agent: Any, size: int) -> None:
    chunks, error, result = await run(make_loop(max_concurrency=1), agent, size)
    assert chunks == list(range(size))
    assert error is None
    assert (result.status, result.output, result.exception) == (Status.SUCCESS, None, None)
    assert (result.chunks, result.retries, result.failures, result.index) == (size, 0, (), 0)


async def test_arguments_reach_the_agent() -> None:
    async def agent(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        yield args
        yield kwargs

    async with AgentLoop().run_streaming("a", agent, 1, 2, agent_id="b", stream_fn="c") as stream:
        assert (await read(stream))[0] == [(1, 2), {"agent_id": "b", "stream_fn": "c"}]


async def test_chunks_of_every_type_are_carried() -> None:
    values = [None, False, StopAsyncIteration(), (), ValueError("data"), anyio.EndOfStream()]

    async def agent() -> AsyncGenerator[Any]:
        for value in values:
            yield value

    chunks, error, _ = await run(AgentLoop(), agent)
    assert chunks == values
    assert error is None


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

    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(2)
        yield 1
        await anyio.sleep(3)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "hog", anyio.sleep, 4)
        await anyio.wait_all_tasks_blocked()
        _, _, result = await run(loop, agent)

    assert result.agent_id == "a"
    assert result.queue_ms == pytest.approx(4000)
    assert result.latency_ms == pytest.approx(5000)
    assert result.first_chunk_ms == pytest.approx(2000)


async def test_stream_without_a_chunk_has_no_time_to_its_first() -> None:
    assert (await run(AgentLoop(), count, 0))[2].first_chunk_ms is None


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
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError

        yield calls

    loop = make_loop(max_concurrency=1, max_retries=1)
    async with loop.run_streaming("a", agent) as stream:
        await anyio.wait_all_tasks_blocked()
        assert (loop.statistics().running, loop.statistics().waiting) == (0, 1)
        assert (await loop.run_single("b", double, 1)).output == 2
        assert (await read(stream))[0] == [2]


async def test_no_more_streams_than_the_limit_run() -> None:
    running = peak = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for i in range(30):
            await anyio.sleep(0.1)
            yield i

        running -= 1

    loop = make_loop(max_concurrency=3)
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(run, loop, agent)

    assert peak == 3


async def nested_single(loop: AgentLoop) -> int:
    return (await loop.run_single("child", double, 4)).unwrap()


async def nested_all(loop: AgentLoop) -> int:
    return sum(result.unwrap() for result in await loop.run_all(Invocation.map(double, range(4))))


async def nested_stream(loop: AgentLoop) -> int:
    chunks, _, _ = await run(loop, count, 50)
    return sum(chunks)


async def nested_stream_left_early(loop: AgentLoop) -> int:
    async with loop.run_streaming("child", count, 50) as stream:
        return await anext(stream)


async def nested_stream_all(loop: AgentLoop) -> int:
    async with loop.stream_all(Invocation.map(count, [20, 30])) as events:
        return len([event async for event in events])


NESTED = [nested_single, nested_all, nested_stream, nested_stream_left_early, nested_stream_all]


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("nested", NESTED)
async def test_streaming_agent_runs_others_on_the_same_loop_at_limit_1(nested: Any, entered: bool) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def agent() -> AsyncGenerator[int]:
        for _ in range(2 * BUFFER):
            yield await nested(loop)

    with anyio.fail_after(100):
        if entered:
            async with loop:
                chunks, error, _ = await run(loop, agent)
        else:
            chunks, error, _ = await run(loop, agent)

    assert error is None
    assert len(chunks) == 2 * BUFFER
    assert len(set(chunks)) == 1


@pytest.mark.long
@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("inner", [count, count_at_once, one_a_second])
@pytest.mark.parametrize("nested", NESTED)
async def test_agent_that_reads_a_stream_runs_others_between_chunks_at_limit_1(
    nested: Any, inner: Any, entered: bool
) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def agent() -> int:
        total = 0
        async with loop.run_streaming("child", inner, 2 * BUFFER) as stream:
            async for chunk in stream:
                await nested(loop)
                total += chunk

        return total

    with anyio.fail_after(1000):
        if entered:
            async with loop:
                result = await loop.run_single("a", agent)
        else:
            result = await loop.run_single("a", agent)

    assert result.unwrap() == sum(range(2 * BUFFER))


@pytest.mark.parametrize("inner", [count, count_at_once, one_a_second])
async def test_agent_reads_two_streams_in_step_at_limit_1(inner: Any) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def agent() -> list[tuple[int, int]]:
        pairs = []
        async with loop.run_streaming("b", inner, 50) as first, loop.run_streaming("c", inner, 50) as second:
            async for chunk in first:
                pairs.append((chunk, await anext(second)))

        return pairs

    with anyio.fail_after(1000):
        result = await loop.run_single("a", agent)

    assert result.unwrap() == [(i, i) for i in range(50)]


async def test_streams_nest_to_any_depth_at_limit_1() -> None:
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
        chunks, error, _ = await run(loop, agent, 5)

    assert error is None
    assert chunks == list(range(3 * BUFFER))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("depth", [2, 5])
def test_streams_in_streams_at_limit_1_come_to_their_end_in_any_schedule(backend: Any, depth: int) -> None:
    # One that comes back for its slot while its own reader is still without one has to get it from there.
    async def main() -> None:
        loop = make_loop(max_concurrency=1)

        async def agent(depth: int) -> AsyncGenerator[int]:
            if depth == 0:
                for i in range(2 * BUFFER):
                    await checkpoint()
                    yield i

                return

            async with loop.run_streaming("deeper", agent, depth - 1) as stream:
                async for chunk in stream:
                    await loop.run_single("b", double, chunk)
                    yield chunk

        with anyio.fail_after(100):
            chunks, error, _ = await run(loop, agent, depth)

        assert error is None
        assert chunks == list(range(2 * BUFFER))

    for seed in range(10):
        name, options = virtual_clock(backend, seed=seed)
        anyio.run(main, backend=name, backend_options=options)


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


async def test_time_out_comes_after_the_chunks_that_were_produced() -> None:
    chunks, error, result = await run(make_loop(timeout_seconds=3.5), one_a_second, 9)
    assert chunks == [0, 1, 2]
    assert type(error) is InvocationTimeout
    assert (error.seconds, error.total) == (3.5, False)
    assert result.exception is error
    assert (result.status, result.chunks, result.error) == (Status.TIMEOUT, 3, "Timeout after 3.5s")
    assert result.latency_ms == pytest.approx(3500)


async def test_total_time_out_comes_after_the_chunks_that_were_produced() -> None:
    chunks, error, result = await run(make_loop(total_timeout_seconds=3.5, max_retries=3), one_a_second, 9)
    assert chunks == [0, 1, 2]
    assert type(error) is InvocationTimeout
    assert (error.seconds, error.total) == (3.5, True)
    assert result.error == "Timeout after 3.5s in total"


async def test_first_chunk_time_out_is_one_of_its_own() -> None:
    loop = make_loop(first_chunk_timeout_seconds=0.5)
    chunks, error, result = await run(loop, one_a_second, 9)
    assert chunks == []
    assert type(error) is FirstChunkTimeout
    assert (result.status, result.error) == (Status.TIMEOUT, "No first chunk after 0.5s")
    assert result.latency_ms == pytest.approx(500)
    assert result.first_chunk_ms is None


async def test_idle_time_out_is_one_of_its_own() -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(5)
        for i in range(9):
            yield i
            await anyio.sleep(i)

    chunks, error, result = await run(make_loop(idle_timeout_seconds=3.5), agent)
    assert chunks == [0, 1, 2, 3, 4]
    assert type(error) is IdleTimeout
    assert (result.status, result.error) == (Status.TIMEOUT, "No chunk for 3.5s")
    assert result.latency_ms == pytest.approx(5000 + 6000 + 3500)


async def test_idle_time_out_counts_from_the_last_chunk_exactly() -> None:
    async def agent(gaps: list[float]) -> AsyncGenerator[float]:
        for gap in gaps:
            await anyio.sleep(gap)
            yield gap

    rng = random.Random(1)
    for _ in range(50):
        gaps = [rng.uniform(0.1, 1.01) for _ in range(60)]
        expected = next((i for i, gap in enumerate(gaps) if i and gap > 1), len(gaps))
        loop = make_loop(idle_timeout_seconds=1, first_chunk_timeout_seconds=2)
        chunks, error, result = await run(loop, agent, gaps)
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
    chunks, error, _ = await run(loop, one_a_second, 9)
    assert chunks == list(range(9))
    assert error is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timeout_seconds": 1, "first_chunk_timeout_seconds": 2}, InvocationTimeout(1)),
        ({"timeout_seconds": 2, "first_chunk_timeout_seconds": 1}, FirstChunkTimeout(1)),
        ({"total_timeout_seconds": 1, "first_chunk_timeout_seconds": 2}, InvocationTimeout(1, True)),
        ({"total_timeout_seconds": 2, "timeout_seconds": 1}, InvocationTimeout(1)),
        ({"total_timeout_seconds": 1, "timeout_seconds": 1}, InvocationTimeout(1, True)),
        ({"timeout_seconds": None, "first_chunk_timeout_seconds": 3}, FirstChunkTimeout(3)),
    ],
)
async def test_shortest_time_limit_is_the_one_that_is_named(settings: Any, expected: Any) -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep_forever()
        yield 1

    _, error, _ = await run(make_loop(**settings), agent)
    assert type(error) is type(expected)
    assert str(error) == str(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timeout_seconds": 6, "idle_timeout_seconds": 3}, IdleTimeout(3)),
        ({"timeout_seconds": 4, "idle_timeout_seconds": 3}, InvocationTimeout(4)),
        ({"total_timeout_seconds": 4, "idle_timeout_seconds": 3}, InvocationTimeout(4, True)),
        ({"first_chunk_timeout_seconds": 3, "timeout_seconds": 9}, InvocationTimeout(9)),
        ({"first_chunk_timeout_seconds": 3, "total_timeout_seconds": 9}, InvocationTimeout(9, True)),
    ],
)
async def test_shortest_time_limit_after_a_chunk_is_the_one_that_is_named(
    settings: Any, expected: Any
) -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(2)
        yield 1
        await anyio.sleep_forever()

    chunks, error, _ = await run(make_loop(**settings), agent)
    assert chunks == [1]
    assert type(error) is type(expected)
    assert str(error) == str(expected)


@pytest.mark.parametrize(
    ("settings", "attempts", "expected", "retries"),
    [
        # Each attempt: after how many seconds it yields (if ever), and what it does then. Between two of them
        # there is a second.
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "total_timeout_seconds": 4},
            [(math.inf, None), (math.inf, None)],
            InvocationTimeout(4, True),
            1,
            id="first chunk, then total",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "total_timeout_seconds": 3.5},
            [(1, OSError()), (math.inf, None)],
            InvocationTimeout(3.5, True),
            1,
            id="error before the first chunk, then total",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "total_timeout_seconds": 4},
            [(math.inf, None), (0.5, "stall")],
            InvocationTimeout(4, True),
            1,
            id="first chunk, then total after a chunk",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "timeout_seconds": 3},
            [(math.inf, None), (1, "stall")],
            InvocationTimeout(3),
            1,
            id="first chunk, then attempt",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "timeout_seconds": 3, "total_timeout_seconds": 5},
            [(math.inf, None), (1, "stall")],
            InvocationTimeout(5, True),
            1,
            id="first chunk, then total before attempt",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "idle_timeout_seconds": 1.5, "total_timeout_seconds": 9},
            [(math.inf, None), (1, "stall")],
            IdleTimeout(1.5),
            1,
            id="first chunk, then idle",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "idle_timeout_seconds": 3, "total_timeout_seconds": 5},
            [(math.inf, None), (1, "stall")],
            InvocationTimeout(5, True),
            1,
            id="first chunk, then total before idle",
        ),
        pytest.param(
            {"idle_timeout_seconds": 1, "total_timeout_seconds": 9},
            [(1, "stall"), (1, "stall")],
            IdleTimeout(1),
            0,
            id="idle, which is not retried",
        ),
        pytest.param(
            {"timeout_seconds": 2, "total_timeout_seconds": 4},
            [(math.inf, None), (math.inf, None)],
            InvocationTimeout(4, True),
            1,
            id="attempt, then total",
        ),
        pytest.param(
            {"timeout_seconds": 2, "total_timeout_seconds": 9, "first_chunk_timeout_seconds": 4},
            [(1, OSError()), (math.inf, None), (math.inf, None)],
            InvocationTimeout(9, True),
            3,
            id="error, attempts, then total",
        ),
        pytest.param(
            {"first_chunk_timeout_seconds": 2, "total_timeout_seconds": 2.5},
            [(math.inf, None)],
            FirstChunkTimeout(2),
            0,
            id="first chunk, and no time for another attempt",
        ),
    ],
)
async def test_time_out_of_a_retried_stream_is_that_of_its_last_attempt(
    settings: Any, attempts: list[tuple[float, Any]], expected: Any, retries: int
) -> None:
    script = iter(attempts)

    async def agent() -> AsyncGenerator[int]:
        seconds, then = next(script, (math.inf, None))
        await anyio.sleep(seconds) if seconds < math.inf else await anyio.sleep_forever()
        if isinstance(then, Exception):
            raise then

        yield 1
        await anyio.sleep_forever()

    plain = Backoff(initial_seconds=1, multiplier=1, jitter="none")
    loop = make_loop(**{"timeout_seconds": None, "max_retries": 5, "backoff": plain, **settings})
    _, error, result = await run(loop, agent)
    assert type(error) is type(expected)
    assert (error.seconds, error.total) == (expected.seconds, expected.total)
    assert str(error) == str(expected)
    assert result.retries == retries
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

    async def agent() -> AsyncGenerator[int]:
        for i in range(100):
            await anyio.sleep(0.01)
            yield i

    async def read_slowly() -> list[int]:
        chunks = []
        async with loop.run_streaming("a", agent) as stream:
            await anyio.sleep(50)
            async for chunk in stream:
                chunks.append(chunk)
                await anyio.sleep(3)

        return chunks

    if nested:
        outer = loop.with_config(timeout_seconds=None)
        assert (await outer.run_single("reader", read_slowly)).unwrap() == list(range(100))
    else:
        assert await read_slowly() == list(range(100))


async def test_time_that_the_reader_takes_is_added_to_what_the_agent_has_left() -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(3)
        for i in range(BUFFER):
            yield i

        await anyio.sleep(3)
        yield 100
        await anyio.sleep(3)

    async with make_loop(timeout_seconds=7).run_streaming("a", agent) as stream:
        await anyio.sleep(1000)
        chunks, error = await read(stream)

    assert chunks == [*range(BUFFER), 100]
    assert isinstance(error, InvocationTimeout)
    assert stream.result.latency_ms == pytest.approx(1_004_000)


async def test_time_that_the_reader_takes_counts_for_the_total() -> None:
    async with make_loop(total_timeout_seconds=20).run_streaming("a", count, 100) as stream:
        await anyio.sleep(50)
        chunks, error = await read(stream)

    assert chunks == list(range(BUFFER))
    assert type(error) is InvocationTimeout
    assert error.total
    assert stream.result.latency_ms == pytest.approx(20_000)


async def test_idle_time_begins_when_the_reader_has_read() -> None:
    async def agent() -> AsyncGenerator[int]:
        for i in range(BUFFER):
            yield i

        await anyio.sleep(2)
        yield 100
        await anyio.sleep(4)

    async with make_loop(idle_timeout_seconds=3).run_streaming("a", agent) as stream:
        await anyio.sleep(50)
        chunks, error = await read(stream)

    assert chunks == [*range(BUFFER), 100]
    assert type(error) is IdleTimeout
    assert stream.result.latency_ms == pytest.approx(55_000)


async def test_agents_own_time_out_is_an_error() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        with anyio.fail_after(1):
            await anyio.sleep(5)

    settings = {"timeout_seconds": 9, "idle_timeout_seconds": 8, "total_timeout_seconds": 10}
    chunks, error, result = await run(make_loop(**settings), agent)
    assert chunks == [1]
    assert type(error) is TimeoutError
    assert result.status is Status.ERROR
    assert result.exception is error


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
        _, error, result = await run(make_loop(**settings), agent)
        assert type(error) is (kind or (IdleTimeout if chunks else FirstChunkTimeout))
        assert type(error.__cause__) is ConnectionError
        assert result.status is Status.TIMEOUT


async def test_agent_that_ends_in_spite_of_its_time_out_has_ended_well() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        with anyio.CancelScope(shield=True):
            await anyio.sleep(5)

        yield 2

    chunks, error, result = await run(make_loop(timeout_seconds=1), agent)
    assert chunks == [1, 2]
    assert error is None
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
        _, error, result = await run(loop, Chunks, failures)
        assert type(error) is ValueError
        assert result.status is Status.ERROR

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
    await run(make_loop(timeout_seconds=30, first_chunk_timeout_seconds=3), agent)
    assert seen[:2] == [3, 30]
    seen.clear()
    await run(make_loop(timeout_seconds=None), agent)
    assert set(seen) == {math.inf}


# -- retries


@pytest.mark.parametrize("failures", [0, 1, 2, 3, 4])
async def test_failure_before_the_first_chunk_is_retried(failures: int) -> None:
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        await checkpoint()
        if calls <= failures:
            raise OSError(calls)

        yield calls

    chunks, error, result = await run(make_loop(max_retries=3), agent)
    assert calls == min(failures, 3) + 1
    assert result.retries == min(failures, 3)
    assert [str(failure) for failure in result.failures] == [str(i + 1) for i in range(failures)]
    # 1, 2 and 4 seconds of backoff.
    assert result.latency_ms == pytest.approx(1000 * (2 ** min(failures, 3) - 1))
    if failures < 4:
        assert chunks == [failures + 1]
        assert result.first_chunk_ms == result.latency_ms
        assert error is None
        assert result.success
    else:
        assert chunks == []
        assert error is result.exception is result.failures[-1]


async def test_failure_after_a_chunk_is_not_retried() -> None:
    calls = 0

    async def agent(error: Exception | None) -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        yield 1
        if error is not None:
            raise error

        await anyio.sleep_forever()

    loop = make_loop(max_retries=3, timeout_seconds=2)
    for failure in (OSError(), Overloaded("3"), None):
        calls = 0
        chunks, error, result = await run(loop, agent, failure)
        assert chunks == [1]
        assert calls == 1
        assert result.retries == 0
        assert result.exception is error
        assert error is failure or isinstance(error, InvocationTimeout)


async def test_overload_waits_as_long_as_it_was_asked_to() -> None:
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise Overloaded("20")

        yield calls

    # Retries through overload do not count.
    chunks, _, result = await run(make_loop(max_retries=1), agent)
    assert chunks == [4]
    assert result.retries == 3
    assert 60_000 <= result.latency_ms <= 75_000


@pytest.mark.parametrize("retry", [False, True])
async def test_first_chunk_time_out_is_retried_if_time_outs_are(retry: bool) -> None:
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        if calls < 3:
            await anyio.sleep(10)

        await anyio.sleep(1)
        yield calls
        await anyio.sleep(3)
        yield calls

    loop = make_loop(max_retries=5, retry_on_timeout=retry, first_chunk_timeout_seconds=2, timeout_seconds=9)
    chunks, error, result = await run(loop, agent)
    if retry:
        assert chunks == [3, 3]
        assert [type(failure) for failure in result.failures] == [FirstChunkTimeout] * 2
        # Two time-outs, 1 and 2 seconds of backoff, and one second.
        assert result.first_chunk_ms == pytest.approx(8000)
    else:
        assert chunks == []
        assert type(error) is FirstChunkTimeout


async def test_attempt_is_timed_anew() -> None:
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        await anyio.sleep(4)
        if calls == 1:
            raise OSError

        for i in range(4):
            await anyio.sleep(1)
            yield i

    loop = make_loop(max_retries=1, timeout_seconds=7.5, first_chunk_timeout_seconds=6)
    chunks, error, result = await run(loop, agent)
    assert chunks == [0, 1, 2]
    assert type(error) is InvocationTimeout
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

    _, _, result = await run(make_loop(max_retries=3), Chunks)
    assert story == ["next", "close"] * 3
    assert result.retries == 2


async def test_total_time_that_is_up_during_a_retry_says_so() -> None:
    async def agent() -> AsyncGenerator[int]:
        await anyio.sleep(1)
        raise OSError
        yield

    _, error, result = await run(make_loop(max_retries=5, total_timeout_seconds=3.5), agent)
    assert type(error) is OSError
    assert error.__notes__ == ["not retried: total_timeout_seconds=3.5 would pass during the wait"]
    assert result.retries == 1


async def test_total_time_that_is_up_while_waiting_for_a_slot_is_a_time_out() -> None:
    loop = make_loop(max_concurrency=1, max_retries=5, total_timeout_seconds=5)

    async def agent() -> AsyncGenerator[int]:
        raise OSError
        yield

    async with anyio.create_task_group() as group:
        async with loop.run_streaming("a", agent) as stream:
            await anyio.wait_all_tasks_blocked()
            group.start_soon(loop.with_config(total_timeout_seconds=None).run_single, "hog", anyio.sleep, 9)
            _, error = await read(stream)
            assert isinstance(error, InvocationTimeout)
            assert isinstance(error.__cause__, OSError)
            assert stream.result.latency_ms == pytest.approx(5000)


# -- errors


@pytest.mark.parametrize("chunks", [0, 1, 15, 16, 17, 40])
async def test_error_is_the_object_that_was_raised_after_the_chunks(chunks: int) -> None:
    error = ValueError("mine")

    async def agent() -> AsyncGenerator[int]:
        for i in range(chunks):
            yield i

        raise error

    seen, caught, result = await run(make_loop(), agent)
    assert seen == list(range(chunks))
    assert caught is error
    assert result.exception is error
    assert (result.status, result.error) == (Status.ERROR, "ValueError: mine")
    assert (error.__cause__, error.__context__) == (None, None)


async def test_error_waits_until_the_chunks_were_read() -> None:
    async def agent() -> AsyncGenerator[int]:
        for i in range(5):
            yield i

        raise ValueError

    async with make_loop().run_streaming("a", agent) as stream:
        await anyio.sleep(1)
        assert stream.result.status is Status.ERROR
        chunks, error = await read(stream)

    assert chunks == list(range(5))
    assert type(error) is ValueError


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
    assert len(seen[0]) == 4
    assert seen == [seen[0]] * 5


async def test_agents_own_group_stays_what_it_is() -> None:
    group = ExceptionGroup("mine", [ValueError(), OSError()])

    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise group

    _, error, _ = await run(make_loop(), agent)
    assert error is group


async def test_error_of_the_body_comes_out_as_the_object_that_it_is() -> None:
    for error in (ValueError("body"), ExceptionGroup("body", [OSError()]), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            async with make_loop().run_streaming("a", count, 100) as stream:
                await anext(stream)
                raise error

        assert caught.value is error
        assert (error.__cause__, error.__context__) == (None, None)
        assert stream.result.status is Status.CANCELLED


async def test_error_of_the_body_wins_over_that_of_the_agent_which_is_in_the_result() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        await checkpoint()
        raise ValueError("agent")

    error = OSError("body")
    with pytest.raises(OSError, match="body") as caught:
        async with make_loop().run_streaming("a", agent) as stream:
            await anyio.sleep(1)
            raise error

    assert caught.value is error
    assert error.__context__ is None
    assert stream.result.error == "ValueError: agent"


async def test_error_that_nobody_read_is_in_the_result_only() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise ValueError("unread")

    loop = make_loop()
    async with loop.run_streaming("a", agent) as stream:
        await anyio.sleep(1)

    assert stream.result.error == "ValueError: unread"
    assert loop.metrics.snapshot().counts[Status.ERROR] == 1


async def test_agents_error_that_the_reader_lets_through_comes_out_once() -> None:
    error = ValueError("mine")

    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise error

    with pytest.raises(ValueError, match="mine") as caught:
        async with make_loop().run_streaming("a", agent) as stream:
            async for _ in stream:
                pass

    assert caught.value is error


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_agent_that_raises_an_end_of_iteration_does_not_look_complete(kind: Any) -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise kind

    chunks, error, result = await run(make_loop(), agent)
    assert chunks == [1]
    # As the language has it for generators.
    assert isinstance(error, RuntimeError)
    assert type(error.__cause__) is kind
    assert result.status is Status.ERROR


async def test_function_that_raises_an_end_of_iteration_does_not_look_complete() -> None:
    def stops_async() -> AsyncIterator[int]:
        raise StopAsyncIteration

    def stops() -> AsyncIterator[int]:
        raise StopIteration

    _, error, result = await run(make_loop(), stops_async)
    assert type(error) is RuntimeError
    assert str(error) == "the agent raised StopAsyncIteration"
    assert type(result.exception) is StopAsyncIteration
    assert error.__cause__ is result.exception
    _, error, _ = await run(make_loop(), stops)
    assert type(error) is RuntimeError


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("reads", [False, True])
async def test_what_is_no_error_of_the_agents_leaves_the_block(kind: Any, entered: bool, reads: bool) -> None:
    error = kind()

    async def agent() -> AsyncGenerator[int]:
        yield 1
        await checkpoint()
        raise error

    async def go() -> None:
        async with loop.run_streaming("a", agent) as stream:
            streams.append(stream)
            if reads:
                assert await anext(stream) == 1
                await anext(stream)
            else:
                await anyio.sleep(1)

    streams: list[AgentStream[int]] = []
    loop = make_loop()
    with pytest.raises(kind) as caught:
        if entered:
            async with loop:
                await go()
        else:
            await go()

    assert caught.value is error
    assert streams[0].result.status is Status.CANCELLED
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


async def test_interrupt_wakes_a_reader_that_waits_for_something_else() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with make_loop().run_streaming("a", agent):
            await anyio.sleep_forever()


async def test_stray_cancellation_is_an_error_of_the_stream() -> None:
    kept: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except anyio.get_cancelled_exc_class() as exc:
            kept.append(exc)
            raise

    async def agent() -> AsyncGenerator[int]:
        yield 1
        raise kept[0]

    chunks, error, result = await run(make_loop(max_retries=3), agent)
    assert chunks == [1]
    assert isinstance(error, InvocationCancelled)
    assert error.__cause__ is kept[0]
    assert result.status is Status.CANCELLED
    assert result.retries == 0


# -- cancellation of the reader


async def cancel_while_waiting(stream: AgentStream[int]) -> None:
    await anext(stream)
    await anyio.sleep_forever()


async def cancel_while_reading(stream: AgentStream[int]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("entered", [False, True])
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
        async with loop.run_streaming("a", agent) as stream:
            streams.append(stream)
            await body(stream)

    streams: list[AgentStream[int]] = []
    loop = make_loop(timeout_seconds=1 if how == "both" else None)
    if entered:
        await loop.__aenter__()

    start = anyio.current_time()
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
    assert streams[0].result.status in (
        {Status.CANCELLED, Status.TIMEOUT} if how == "both" else {"cancelled"}
    )
    if entered:
        await loop.__aexit__(None, None, None)


async def test_reader_that_is_cancelled_from_the_start_starts_no_agent() -> None:
    started = False

    async def agent() -> AsyncGenerator[int]:
        nonlocal started
        started = True
        yield 1

    loop = make_loop()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with loop.run_streaming("a", agent) as stream:
            await anext(stream)

    assert scope.cancelled_caught
    assert not started
    assert stream.result.status is Status.SKIPPED
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


async def test_function_that_gives_no_async_iterable_is_refused() -> None:
    async def coroutine() -> int:
        return 1

    def generator() -> Iterator[int]:
        yield 1

    def nothing() -> None:
        pass

    for agent, what in (
        (coroutine, "coroutine"),
        (generator, "generator"),
        (nothing, "NoneType"),
        (lambda: [1], "list"),
    ):
        _, error, result = await run(make_loop(max_retries=3), agent)
        assert type(error) is TypeError
        assert f"returned a {what}, which `async for` cannot iterate over" in str(error)
        assert "pass an async generator function" in str(error)
        # That would be the same each time.
        assert (result.status, result.retries) == (Status.ERROR, 0)


async def test_what_cannot_be_called_is_refused_at_once() -> None:
    async def coroutine() -> int:
        return 1

    loop: Any = AgentLoop()
    for bad in (None, 5, "agent", [count]):
        with pytest.raises(TypeError, match="must be an async function"):
            loop.run_streaming("a", bad)

    with pytest.raises(TypeError, match=r"not fn\(x\) but fn, x"):
        loop.run_streaming("a", coroutine())

    with pytest.raises(TypeError, match=r"must be an async generator function.*not fn\(x\) but fn, x"):
        loop.run_streaming("a", count(5))

    with pytest.raises(TypeError, match="agent_id must be a str"):
        loop.run_streaming(5, count, 5)


async def test_wrong_arguments_are_the_agents_error() -> None:
    _, error, result = await run(make_loop(max_retries=3), count)
    assert type(error) is TypeError
    assert result.retries == 0


class Chunks:
    """An iterator that is no generator."""

    def __init__(self, upto: int) -> None:
        self.rest = list(range(upto))

    def __aiter__(self) -> Chunks:
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        if not self.rest:
            raise StopAsyncIteration

        return self.rest.pop(0)


class ClosingChunks(Chunks):
    closed = 0

    async def aclose(self) -> None:
        await checkpoint()
        self.closed += 1


class BareChunks:
    """An iterable whose iterator is no iterable."""

    def __init__(self, upto: int) -> None:
        self.upto = upto

    def __aiter__(self) -> Any:
        chunks = Chunks(self.upto)

        class Bare:
            async def __anext__(self) -> int:
                return await chunks.__anext__()

        return Bare()


@pytest.mark.parametrize("size", [0, 5, 50])
@pytest.mark.parametrize("kind", [Chunks, ClosingChunks, BareChunks])
async def test_any_async_iterable_is_streamed(kind: Any, size: int) -> None:
    chunks, error, _ = await run(make_loop(), kind, size)
    assert chunks == list(range(size))
    assert error is None


@pytest.mark.parametrize("early", [False, True])
async def test_iterator_is_closed_once_if_it_can_be(early: bool) -> None:
    for size in (5, 50):
        agent, plain = ClosingChunks(size), Chunks(size)
        for iterable in (agent, plain):
            async with make_loop().run_streaming("a", lambda iterable=iterable: iterable) as stream:
                await anyio.wait_all_tasks_blocked()
                if not early:
                    assert len((await read(stream))[0]) == size

        assert agent.closed == 1


async def test_iterator_that_fails_to_close_after_its_end_has_failed() -> None:
    closed = 0

    class Failing(Chunks):
        async def aclose(self) -> None:
            nonlocal closed
            closed += 1
            await anyio.sleep(3)
            raise OSError("close")

    chunks, error, result = await run(make_loop(idle_timeout_seconds=1), Failing, 3)
    assert chunks == [0, 1, 2]
    assert type(error) is OSError
    assert result.status is Status.ERROR
    assert closed == 1


async def test_iterable_that_fails_to_begin_is_an_error() -> None:
    class Failing:
        def __aiter__(self) -> Any:
            raise OSError("begin")

    class Wrong:
        def __aiter__(self) -> Any:
            return 5

    _, error, _ = await run(make_loop(), Failing)
    assert type(error) is OSError
    _, error, result = await run(make_loop(max_retries=3), Wrong)
    assert type(error) is TypeError
    assert result.retries == 0


async def test_iterating_without_async_with_says_what_to_write() -> None:
    stream = AgentLoop().run_streaming("a", count, 5)
    with pytest.raises(RuntimeError, match=r"write `async with loop.run_streaming\(...\) as stream:`"):
        async for _ in stream:
            pass

    with pytest.raises(RuntimeError, match=r"write `async with loop.run_streaming\(...\) as stream:`"):
        await anext(stream)


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
    refused: list[str] = []

    async def main() -> None:
        for view in (loop.run_streaming("b", count, 1), loop.stream_all([Invocation("b", count, (1,))])):
            try:
                await view.__aenter__()
            except RuntimeError as exc:
                refused.append(str(exc))

    async with loop.run_streaming("a", one_a_second, 5) as stream:
        await anext(stream)
        await anyio.to_thread.run_sync(lambda: anyio.run(main))

    gc.collect()
    assert len(refused) == 2
    assert all("in use in another event loop" in text for text in refused)


# -- context variables

variable: ContextVar[str] = ContextVar("variable", default="unset")


@pytest.mark.parametrize("entered", [False, True])
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

    def agent(name: str) -> AsyncIterator[str]:
        iterator = chunks(name)
        if not iterable:
            return iterator

        class Wrapped:
            def __aiter__(self) -> Any:
                return iterator

        return Wrapped()

    async def go(name: str) -> None:
        read, _, _ = await run(loop, agent, name)
        assert read == ["the reader's", *[name] * 40, "the reader's"]

    loop = make_loop(max_concurrency=2)
    variable.set("the reader's")
    if entered:
        await loop.__aenter__()

    async with anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(go, str(i))

    assert variable.get() == "the reader's"
    if entered:
        await loop.__aexit__(None, None, None)


async def test_attempt_sees_nothing_that_the_one_before_has_set() -> None:
    seen = []

    async def agent() -> AsyncGenerator[int]:
        seen.append(variable.get())
        variable.set("mine")
        await checkpoint()
        if len(seen) < 3:
            raise OSError

        yield 1

    variable.set("the reader's")
    await run(make_loop(max_retries=3), agent)
    assert seen == ["the reader's"] * 3


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


SCOPED = [
    scope_around_the_stream,
    deadline_around_the_stream,
    tasks_around_the_stream,
    shield_around_the_stream,
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["read", "leave", "raise", "cancel", "time out"])
@pytest.mark.parametrize("agent", SCOPED)
async def test_agent_may_yield_in_scopes_of_its_own(agent: Any, how: str, nested: bool) -> None:
    loop = make_loop(max_concurrency=1, total_timeout_seconds=5 if how == "time out" else None)
    results = []

    async def body() -> None:
        async with loop.run_streaming("a", agent, 50) as stream:
            try:
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
            finally:
                streams.append(stream)

    streams: list[AgentStream[int]] = []
    with anyio.fail_after(50):
        with anyio.move_on_after(2 if how == "cancel" else None):
            with pytest.raises(ValueError, match="body") if how == "raise" else nullcontext():
                if nested:
                    (await loop.with_config(total_timeout_seconds=None).run_single("r", body)).unwrap()
                else:
                    await body()

    status = streams[0].result.status
    if how == "read" or (how == "time out" and agent is shield_around_the_stream):
        # No scope of ours reaches into a shielded one.
        assert results == [(list(range(1, 50)), None)]
        assert status is Status.SUCCESS
    elif how == "time out":
        assert results[0][0] in (list(range(1, BUFFER)), list(range(1, BUFFER + 1)))
        assert status is Status.TIMEOUT
    else:
        assert status is Status.CANCELLED


async def test_agents_own_time_limit_counts_while_it_waits_for_its_reader() -> None:
    async def fails() -> AsyncGenerator[int]:
        with anyio.fail_after(5):
            for i in range(50):
                yield i

    async def moves_on() -> AsyncGenerator[int]:
        with anyio.move_on_after(5):
            for i in range(50):
                yield i

        await anyio.sleep(1)
        yield 100

    for agent, end, failure in ((fails, [], TimeoutError), (moves_on, [100], None)):
        async with make_loop(timeout_seconds=20).run_streaming("a", agent) as stream:
            await anyio.sleep(50)
            chunks, error = await read(stream)

        assert chunks == [*range(BUFFER), *end]
        assert failure is None or type(error) is failure
        assert stream.result.status is (Status.ERROR if failure else Status.SUCCESS)


async def test_agents_own_child_that_fails_ends_the_stream_with_its_group() -> None:
    async def fail() -> None:
        await anyio.sleep(5)
        raise OSError

    async def agent() -> AsyncGenerator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            for i in range(50):
                yield i

    async with make_loop().run_streaming("a", agent) as stream:
        await anyio.sleep(50)
        chunks, error = await read(stream)

    assert chunks == list(range(BUFFER))
    assert isinstance(error, ExceptionGroup)
    assert [type(exc) for exc in error.exceptions] == [OSError]


async def test_agents_time_is_limited_on_after_its_own_scope_has_ended() -> None:
    async def agent() -> AsyncGenerator[int]:
        with anyio.move_on_after(5):
            for i in range(50):
                yield i

        await anyio.sleep_forever()

    async with make_loop(timeout_seconds=9).run_streaming("a", agent) as stream:
        await anyio.sleep(50)
        chunks, error = await read(stream)

    assert chunks == list(range(BUFFER))
    assert type(error) is InvocationTimeout
    assert stream.result.latency_ms == pytest.approx(14_000)


async def test_nested_agent_whose_own_scope_ends_while_it_has_no_slot_is_cancelled_from_within() -> None:
    loop = make_loop(max_concurrency=1)

    async def agent() -> AsyncGenerator[int]:
        with anyio.move_on_after(5):
            for i in range(50):
                yield i

    async def reader() -> list[int]:
        async with loop.run_streaming("child", agent) as stream:
            await anyio.sleep(50)
            chunks, error = await read(stream)

        assert isinstance(error, InvocationCancelled)
        return chunks

    assert (await loop.run_single("a", reader)).unwrap() == list(range(BUFFER))


async def test_child_that_fails_while_the_generator_is_closed_is_its_cause() -> None:
    async def fail() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("child")

    async def agent() -> AsyncGenerator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            await checkpoint()
            for i in range(50):
                yield i

    async with make_loop().run_streaming("a", agent) as stream:
        await anyio.wait_all_tasks_blocked()

    assert stream.result.status is Status.CANCELLED
    assert stream.result.exception is not None
    cause = stream.result.exception.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert [str(exc) for exc in cause.exceptions] == ["child"]


async def test_interrupt_in_a_group_while_the_generator_is_closed_comes_through() -> None:
    async def fail() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise Stop

    async def agent() -> AsyncGenerator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            await checkpoint()
            for i in range(50):
                yield i

    with pytest.raises(BaseException) as caught:
        async with make_loop().run_streaming("a", agent):
            await anyio.wait_all_tasks_blocked()

    assert isinstance(caught.value, BaseExceptionGroup)
    assert caught.value.subgroup(Stop) is not None


# -- metrics


async def test_each_stream_is_recorded_once() -> None:
    async def fails(chunks: int) -> AsyncGenerator[int]:
        for i in range(chunks):
            yield i

        raise OSError

    loop = make_loop(max_retries=2, timeout_seconds=3)
    await run(loop, count, 5)
    await run(loop, fails, 0)
    await run(loop, fails, 1)
    await run(loop, one_a_second, 9)
    async with loop.run_streaming("a", one_a_second, 9) as stream:
        await anext(stream)

    snapshot = loop.metrics.snapshot()
    assert {status: number for status, number in snapshot.counts.items() if number} == {
        Status.SUCCESS: 1,
        Status.ERROR: 2,
        Status.TIMEOUT: 1,
        Status.CANCELLED: 1,
    }
    assert snapshot.retries == 2
    assert snapshot.latency.count == 5


async def test_metrics_can_be_switched_off() -> None:
    loop = make_loop(collect_metrics=False)
    chunks, _, _ = await run(loop, count, 500)
    assert len(chunks) == 500
    assert sum(loop.metrics.snapshot().counts.values()) == 0
