"""
What a chunk costs on its way from an agent to its reader, side by side in one run.

    python benchmarks/streaming.py --backend trio

``direct`` iterates over the generator, with nothing in between. ``plain`` sends each chunk through a memory
object stream from one task to another. ``agentloop`` is ``run_streaming`` with a time-out for each attempt, a
slot, metrics and a context of its own; ``idle`` has a time-out between chunks besides.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Invocation, LoopConfig

Agent: TypeAlias = Callable[[int], AsyncIterator[int]]
Way: TypeAlias = Callable[[Agent, int], Awaitable[None]]

FAN = 10


async def at_once(chunks: int) -> AsyncIterator[int]:
    for index in range(chunks):
        yield index


async def one_checkpoint(chunks: int) -> AsyncIterator[int]:
    for index in range(chunks):
        await checkpoint()
        yield index


async def direct(agent: Agent, chunks: int) -> None:
    async for _ in agent(chunks):
        pass


def plain(buffer: int) -> Way:
    async def run(agent: Agent, chunks: int) -> None:
        send, receive = anyio.create_memory_object_stream[int](buffer)

        async def produce() -> None:
            async with send:
                async for chunk in agent(chunks):
                    await send.send(chunk)

        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            async with receive:
                async for _ in receive:
                    pass

    return run


def ours(config: LoopConfig) -> Way:
    async def run(agent: Agent, chunks: int) -> None:
        async with AgentLoop(config).run_streaming("agent", agent, chunks) as stream:
            async for _ in stream:
                pass

    return run


async def fanned(agent: Agent, chunks: int) -> None:
    invocations = Invocation.map(agent, [chunks // FAN] * FAN)
    async with AgentLoop().stream_all(invocations) as events:
        async for _ in events:
            pass


async def main(chunks: int, rounds: int) -> None:
    ways: dict[str, Way] = {
        "direct": direct,
        "plain, buffer 0": plain(0),
        "plain, buffer 16": plain(16),
        "agentloop": ours(LoopConfig()),
        "agentloop, idle": ours(LoopConfig(first_chunk_timeout_seconds=30, idle_timeout_seconds=30)),
        f"stream_all of {FAN}": fanned,
    }
    for agent in (at_once, one_checkpoint):
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                await run(agent, chunks)
                costs[name].append((time.perf_counter() - start) / chunks * 1e6)

        print(f"\n{agent.__name__:20} {'us a chunk':>10} {'plain (16) is slower by':>24}")
        for name, samples in costs.items():
            ratios = [theirs / mine for theirs, mine in zip(costs["plain, buffer 16"], samples, strict=True)]
            print(f"{name:20} {statistics.median(samples):>10.1f} {statistics.median(ratios):>23.2f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{options.backend}, CPython {platform.python_version()}, {options.chunks} chunks, medians")
    anyio.run(main, options.chunks, options.rounds, backend=options.backend)
