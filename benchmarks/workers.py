"""
What worker processes give and what they cost: throughput, processor time, recovery.

    python benchmarks/workers.py --backend trio

Agents that compute and then wait, in this process and in several; calls that only wait, many at once; how
long no result comes after a process is killed; and how long it takes to start and to end the processes.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import psutil
import rounds

from agentloop import AgentLoop, Invocation, LoopConfig
from agentloop.contrib.dask import Workers

COMPUTE_SECONDS, WAIT_SECONDS = 0.003, 0.05


async def compute(index: int) -> tuple[int, int]:
    """What a call of an SDK costs: some milliseconds of computing, and a wait for the model."""
    ends = time.thread_time() + COMPUTE_SECONDS
    while time.thread_time() < ends:
        pass

    await anyio.sleep(WAIT_SECONDS)
    return index, os.getpid()


async def wait(index: int) -> tuple[int, int]:
    await anyio.sleep(0.01)
    return index, os.getpid()


@attrs.frozen
class Cost:
    """What a batch took."""

    each_second: float
    here_us: float
    """Processor time of this process, with all of its threads, for each call."""
    there_us: float
    """Processor time of the worker processes for each call."""
    silence_ms: float = 0.0
    """The longest time without a result."""


def spent_there() -> float:
    """Return the processor time of all worker processes so far."""
    times = [one.cpu_times() for one in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


async def measure(agent: Callable[[int], Any], count: int, limit: int, kills: int = 0) -> Cost:
    """
    Measure a batch.

    :param kills: how many processes to kill on the way, evenly
    """
    outputs: list[int] = []
    loop = AgentLoop(LoopConfig(max_concurrency=limit))
    there, here, began = spent_there(), time.process_time(), time.perf_counter()
    last, silence = began, 0.0
    async with loop.as_completed(Invocation.map(agent, range(count), "a")) as done:
        async for result in done:
            index, process = result.unwrap()
            outputs.append(index)
            now = time.perf_counter()
            silence, last = max(silence, now - last), now
            if kills and len(outputs) % (count // (kills + 1)) == 0 and len(outputs) < count:
                os.kill(process, signal.SIGKILL)

    seconds, here = time.perf_counter() - began, time.process_time() - here
    rounds.check(outputs, count)
    # Those that were killed have taken their time with them.
    there = 0.0 if kills else spent_there() - there
    return Cost(count / seconds, here / count * 1e6, there / count * 1e6, silence * 1000)


def tell(name: str, costs: list[Cost]) -> None:
    def median(field: str) -> float:
        return statistics.median(getattr(cost, field) for cost in costs)

    print(
        f"  {name:30} {median('each_second'):8.0f} a second, {median('here_us'):6.0f} us here and "
        f"{median('there_us'):6.0f} us there each, {median('silence_ms'):5.0f} ms without a result at most",
        flush=True,
    )


async def run(options: Any) -> None:
    began = time.perf_counter()
    async with Workers(options.processes) as workers:
        started = time.perf_counter()
        computing, waiting = workers.remote(compute), workers.remote(wait)
        # The first calls import what agents need.
        for agent in (computing, waiting):
            await measure(agent, 100, 20)

        name = f"{options.processes} processes"
        titles = ("computing, one process", f"computing, {name}", f"waiting, {name}")
        found: dict[str, list[Cost]] = {title: [] for title in titles}
        for _ in range(options.rounds):
            for costs, agent, count, limit in zip(
                found.values(),
                (compute, computing, waiting),
                (options.calls // 10, options.calls // 10, options.calls),
                (100, 100, 500),
                strict=True,
            ):
                costs.append(await measure(agent, count, limit))

        for what, costs in found.items():
            tell(what, costs)

        one, many, _ = found.values()
        ratios = [there.each_second / here.each_second for here, there in zip(one, many, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  {'computing, times as fast':30} {statistics.median(ratios):8.2f} in the median of {each}")
        tell(f"waiting, {options.kills} kills", [await measure(waiting, options.calls, 60, options.kills)])
        ended = time.perf_counter()

    print(f"  {'started and ended':30} {started - began:8.2f} s and {time.perf_counter() - ended:.2f} s")


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--calls", type=int, default=10_000, help="that wait; a tenth of these compute")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # It says of each process that is killed how many calls are sent elsewhere.
    logging.getLogger("agentloop").setLevel(logging.ERROR)
    print(f"{options.backend}, CPython {platform.python_version()}, medians of {options.rounds} rounds")
    rounds.run(run, options.backend, options)


if __name__ == "__main__":
    main()
