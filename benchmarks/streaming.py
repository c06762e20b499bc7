"""
What a chunk costs on its way from an agent to its reader, side by side in one run.

    python benchmarks/streaming.py --backend trio

``direct`` iterates over the generator, with nothing in between. ``plain`` sends each chunk through a memory
object stream from one task to another. ``agentloop`` is ``run_streaming`` with a time-out for each attempt, a
slot, metrics and a context of its own; ``idle`` has a time-out between chunks besides.
"""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeAlias

import anyio
import rounds
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, ChunkEvent, Invocation, LoopConfig

Agent: TypeAlias = Callable[[int], AsyncIterator[int]]
Way: TypeAlias = Callable[[Agent, int], Awaitable[int]]

FAN = 10


async def at_once(chunks: int) -> AsyncIterator[int]:
    for index in range(chunks):
        yield index


async def one_checkpoint(chunks: int) -> AsyncIterator[int]:
    for index in range(chunks):
        await checkpoint()
        yield index


async def direct(agent: Agent, chunks: int) -> int:
    count = 0
    async for _ in agent(chunks):
        count += 1

    return count


def plain(buffer: int) -> Way:
    async def run(agent: Agent, chunks: int) -> int:
        count = 0
        send, receive = anyio.create_memory_object_stream[int](buffer)

        async def produce() -> None:
            async with send:
                async for chunk in agent(chunks):
                    await send.send(chunk)

        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            async with receive:
                async for _ in receive:
                    count += 1

        return count

    return run


def ours(config: LoopConfig) -> Way:
    async def run(agent: Agent, chunks: int) -> int:
        count = 0
        async with AgentLoop(config).run_streaming("agent", agent, chunks) as stream:
            async for _ in stream:
                count += 1

        return count

    return run


async def fanned(agent: Agent, chunks: int) -> int:
    count = 0
    invocations = Invocation.map(agent, [chunks // FAN] * FAN)
    async with AgentLoop().stream_all(invocations) as events:
        async for event in events:
            count += isinstance(event, ChunkEvent)

    return count


DIRECT, PLAIN, OURS, FANNED = "direct", "plain, buffer 16", "agentloop", f"stream_all of {FAN}"
WAYS: dict[str, Way] = {
    DIRECT: direct,
    "plain, buffer 0": plain(0),
    PLAIN: plain(16),
    OURS: ours(LoopConfig()),
    "agentloop, idle": ours(LoopConfig(first_chunk_timeout_seconds=30, idle_timeout_seconds=30)),
    FANNED: fanned,
}


async def measure(way: Way, agent: Agent, chunks: int) -> float:
    """Return how long a chunk takes, in microseconds."""
    start = time.perf_counter()
    count = await way(agent, chunks)
    seconds = time.perf_counter() - start
    assert count == chunks, f"{count} of {chunks} chunks have come"
    return seconds / chunks * 1e6


async def compare(agent: Agent, chunks: int, repeats: int) -> rounds.Samples:
    return await rounds.alternate(
        {name: partial(measure, way, agent, chunks) for name, way in WAYS.items()}, repeats
    )


async def show(chunks: int, repeats: int) -> None:
    for agent in (at_once, one_checkpoint):
        samples = await compare(agent, chunks, repeats)
        print(f"\n{agent.__name__:20} {'us a chunk':>10} {'plain (16) is slower by':>24}")
        for name in samples:
            print(f"{name:20} {samples.median(name):>10.1f} {samples.ratio(PLAIN, name):>23.2f}x", flush=True)


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    chunks, repeats = (200, 1) if quick else (10_000, 9)
    samples = rounds.run(compare, backend, one_checkpoint, chunks, repeats)
    return {
        f"{title}, times as fast a chunk as a plain memory object stream": f"{samples.ratio(PLAIN, way):.1f}x"
        for title, way in {"`run_streaming`": OURS, f"`stream_all` of {FAN}": FANNED}.items()
    }


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{options.backend}, CPython {platform.python_version()}, {options.chunks} chunks, medians")
    print(rounds.insides(options.backend))
    rounds.run(show, options.backend, options.chunks, options.rounds)


if __name__ == "__main__":
    main()
