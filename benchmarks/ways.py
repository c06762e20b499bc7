"""
Ways to run many agents with a limit: ours, those of others, and what one would write by hand.

Each takes an agent, how many invocations and how many at once, and returns what they returned. Each has a
time-out of 300 s and three retries without a pause, but for the bare ones, ``aiometer`` and ``streamable``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Backoff, ChunkEvent, Invocation, LoopConfig

Agent: TypeAlias = Callable[[int], Awaitable[int]]
Way: TypeAlias = Callable[[Agent, int, int], Awaitable[list[Any]]]

TIMEOUT_SECONDS = 300
MAX_RETRIES = 3
NESTED = 3  # how many others an agent runs
CHUNKS = 3  # how many an agent streams


# -- agents, each of which returns its index


def at_once() -> Agent:
    async def agent(index: int) -> int:
        return index

    return agent


def one_checkpoint() -> Agent:
    async def agent(index: int) -> int:
        await checkpoint()  # AnyIO's own, on every backend
        return index

    return agent


def sleeping(seconds: float) -> Agent:
    async def agent(index: int) -> int:
        await anyio.sleep(seconds)
        return index

    return agent


def failing_once() -> Agent:
    failed: set[int] = set()

    async def agent(index: int) -> int:
        await checkpoint()
        if index not in failed:
            failed.add(index)
            # No OSError: as many in a row as run at once would be an outage.
            raise RuntimeError

        return index

    return agent


def streaming() -> Callable[[int], AsyncIterator[int]]:
    async def agent(index: int) -> AsyncIterator[int]:
        for _ in range(CHUNKS):
            await checkpoint()
            yield index

    return agent


AGENTS: dict[str, Callable[[], Any]] = {
    "at-once": at_once,
    "checkpoint": one_checkpoint,
    "1-ms": partial(sleeping, 0.001),
    "retried": failing_once,
    "nested": one_checkpoint,
    "streamed": streaming,
}


# -- the floor


async def bare_workers(agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    indices = iter(range(count))

    async def work() -> None:
        for index in indices:
            while True:
                try:
                    outputs.append(await agent(index))
                    break
                except RuntimeError:
                    pass

    async with anyio.create_task_group() as group:
        for _ in range(limit):
            group.start_soon(work)

    return outputs


# -- ours: with metrics, a context for each, a time-out, and retries


def new_loop(limit: int) -> AgentLoop:
    # The defaults, but for the pause before a retry, which most of the others do not make.
    return AgentLoop(LoopConfig(max_concurrency=limit, backoff=Backoff(initial_seconds=0)))


async def run_all(agent: Agent, count: int, limit: int, loop: AgentLoop | None = None) -> list[Any]:
    return await (loop or new_loop(limit)).run_all(Invocation.map(agent, range(count)))


async def as_completed(agent: Agent, count: int, limit: int) -> list[Any]:
    async with new_loop(limit).as_completed(Invocation.map(agent, range(count))) as results:
        return [result.output async for result in results]


def single(loop: AgentLoop, agent: Agent) -> Callable[[int], Coroutine[Any, Any, Any]]:
    return lambda index: loop.run_single(f"agent-{index}", agent, index)


async def run_single(agent: Agent, count: int, limit: int) -> list[Any]:
    return await bare_workers(single(new_loop(limit), agent), count, limit)


async def run_single_at_once(agent: Agent, count: int, limit: int) -> list[Any]:
    results: list[Any] = []
    run = single(new_loop(limit), agent)

    async def one(index: int) -> None:
        results.append(await run(index))

    await each_in_a_task(one, count)
    return results


async def run_single_in_turn(agent: Agent, count: int, limit: int) -> list[Any]:
    run = single(new_loop(limit), agent)
    return [await run(index) for index in range(count)]


# -- the original that this library replaces, which knows asyncio only


@dataclass
class OriginalResult:
    agent_id: str
    success: bool
    output: Any
    error: str | None
    latency_ms: float
    retries: int


class Original:
    def __init__(self, limit: int) -> None:
        self.semaphore = asyncio.Semaphore(limit)
        self.latencies: list[float] = []

    async def run_single(
        self, agent_id: str, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> OriginalResult:
        start, error = time.perf_counter(), ""
        async with self.semaphore:
            for retries in range(MAX_RETRIES + 1):
                try:
                    output = await asyncio.wait_for(fn(*args, **kwargs), TIMEOUT_SECONDS)
                except TimeoutError:
                    error = f"Timeout after {TIMEOUT_SECONDS}s"
                except Exception as exc:
                    error = str(exc)
                else:
                    latency = (time.perf_counter() - start) * 1000
                    self.latencies.append(latency)
                    return OriginalResult(agent_id, True, output, None, latency, retries)

        return OriginalResult(agent_id, False, None, error, (time.perf_counter() - start) * 1000, MAX_RETRIES)

    async def run_all(
        self, invocations: Sequence[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
    ) -> list[OriginalResult]:
        return await asyncio.gather(
            *(self.run_single(agent_id, fn, *args, **kwargs) for agent_id, fn, args, kwargs in invocations)
        )


async def original(agent: Agent, count: int, limit: int) -> list[Any]:
    return await Original(limit).run_all([(f"agent-{index}", agent, (index,), {}) for index in range(count)])


async def original_in_turn(agent: Agent, count: int, limit: int) -> list[Any]:
    loop = Original(limit)
    return [await loop.run_single(f"agent-{index}", agent, index) for index in range(count)]


# -- by hand


async def bare_in_turn(agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    semaphore = asyncio.Semaphore(limit)
    for index in range(count):
        async with semaphore:
            outputs.append(await asyncio.wait_for(agent(index), TIMEOUT_SECONDS))

    return outputs


def bounded(agent: Agent, limit: int, outputs: list[int]) -> Callable[[int], Coroutine[Any, Any, None]]:
    semaphore = asyncio.Semaphore(limit)

    async def one(index: int) -> None:
        for attempt in range(MAX_RETRIES + 1):
            try:
                async with semaphore, asyncio.timeout(TIMEOUT_SECONDS):
                    outputs.append(await agent(index))
                    return
            except Exception:
                if attempt == MAX_RETRIES:
                    raise

    return one


async def gathered(agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    await asyncio.gather(*map(bounded(agent, limit, outputs), range(count)))
    return outputs


async def task_group(agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    one = bounded(agent, limit, outputs)
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(one(index))

    return outputs


async def each_in_a_task(one: Callable[[int], Awaitable[object]], count: int) -> None:
    async with anyio.create_task_group() as group:
        for index in range(count):
            group.start_soon(one, index)


async def bare_tasks(agent: Agent, count: int, limit: int) -> list[None]:
    """Run a task each and nothing else, whatever the limit and the outputs."""
    del limit
    await each_in_a_task(agent, count)
    return []


async def naive(agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    limiter = anyio.CapacityLimiter(limit)

    async def one(index: int) -> None:
        for attempt in range(MAX_RETRIES + 1):
            try:
                async with limiter:
                    with anyio.fail_after(TIMEOUT_SECONDS):
                        outputs.append(await agent(index))
                        return
            except Exception:
                if attempt == MAX_RETRIES:
                    raise

    await each_in_a_task(one, count)
    return outputs


async def decorated(retry: Any, agent: Agent, count: int, limit: int) -> list[int]:
    outputs: list[int] = []
    limiter = anyio.CapacityLimiter(limit)

    @retry
    async def one(index: int) -> None:
        async with limiter:
            with anyio.fail_after(TIMEOUT_SECONDS):
                outputs.append(await agent(index))

    await each_in_a_task(one, count)
    return outputs


async def with_tenacity(agent: Agent, count: int, limit: int) -> list[int]:
    import tenacity

    retry = tenacity.retry(stop=tenacity.stop_after_attempt(MAX_RETRIES + 1), reraise=True)
    return await decorated(retry, agent, count, limit)


async def with_stamina(agent: Agent, count: int, limit: int) -> list[int]:
    import stamina
    from stamina.instrumentation import set_on_retry_hooks

    set_on_retry_hooks([])  # it would write a line for each retry
    retry = stamina.retry(
        on=Exception, attempts=MAX_RETRIES + 1, timeout=None, wait_initial=0, wait_max=0, wait_jitter=0
    )
    return await decorated(retry, agent, count, limit)


async def with_aiometer(agent: Agent, count: int, limit: int) -> list[int]:
    import aiometer

    return await aiometer.run_all([partial(agent, index) for index in range(count)], max_at_once=limit)


async def with_streamable(agent: Agent, count: int, limit: int) -> list[int]:
    import streamable

    return [output async for output in streamable.stream(range(count)).map(agent, concurrency=limit)]


# -- agents that run others: each fourth one runs the three after it, and then itself


async def nest(
    way: Way, inner: Callable[[range], Awaitable[list[Any]]], agent: Agent, count: int, limit: int
) -> list[Any]:
    """
    Run agents that run others.

    :param way: how to run the outer ones
    :param inner: how an outer one runs the inner ones
    """
    outputs: list[Any] = []

    async def outer(index: int) -> int:
        first = index * (NESTED + 1)
        outputs.extend(await inner(range(first + 1, min(first + NESTED + 1, count))))
        outputs.append(await agent(first))
        return index

    await way(outer, -(-count // (NESTED + 1)), limit)
    return outputs


async def nested_bare(agent: Agent, count: int, limit: int) -> list[Any]:
    async def inner(indices: range) -> list[int]:
        return [await agent(index) for index in indices]

    return await nest(bare_workers, inner, agent, count, limit)


async def nested_batches(agent: Agent, count: int, limit: int) -> list[Any]:
    loop = new_loop(limit)

    async def inner(indices: range) -> list[Any]:
        return await loop.run_all(Invocation.map(agent, indices))

    return await nest(partial(run_all, loop=loop), inner, agent, count, limit)


async def nested_singles(agent: Agent, count: int, limit: int) -> list[Any]:
    loop = new_loop(limit)
    run = single(loop, agent)

    async def inner(indices: range) -> list[Any]:
        return [await run(index) for index in indices]

    return await nest(partial(run_all, loop=loop), inner, agent, count, limit)


async def nested_gathered(agent: Agent, count: int, limit: int) -> list[Any]:
    async def inner(indices: range) -> list[int]:
        outputs: list[int] = []
        # The outer agents can hold all of their semaphore while they wait, so the inner ones need another.
        await asyncio.gather(*map(bounded(agent, NESTED, outputs), indices))
        return outputs

    return await nest(gathered, inner, agent, count, limit)


# -- agents that stream; each way returns all chunks


async def streamed_bare(agent: Any, count: int, limit: int) -> list[int]:
    chunks: list[int] = []

    async def read(index: int) -> int:
        chunks.extend([chunk async for chunk in agent(index)])
        return index

    await bare_workers(read, count, limit)
    return chunks


async def run_streaming(agent: Any, count: int, limit: int) -> list[int]:
    loop = new_loop(limit)
    chunks: list[int] = []

    async def read(index: int) -> int:
        async with loop.run_streaming(f"agent-{index}", agent, index) as stream:
            chunks.extend([chunk async for chunk in stream])

        return index

    await bare_workers(read, count, limit)
    return chunks


async def stream_all(agent: Any, count: int, limit: int) -> list[int]:
    async with new_loop(limit).stream_all(Invocation.map(agent, range(count))) as events:
        return [event.chunk async for event in events if isinstance(event, ChunkEvent)]


async def streamed_naive(agent: Any, count: int, limit: int) -> list[int]:
    send, receive = anyio.create_memory_object_stream[int](16)
    limiter = anyio.CapacityLimiter(limit)

    async def one(index: int) -> None:
        async with limiter:
            with anyio.fail_after(TIMEOUT_SECONDS):
                async for chunk in agent(index):
                    await send.send(chunk)

    async def produce() -> None:
        async with send:
            await each_in_a_task(one, count)

    async with anyio.create_task_group() as group, receive:
        group.start_soon(produce)
        return [chunk async for chunk in receive]


FLOOR = "bare workers, the floor"
TASKS = "anyio, a task each, nothing else"
OURS = "run_all"
AS_COMPLETED = "as_completed"
SINGLE = "run_single, by workers"
SINGLE_AT_ONCE = "run_single, all in line at once"
ORIGINAL = "original: gather, wait_for"
GATHERED = "gather, semaphore, timeout"
TASK_GROUP = "asyncio.TaskGroup, timeout"
AIOMETER = "aiometer"
STREAMABLE = "streamable"
NAIVE = "anyio, a task each"
TENACITY = "... and tenacity"
STAMINA = "... and stamina"

# The first of each of these is the floor, and the second is ours that the others are compared with.
TOGETHER: dict[str, Way] = {
    FLOOR: bare_workers,
    OURS: run_all,
    AS_COMPLETED: as_completed,
    SINGLE: run_single,
    SINGLE_AT_ONCE: run_single_at_once,
    ORIGINAL: original,
    GATHERED: gathered,
    TASK_GROUP: task_group,
    AIOMETER: with_aiometer,
    STREAMABLE: with_streamable,
    NAIVE: naive,
    TENACITY: with_tenacity,
    STAMINA: with_stamina,
}

NESTED_PEER = "gather in gather"
OTHERWISE: dict[str, dict[str, Way]] = {
    "nested": {
        FLOOR: nested_bare,
        "run_all in run_all": nested_batches,
        "run_single, in turn, in run_all": nested_singles,
        NESTED_PEER: nested_gathered,
    },
    "streamed": {
        FLOOR: streamed_bare,
        "stream_all": stream_all,
        "run_streaming, by workers": run_streaming,
        "anyio, a task each, one memory stream": streamed_naive,
    },
}

OURS_IN_TURN = "run_single"
ORIGINAL_IN_TURN = "original run_single"
BARE_IN_TURN = "bare semaphore, wait_for"
IN_TURN: dict[str, Way] = {
    FLOOR: bare_workers,
    OURS_IN_TURN: run_single_in_turn,
    ORIGINAL_IN_TURN: original_in_turn,
    BARE_IN_TURN: bare_in_turn,
}

ASYNCIO_ONLY = {ORIGINAL, GATHERED, TASK_GROUP, STREAMABLE, ORIGINAL_IN_TURN, BARE_IN_TURN, NESTED_PEER}
NEVER_RETRY = {AIOMETER, STREAMABLE, BARE_IN_TURN}
PACKAGES = {AIOMETER: "aiometer", STREAMABLE: "streamable", TENACITY: "tenacity", STAMINA: "stamina"}
MISSING = [package for package in PACKAGES.values() if importlib.util.find_spec(package) is None]


def choose(ways: dict[str, Way], backend: str, agent: str) -> dict[str, Way]:
    """Return the ways that are installed, know the backend, and get such agents done."""
    left_out = {way for way, package in PACKAGES.items() if package in MISSING}
    if backend == "trio":
        left_out |= ASYNCIO_ONLY

    if agent == "retried":
        left_out |= NEVER_RETRY

    return {name: way for name, way in ways.items() if name not in left_out}
