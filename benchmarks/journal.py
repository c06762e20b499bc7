"""
What a journal costs: while results come at a rate, and when a batch that was done is run again.

    python benchmarks/journal.py --backend trio
    python benchmarks/journal.py --entries 1000000 --bytes 200 --rate

Processor time per result of agents that take 10 ms, with a journal and without, medians; how late a timer of
5 ms is meanwhile; the time and the memory that it takes to write so many entries, and to have all of them
again.
"""

from __future__ import annotations

import gc
import platform
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import attrs
import rounds

from agentloop import AgentLoop, Invocation, LoopConfig
from agentloop.journal import Journal

AGENT_SECONDS, TIMER_SECONDS = 0.01, 0.005
QUARTERS = 4
WITH, WITHOUT = "with a journal", "without"


@attrs.frozen
class Cost:
    """What results at a rate cost."""

    us_each: float
    """Processor time, with that of all threads."""
    lag_ms: float
    """How late the timer was, at the 99th percentile."""
    worst_ms: float


async def offer(count: int, rate: float, agent: Any) -> AsyncIterator[Invocation[Any]]:
    """Give invocations as they arrive: evenly, and as many at once as are due."""
    began = anyio.current_time()
    for index in range(count):
        due = began + index / rate
        if due > anyio.current_time():
            await anyio.sleep_until(due)

        yield Invocation("agent", agent, (index,))


async def measure_rate(rate: float, seconds: float, size: int, path: Path | None) -> Cost:
    """
    Measure results that come at a rate.

    :param path: where the journal is; ``None`` for none
    """

    async def agent(index: int) -> list[Any]:
        await anyio.sleep(AGENT_SECONDS)
        return [index, "x" * size]

    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + TIMER_SECONDS
            await anyio.sleep(TIMER_SECONDS)
            lags.append((time.perf_counter() - due) * 1000)

    count, outputs = int(rate * seconds), list[int]()
    loop = AgentLoop(LoopConfig(max_concurrency=max(50, int(rate * 0.1))))
    opening = nullcontext() if path is None else Journal(path)
    async with opening as journal, anyio.create_task_group() as group:
        group.start_soon(watch)
        await anyio.sleep(0.1)
        lags.clear()
        began = time.process_time()
        async with loop.as_completed(offer(count, rate, agent), journal=journal) as done:
            async for result in done:
                assert result.output is not None
                outputs.append(result.output[0])

        spent = time.process_time() - began
        group.cancel_scope.cancel()

    rounds.check(outputs, count)
    return Cost(spent / count * 1e6, statistics.quantiles(lags, n=100)[98], max(lags))


async def compare_rate(rate: float, seconds: float, size: int, repeats: int) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {WITHOUT: [], WITH: []}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(repeats):
            for name in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
                gc.collect()
                path = Path(directory, f"{number}.db") if name == WITH else None
                found[name].append(await measure_rate(rate, seconds, size, path))

    return found


@attrs.frozen
class Pass:
    """What it took to have all results of many inputs."""

    opening_seconds: float
    seconds: float
    us_each: float
    """Processor time, with that of all threads."""
    replayed: int
    memory_mib: list[float]
    """At each quarter of the way."""


async def measure_entries(count: int, size: int, path: Path) -> Pass:

    async def agent(index: int) -> list[Any]:
        return [index, "x" * size]

    memory: list[float] = []
    replayed = seen = 0
    began = time.perf_counter()
    async with Journal(path) as journal:
        opened, spent = time.perf_counter(), time.process_time()
        async with AgentLoop(LoopConfig(max_concurrency=1000)).as_completed(
            Invocation.map(agent, range(count), "a"), journal=journal
        ) as done:
            async for result in done:
                seen += 1
                replayed += result.replayed
                if seen % max(1, count // QUARTERS) == 0:
                    memory.append(rounds.memory_mib())

        ended, spent = time.perf_counter(), time.process_time() - spent

    assert seen == count
    return Pass(opened - began, ended - opened, spent / count * 1e6, replayed, memory)


def tell_entries(name: str, count: int, found: Pass) -> None:
    memory = ", ".join(f"{mib:.0f}" for mib in found.memory_mib)
    print(
        f"  {name:10} {found.us_each:6.1f} us each, {found.seconds:.2f} s, {count / found.seconds:,.0f}/s, "
        f"opened in {found.opening_seconds:.3f} s, {found.replayed:,} replayed, {memory} MiB",
        flush=True,
    )


def tell_rate(rate: float, found: dict[str, list[Cost]]) -> None:
    def median(name: str, field: str) -> float:
        return statistics.median(getattr(cost, field) for cost in found[name])

    print(f"\n{rate:,.0f} results a second")
    for name in found:
        more = median(name, "us_each") - median(WITHOUT, "us_each")
        print(
            f"  {name:16} {median(name, 'us_each'):8.1f} us each, {more:+8.1f}; a timer is late by "
            f"{median(name, 'lag_ms'):.1f} ms at the 99th percentile, {median(name, 'worst_ms'):.1f} at most",
            flush=True,
        )


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--rate", type=float, nargs="*", default=[100, 1000, 10_000], help="results a second")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each rate lasts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=2000, help="the size of an output")
    options = parser.parse_args()
    print(f"{options.backend}, CPython {platform.python_version()}, medians of {options.rounds} rounds")
    for rate in options.rate:
        found = rounds.run(
            compare_rate, options.backend, rate, options.seconds, options.bytes, options.rounds
        )
        tell_rate(rate, found)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "journal.db")
        print(f"\n{options.entries:,} entries of {options.bytes:,} bytes")
        for name in ("written", "replayed"):
            gc.collect()
            found = rounds.run(measure_entries, options.backend, options.entries, options.bytes, path)
            tell_entries(name, options.entries, found)

        print(f"  {'file':10} {path.stat().st_size / options.entries:8.0f} bytes each")


if __name__ == "__main__":
    main()
