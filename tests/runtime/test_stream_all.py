"""stream_all: many streams, fanned into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
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
    run_into,
    run_scheduled,
    within,
)

from agentloop import (
    AgentLoop,
    BatchStopped,
    ChunkEvent,
    FirstChunkTimeout,
    IdleTimeout,
    Invocation,
    InvocationCancelled,
    InvocationTimeout,
    LoopConfig,
    ResultEvent,
    Status,
)
from agentloop.testing import Chunks, FakeAgent, Stall


async def run(loop: AgentLoop, inputs: Any) -> tuple[dict[int, list[Any]], dict[int, Any]]:
    """Return chunks and results by the index of their stream; check that no chunk follows a result."""
    chunks: dict[int, list[Any]] = {}
    results: dict[int, Any] = {}
    async with loop.stream_all(inputs) as events:
        async for event in events:
            assert isinstance(event.invocation, Invocation)
            if isinstance(event, ChunkEvent):
                assert event.index not in results
                chunks.setdefault(event.index, []).append(event.chunk)
            else:
                assert isinstance(event, ResultEvent)
                assert event.result.index not in results
                results[event.result.index] = event.result

    return chunks, results


# -- events


@pytest.mark.parametrize("agent", [count, count_at_once, one_a_second])
@pytest.mark.parametrize("limit", [1, 2, 7, 100])
async def test_each_stream_is_whole_and_in_order_and_then_has_its_result(agent: Any, limit: int) -> None:
    sizes = [0, 1, 15, 16, 17, 40, 0, 3]
    chunks, results = await run(make_loop(max_concurrency=limit), Invocation.map(agent, sizes))
    assert chunks == {index: list(range(size)) for index, size in enumerate(sizes) if size}
    assert sorted(results) == list(range(len(sizes)))
    assert [results[index].chunks for index in range(len(sizes))] == sizes
    assert all(result.success for result in results.values())


@pytest.mark.long
@backends
def test_events_hold_their_order_in_any_schedule(backend: Any) -> None:
    async def main(seed: int) -> None:
        async def agent(x: int) -> AsyncGenerator[tuple[int, int]]:
            for i in range(x):
                if (x + i + seed) % 3:
                    await anyio.sleep((x * i + seed) % 5)

                yield x, i

            if x % 2:
                raise OSError(x)

        loop = make_loop(max_concurrency=1 + seed % 4)
        chunks, results = await run(loop, Invocation.map(agent, range(25)))
        assert chunks == {x: [(x, i) for i in range(x)] for x in range(1, 25)}
        assert [results[x].success for x in range(25)] == [x % 2 == 0 for x in range(25)]

    for seed in range(20):
        run_scheduled(backend, seed, main, seed)


async def test_events_are_values_that_say_whose_they_are() -> None:
    inputs = [Invocation("a", count, (1,)), Invocation("b", count, (1,))]
    async with make_loop(max_concurrency=1).stream_all(inputs) as events:
        seen = [event async for event in events]

    assert [type(event) for event in seen] == [ChunkEvent, ResultEvent] * 2
    assert [event.invocation for event in seen] == [inputs[0], inputs[0], inputs[1], inputs[1]]
    assert seen[0] == ChunkEvent(inputs[0], 0, 0)
    assert seen[2] == ChunkEvent(inputs[1], 0, 1)
    for event in seen:
        with pytest.raises(AttributeError):
            event.invocation = inputs[0]


async def result_events(loop: AgentLoop) -> list[ResultEvent]:
    async with loop.stream_all(Invocation.map(one_a_second, [3, 1, 2])) as events:
        return [event async for event in events if isinstance(event, ResultEvent)]


async def test_result_is_told_as_an_event_sink_is_told() -> None:
    told: list[Any] = []
    loop = AgentLoop(LoopConfig(max_concurrency=3), on_event=told.append)
    events = await result_events(loop)
    assert events == [event for event in told if isinstance(event, ResultEvent)]
    assert [event.result.index for event in events] == [1, 2, 0]


async def test_result_has_an_id_and_a_time_without_an_event_sink() -> None:
    start = anyio.current_time()
    events = [event for _ in range(2) for event in await result_events(make_loop())]
    assert len({event.id for event in events} - {0}) == 6
    assert [event.at - start for event in events] == pytest.approx([1, 2, 3, 4, 5, 6])


async def test_chunks_of_many_streams_come_as_they_are_produced() -> None:
    async def agent(offset: float) -> AsyncGenerator[float]:
        await anyio.sleep(offset)
        for _ in range(3):
            yield anyio.current_time()
            await anyio.sleep(1)

    times = []
    async with make_loop().stream_all(Invocation.map(agent, [0.0, 0.25, 0.5])) as events:
        async for event in events:
            if isinstance(event, ChunkEvent):
                assert event.chunk == anyio.current_time()
                times.append(event.index)

    assert times == [0, 1, 2] * 3


async def test_function_that_gives_no_async_iterable_fails_alone() -> None:
    inputs = [Invocation("a", double, (1,)), Invocation("b", count, (2,))]
    chunks, results = await run(make_loop(max_retries=3), inputs)
    assert chunks == {1: [0, 1]}
    assert "cannot iterate over: pass an async generator function" in results[0].error
    assert results[0].retries == 0


# -- limits


async def test_time_that_the_reader_takes_is_not_counted() -> None:
    loop = make_loop(timeout_seconds=5, idle_timeout_seconds=1, max_concurrency=3)
    async with loop.stream_all(Invocation.map(count, [30] * 5)) as events:
        seen = Counter[Any]()
        async for event in events:
            seen[type(event)] += 1
            if isinstance(event, ResultEvent):
                assert event.result.success

            await anyio.sleep(2)

    assert seen == {ChunkEvent: 150, ResultEvent: 5}


# -- failures


async def test_failed_stream_leaves_its_siblings_running() -> None:
    error = ValueError("mine")

    async def agent(x: int) -> AsyncGenerator[int]:
        for i in range(5):
            await anyio.sleep(1)
            yield i
            if x % 2 and i == x:
                raise error

    chunks, results = await run(make_loop(), Invocation.map(agent, range(6)))
    assert [len(chunks[x]) for x in range(6)] == [5, 2, 5, 4, 5, 5]
    assert [results[x].exception for x in range(6)] == [None, error, None, error, None, None]


async def test_time_outs_are_those_of_each_stream() -> None:
    scripts = Chunks(then=Stall()), Chunks([0], then=Stall()), Chunks(range(99), gap_seconds=1)
    loop = make_loop(first_chunk_timeout_seconds=2, idle_timeout_seconds=3, timeout_seconds=10.5)
    chunks, results = await run(loop, [Invocation("a", FakeAgent(script)) for script in scripts])
    kinds = [FirstChunkTimeout, IdleTimeout, InvocationTimeout]
    assert [type(results[x].exception) for x in range(3)] == kinds
    assert [len(chunks.get(x, [])) for x in range(3)] == [0, 1, 11]


async def test_failure_before_the_first_chunk_is_retried_and_none_after_it() -> None:
    agents = [
        FakeAgent(OSError(), OSError(), Chunks(["a"])),
        FakeAgent(Chunks(["b"], then=OSError)),
        FakeAgent(Chunks(["c"])),
    ]
    loop = make_loop(max_retries=3, max_concurrency=1)
    chunks, results = await run(loop, [Invocation("a", agent) for agent in agents])
    # Its slot is not held meanwhile.
    assert [*chunks.items()] == [(1, ["b"]), (2, ["c"]), (0, ["a"])]
    assert [len(agent.calls) for agent in agents] == [3, 1, 1]
    assert [(results[x].status, results[x].retries) for x in range(3)] == [
        (Status.SUCCESS, 2),
        (Status.ERROR, 0),
        (Status.SUCCESS, 0),
    ]


# -- ends


async def test_leaving_early_closes_every_generator() -> None:
    opened = closed = 0

    async def agent(x: int) -> AsyncGenerator[int]:
        nonlocal opened, closed
        opened += 1
        try:
            # All begin before one has filled the buffer.
            await anyio.sleep(1)
            for i in range(100):
                if x % 2:
                    await anyio.sleep(1)

                yield i
        finally:
            await anyio.sleep(0) if x % 2 == 0 else None
            closed += 1

    loop = make_loop(max_concurrency=4)
    async with loop.stream_all(Invocation.map(agent, range(10))) as events:
        for _ in range(5):
            await anext(events)

        await anyio.sleep(2)

    assert opened == closed == 4
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 4


@pytest.mark.parametrize("scope", ["scope", "group"])
async def test_agents_that_yield_in_scopes_of_their_own_can_be_left(scope: str) -> None:
    async def agent(x: int) -> AsyncGenerator[int]:
        # All begin before one has filled the buffer.
        await anyio.sleep(1)
        if scope == "scope":
            with anyio.CancelScope(shield=x % 2 == 0):
                for i in range(50):
                    yield i
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 1000)
                for i in range(50):
                    yield i

    loop = make_loop()
    with anyio.fail_after(50):
        async with loop.stream_all(Invocation.map(agent, range(4))) as events:
            await anext(events)
            await anyio.wait_all_tasks_blocked()

    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 4


# -- nested use


@entered_or_not
@pytest.mark.parametrize("agent", [count, count_at_once, one_a_second])
async def test_agent_fans_in_and_runs_others_between_events_at_limit_1(agent: Any, entered: bool) -> None:
    loop = make_loop(max_concurrency=1, timeout_seconds=None)

    async def parent() -> int:
        total = 0
        async with loop.stream_all(Invocation.map(agent, [40, 40, 40])) as events:
            async for event in events:
                if isinstance(event, ChunkEvent):
                    total += (await loop.run_single("b", double, event.chunk)).unwrap()

        return total

    async with within(loop, entered):
        with anyio.fail_after(1000):
            result = await loop.run_single("a", parent)

    assert result.unwrap() == 2 * 3 * sum(range(40))


# -- in an entered loop


async def test_leaving_the_loop_starts_nothing_new_and_ends_what_nobody_reads() -> None:
    loop = make_loop(max_concurrency=2)
    async with loop:
        reader = loop.stream_all(Invocation.map(count, [50] * 5))
        events = await reader.__aenter__()
        await anyio.sleep(1)

    seen = []
    with pytest.raises(BatchStopped, match="the loop was left"):
        async for event in events:
            seen.append(event)

    results = [event.result for event in seen if isinstance(event, ResultEvent)]
    assert [result.status for result in results] == [Status.CANCELLED] * 2
    assert all(isinstance(result.exception, InvocationCancelled) for result in results)
    assert len(seen) - 2 == sum(result.chunks for result in results)
    await reader.__aexit__(None, None, None)


async def test_leaving_the_loop_by_an_exception_gives_each_stream_its_result() -> None:
    loop = make_loop(max_concurrency=2)
    results: list[Any] = []

    async def go() -> None:
        with pytest.raises(BatchStopped, match="the loop was left by KeyError"):
            await run_into(results, "stream_all", loop, Invocation.map(one_a_second, [50] * 5))

    async with anyio.create_task_group() as group:
        with pytest.raises(KeyError):
            async with loop:
                group.start_soon(go)
                await anyio.sleep(2.5)
                raise KeyError

    assert [(result.status, result.chunks) for result in results] == [(Status.CANCELLED, 2)] * 2
