"""
What it costs an invocation to be observed: metrics off and on, a sink that does nothing, and each adapter.

Every variant runs a batch of trivial agents in each round, in an order that changes from round to round, and
the figures are medians over the rounds, so that what else the machine does hits all of them alike. Times are
those of the processor: nothing in here waits.

    python benchmarks/observability.py --backend trio --inputs 2000 --rounds 15
"""

from __future__ import annotations

import io
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any

import anyio
import rounds
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from ways import one_checkpoint

from agentloop import AgentLoop, Event, Invocation, LoopConfig
from agentloop.contrib.opentelemetry import OpenTelemetrySink
from agentloop.contrib.progress import progress
from agentloop.contrib.prometheus import LoopCollector
from agentloop.contrib.timeline import Timeline

LIMIT = 50

MEASURED = LoopConfig(max_concurrency=LIMIT)
UNMEASURED = LoopConfig(max_concurrency=LIMIT, collect_metrics=False)

Around = Callable[[AgentLoop], AbstractAsyncContextManager[object]]


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


UNWATCHED, WATCHED = "metrics off", "metrics on (the default)"
SINK, TRACED = "... and a sink that does nothing", "... and OpenTelemetry, all sampled"
VARIANTS: dict[str, tuple[Callable[[], AgentLoop], Around]] = {
    UNWATCHED: (lambda: AgentLoop(UNMEASURED), alone),
    WATCHED: (lambda: AgentLoop(MEASURED), alone),
    SINK: (lambda: AgentLoop(MEASURED, on_event=ignore), alone),
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
    TRACED: (lambda: AgentLoop(MEASURED, on_event=traced()), alone),
}


async def measure(variant: str, inputs: int) -> float:
    """Return how long an invocation takes, in microseconds."""
    make, around = VARIANTS[variant]
    loop, agent = make(), one_checkpoint()
    await loop.run_all(Invocation.map(agent, range(LIMIT)))
    async with around(loop):
        start = time.process_time()
        results = await loop.run_all(Invocation.map(agent, range(inputs)))
        seconds = time.process_time() - start

    rounds.check(results, inputs)
    return seconds / inputs * 1e6


async def compare(inputs: int, repeats: int) -> rounds.Samples:
    return await rounds.alternate({name: partial(measure, name, inputs) for name in VARIANTS}, repeats)


async def show(backend: str, inputs: int, repeats: int) -> None:
    samples = await compare(inputs, repeats)
    print(f"{backend}, {inputs} invocations, medians of {repeats} rounds")
    print(f"  {'':40} {'us each':>8} {'more':>7} {'ratio':>6}")
    for name in samples:
        pairs = zip(samples[name], samples[WATCHED], strict=True)
        more = statistics.median(here - there for here, there in pairs)
        print(f"  {name:40} {samples.median(name):8.1f} {more:+7.1f} {samples.ratio(name, WATCHED):6.2f}")

    print(end="", flush=True)


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    samples = rounds.run(compare, backend, *((100, 1) if quick else (1000, 9)))
    more = "... and relative to that, with"
    return {
        "`run_all` with metrics, time relative to without": f"{samples.ratio(WATCHED, UNWATCHED):.2f}x",
        f"{more} an event sink that does nothing": f"{samples.ratio(SINK, WATCHED):.2f}x",
        f"{more} OpenTelemetry, all sampled": f"{samples.ratio(TRACED, WATCHED):.2f}x",
    }


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


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(rounds.insides(options.backend))
    rounds.run(show, options.backend, options.backend, options.inputs, options.rounds)
    rounds.run(cost_of_a_look, options.backend, 2 * options.inputs)


if __name__ == "__main__":
    main()
