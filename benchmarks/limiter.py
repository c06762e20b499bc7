"""
What a slot costs: one task that never waits for it, 100 tasks that stand in line for 10, and a batch with
one limiter for each of ten keys.

    python benchmarks/limiter.py --backend trio

Processor time per call of an agent that reaches one checkpoint, medians. A slot of ours is taken by
``run_single``, which also times, retries and measures. The limiter with room has slots for all. In the batch,
100 run at once, and the keys come in turn or at random.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import anyio
import rounds
from ways import Agent, one_checkpoint

from agentloop import AgentLoop, Invocation, KeyedLimiter, Limiter, LoopConfig

Call: TypeAlias = Callable[[Agent, int], Awaitable[Any]]

LIMIT, TASKS = 10, 100
KEYS = TASKS // LIMIT


def bare(_: int) -> Call:
    return lambda agent, index: agent(index)


def anyio_limiter(limit: int) -> Call:
    limiter = anyio.CapacityLimiter(limit)

    async def call(agent: Agent, index: int) -> int:
        async with limiter:
            return await agent(index)

    return call


def ours(make_limiter: Callable[[int], Limiter], limit: int) -> Call:
    """Share a limiter between two loops, which take turns."""
    limiter = make_limiter(limit)
    loops = [AgentLoop(LoopConfig(), limiter=limiter) for _ in range(2)]
    return lambda agent, index: loops[index % 2].run_single("agent", agent, index)


def one_key(limit: int) -> KeyedLimiter:
    return KeyedLimiter(lambda _: None, lambda _: Limiter(limit))


def many_keys(order: list[int]) -> KeyedLimiter:
    """Return a limiter for the inputs of a batch, each of which is its place in the order."""
    return KeyedLimiter(lambda invocation: order[invocation.args[0]], lambda _: Limiter(LIMIT))


BARE, ANYIO, OURS, ROOMY = "no limiter", "anyio.CapacityLimiter", "Limiter", "Limiter with room"
KEYED, IN_TURN, AT_RANDOM = "KeyedLimiter, one key", "ten keys in turn", "ten keys at random"
LIMITERS: dict[str, Callable[[int], Call]] = {
    BARE: bare,
    ANYIO: anyio_limiter,
    ROOMY: lambda _: ours(Limiter, TASKS),
    OURS: partial(ours, Limiter),
    KEYED: partial(ours, one_key),
    # The place for ``Limiter(limit, rates=...)``.
}


async def measure(make: Callable[[int], Call], tasks: int, count: int) -> float:
    """Return how much of the processor's time a call takes, in microseconds."""
    call, agent, indices = make(LIMIT), one_checkpoint(), iter(range(count))
    returned: list[Any] = []

    async def work() -> None:
        for index in indices:
            output = await call(agent, index)
            returned.append(output)

    start = time.process_time()
    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(work)

    seconds = time.process_time() - start
    rounds.check(returned, count)
    return seconds / count * 1e6


async def measure_batch(limiter: Limiter, count: int) -> float:
    """Return the same for the invocations of one batch."""
    loop, agent = AgentLoop(LoopConfig(), limiter=limiter), one_checkpoint()
    start = time.process_time()
    results = await loop.run_all(Invocation.map(agent, range(count)))
    seconds = time.process_time() - start
    rounds.check([result.output for result in results], count)
    return seconds / count * 1e6


async def compare_batches(count: int, repeats: int) -> rounds.Samples:
    in_turn = [index % KEYS for index in range(count)]
    at_random = random.Random(1).choices(range(KEYS), k=count)
    limiters: dict[str, Callable[[], Limiter]] = {
        OURS: lambda: Limiter(TASKS),
        IN_TURN: lambda: many_keys(in_turn),
        AT_RANDOM: lambda: many_keys(at_random),
    }
    return await rounds.alternate(
        {name: lambda make=make: measure_batch(make(), count) for name, make in limiters.items()}, repeats
    )


async def compare(count: int, repeats: int) -> dict[str, rounds.Samples]:
    return {
        title: await rounds.alternate(
            {name: partial(measure, make, tasks, count) for name, make in LIMITERS.items()}, repeats
        )
        for title, tasks in {"uncontended": 1, f"{TASKS} tasks for {LIMIT}": TASKS}.items()
    }


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    count, repeats = (200, 1) if quick else (2000, 9)
    return {
        f"`run_single`, {title}, time relative to `anyio.CapacityLimiter` alone": (
            f"{samples.ratio(OURS, ANYIO):.1f}x"
        )
        for title, samples in rounds.run(compare, backend, count, repeats).items()
    }


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{options.backend}, CPython {platform.python_version()}, medians of {options.rounds} rounds")
    print(rounds.insides(options.backend))
    for title, samples in rounds.run(compare, options.backend, options.calls, options.rounds).items():
        print(f"\n{title:24} {'us each':>8} {'x CapacityLimiter':>18}")
        for name in samples:
            print(f"  {name:22} {samples.median(name):8.1f} {samples.ratio(name, ANYIO):18.2f}", flush=True)

    samples = rounds.run(compare_batches, options.backend, options.calls, options.rounds)
    print(f"\n{'a batch':24} {'us each':>8} {'x one Limiter':>18}")
    for name in samples:
        print(f"  {name:22} {samples.median(name):8.1f} {samples.ratio(name, OURS):18.2f}", flush=True)


if __name__ == "__main__":
    main()
