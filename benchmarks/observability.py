"""
What it costs an invocation to be observed: metrics off and on, a sink that does nothing, and each adapter.

Every variant runs a batch of trivial agents in each round, in an order that changes from round to round, and
the figures are medians over the rounds, so that what else the machine does hits all of them alike. Times are
those of the processor: nothing in here waits.

    python benchmarks/observability.py --backend trio --inputs 2000 --rounds 15
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from agentloop import AgentLoop, Event, Invocation, LoopConfig
from agentloop.contrib.opentelemetry import OpenTelemetrySink
from agentloop.contrib.progress import progress
from agentloop.contrib.prometheus import LoopCollector
from agentloop.contrib.timeline import Timeline

LIMIT = 50

MEASURED = LoopConfig(max_concurrency=LIMIT)
UNMEASURED = LoopConfig(max_concurrency=LIMIT, collect_metrics=False)

Around = Callable[[AgentLoop], AbstractAsyncContextManager[object]]


async def agent(_: int) -> None:
    await checkpoint()


def ignore(event: Event) -> None:
    pass


def traced(**options: Any) -> OpenTelemetrySink:
    """Return a sink with an SDK whose spans go nowhere."""
    meter = MeterProvider([InMemoryMetricReader()]).get_meter("benchmark")
    return OpenTelemetrySink(TracerProvider(**options).get_tracer("benchmark"), meter)


def drawn() -> Timeline:
    """Return a timeline in a file that nobody will read."""
    return Timeline(os.devnull)


def alone(loop: AgentLoop) -> AbstractAsyncContextManager[object]:
    del loop  # which nobody looks at
    return nullcontext()


def shown(loop: AgentLoop) -> AbstractAsyncContextManager[object]:
    return progress(loop, console=Console(file=io.StringIO(), force_terminal=True, width=80))


def scraped(loop: AgentLoop) -> AbstractAsyncContextManager[object]:
    CollectorRegistry().register(LoopCollector({"benchmark": loop}))
    return nullcontext()


VARIANTS: dict[str, tuple[Callable[[], AgentLoop], Around]] = {
    "metrics off": (lambda: AgentLoop(UNMEASURED), alone),
    "metrics on (the default)": (lambda: AgentLoop(MEASURED), alone),
    "... and a sink that does nothing": (lambda: AgentLoop(MEASURED, on_event=ignore), alone),
    "... and progress": (lambda: AgentLoop(MEASURED), shown),
    "... and Prometheus": (lambda: AgentLoop(MEASURED), scraped),
    "... and a timeline": (lambda: AgentLoop(MEASURED, on_event=drawn()), alone),
    "... and OpenTelemetry, without an SDK": (
        lambda: AgentLoop(MEASURED, on_event=OpenTelemetrySink()),
        alone,
    ),
    "... and OpenTelemetry, nothing sampled": (
        lambda: AgentLoop(MEASURED, on_event=traced(sampler=ALWAYS_OFF)),
        alone,
    ),
    "... and OpenTelemetry, all sampled": (lambda: AgentLoop(MEASURED, on_event=traced()), alone),
}


async def measure(variant: str, inputs: int) -> float:
    """Return how long an invocation takes, in microseconds."""
    make, around = VARIANTS[variant]
    loop = make()
    await loop.run_all(Invocation.map(agent, range(LIMIT)))
    gc.collect()
    async with around(loop):
        start = time.process_time()
        await loop.run_all(Invocation.map(agent, range(inputs)))
        return (time.process_time() - start) / inputs * 1e6


async def compare(backend: str, inputs: int, rounds: int) -> None:
    order, shuffle = [*VARIANTS], random.Random(0).shuffle
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        shuffle(order)
        for variant in order:
            times[variant].append(await measure(variant, inputs))

    # Compared within each round, where the machine was in the same mood.
    base = times["metrics on (the default)"]
    print(f"{backend}, {inputs} invocations, medians of {rounds} rounds")
    print(f"  {'':40} {'us each':>8} {'more':>7} {'ratio':>6}")
    for variant, each in times.items():
        more = statistics.median(here - there for here, there in zip(each, base, strict=True))
        ratio = statistics.median(here / there for here, there in zip(each, base, strict=True))
        print(f"  {variant:40} {statistics.median(each):8.1f} {more:+7.1f} {ratio:6.2f}", flush=True)


async def cost_of_a_look(invocations: int) -> None:
    """Print what the adapters that poll cost for each look, however many invocations there were."""
    loop = AgentLoop(MEASURED)
    chance = random.Random(0)

    async def spread(_: int) -> None:
        await anyio.sleep(chance.random() / 100)

    await loop.run_all(Invocation.map(spread, range(invocations)))
    registry = CollectorRegistry()
    registry.register(LoopCollector({"benchmark": loop}))
    for name, look in (
        ("loop.metrics.snapshot()", loop.metrics.snapshot),
        ("a scrape by Prometheus", lambda: generate_latest(registry)),
    ):
        seconds: list[float] = []
        for _ in range(50):
            start = time.process_time()
            look()
            seconds.append(time.process_time() - start)

        print(f"  {name:40} {statistics.median(seconds) * 1e6:8.1f} us each time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], action="append")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for backend in options.backend or ["asyncio", "trio"]:
        anyio.run(compare, backend, options.inputs, options.rounds, backend=backend)

    anyio.run(cost_of_a_look, 5000)
