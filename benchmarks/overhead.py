"""
What it costs to run an agent, in ours and other ways, side by side in one run.

    python benchmarks/overhead.py --backend trio
    python benchmarks/overhead.py --agent checkpoint --limit 100      # ten seconds

Times are those of the processor, per invocation. Every round runs each way once, and a figure is the median
over the rounds; a ratio is the median of the ratios within each round. Memory is measured in a process of its
own for each way. The agents return at once, reach one checkpoint (AnyIO's own), sleep for a millisecond, or
fail at a checkpoint and are retried once. A nested one is an invocation of its own: of four agents with a
checkpoint, one runs the others on the same loop. A streamed one yields three chunks, each after a checkpoint.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

import anyio
import rounds
import ways
from ways import Agent, Way

PEERS = {
    ways.ORIGINAL: "the original (`gather`, `wait_for`)",
    ways.GATHERED: "`gather`, a semaphore and `asyncio.timeout`",
    ways.TASK_GROUP: "`asyncio.TaskGroup` and `timeout`",
    ways.AIOMETER: "aiometer",
    ways.STREAMABLE: "streamable",
    ways.NAIVE: "AnyIO with a task for each",
    ways.TENACITY: "AnyIO and tenacity",
    ways.STAMINA: "AnyIO and stamina",
}
PEERS_IN_TURN = {
    ways.ORIGINAL_IN_TURN: "the original's",
    ways.BARE_IN_TURN: "a bare semaphore and `wait_for`",
}
REMEMBERED = (ways.OURS, ways.AS_COMPLETED, ways.ORIGINAL, ways.AIOMETER, ways.NAIVE)
LIMITS = (10, 100, 1000)
SLEEP_SECONDS, SLEEP_LIMIT = 0.02, 500
MEASURED = "checkpoint"  # what memory and the figures for the table are taken from


async def processor_us(
    way: Way, make_agent: Callable[[], Agent], count: int, limit: int, outputs: int
) -> float:
    """
    Run a way, and return how much of the processor's time one invocation took, in microseconds.

    :param outputs: how many each invocation has
    """
    agent = make_agent()
    start = time.process_time()
    returned = await way(agent, count, limit)
    seconds = time.process_time() - start
    rounds.check(returned, count, outputs)
    return seconds / count * 1e6


async def wall_seconds(way: Way, count: int, limit: int) -> float:
    """Run agents that sleep, and return how long it took."""
    agent = ways.sleeping(SLEEP_SECONDS)
    start = time.perf_counter()
    returned = await way(agent, count, limit)
    seconds = time.perf_counter() - start
    rounds.check(returned, count)
    return seconds


def bind(
    chosen: Mapping[str, Way], measure: Callable[..., Awaitable[float]], *args: object
) -> dict[str, Callable[[], Awaitable[float]]]:
    return {name: partial(measure, way, *args) for name, way in chosen.items()}


async def costs(
    chosen: Mapping[str, Way], agent: str, count: int, limit: int, repeats: int
) -> rounds.Samples:
    outputs = ways.CHUNKS if agent == "streamed" else 1
    bound = bind(chosen, processor_us, ways.AGENTS[agent], count, limit, outputs)
    return await rounds.alternate(bound, repeats)


async def waits(chosen: Mapping[str, Way], count: int, repeats: int) -> rounds.Samples:
    return await rounds.alternate(bind(chosen, wall_seconds, count, SLEEP_LIMIT), repeats)


def ideal_seconds(count: int) -> float:
    return -(-count // SLEEP_LIMIT) * SLEEP_SECONDS


# -- memory and tasks, each way in a process of its own


async def grow(way: Way, count: int, limit: int) -> tuple[float, int]:
    """Return by how many MiB the memory of this process grows at most, and how many tasks there are then."""
    agent = ways.AGENTS[MEASURED]()
    rounds.check(await way(agent, limit, limit), limit)  # what is loaded and made once is there now
    others, tasks = len(anyio.get_running_tasks()), 0
    every = max(1, count // 20)

    async def counted(index: int) -> int:
        nonlocal tasks
        if index % every == 0:
            tasks = max(tasks, len(anyio.get_running_tasks()) - others)

        return await agent(index)

    before = rounds.memory_mib()
    rounds.check(await way(counted, count, limit), count)
    return max(0.0, rounds.memory_mib("VmHWM") - before), tasks


def grow_alone(way: str, backend: str, count: int, limit: int) -> tuple[float, int]:
    found: tuple[float, int] = rounds.run(grow, backend, ways.TOGETHER[way], count, limit)
    return found


def growths(backend: str, count: int, limit: int, chosen: Iterable[str]) -> dict[str, tuple[float, int]]:
    with rounds.fresh_processes() as processes:
        return {way: processes.submit(grow_alone, way, backend, count, limit).result() for way in chosen}


# -- what is shown


def show_costs(title: str, samples: rounds.Samples) -> None:
    _, ours, *_ = samples
    print(f"\n{title:44} {'us each':>8} {'x floor':>8} {'ours is':>8}")
    for way in samples:
        faster = "" if way in (ours, ways.FLOOR) else f"{samples.ratio(way, ours):7.2f}x"
        print(f"  {way:42} {samples.median(way):8.1f} {samples.ratio(way, ways.FLOOR):8.2f} {faster:>8}")

    print(end="", flush=True)


async def show(
    backend: str, agents: list[str], limits: list[int], count: int, repeats: int, whole: bool
) -> None:
    for limit in limits:
        for agent in agents:
            invocations = max(count, 3 * limit)
            chosen = ways.choose(ways.OTHERWISE.get(agent, ways.TOGETHER), backend, agent)
            samples = await costs(chosen, agent, invocations, limit, repeats)
            show_costs(f"{agent}, limit {limit}, {invocations} invocations", samples)

    for agent in agents:
        # One that sleeps would keep everybody waiting, and show nothing more.
        if agent not in ("1-ms", *ways.OTHERWISE):
            chosen = ways.choose(ways.IN_TURN, backend, agent)
            samples = await costs(chosen, agent, count, 1, repeats)
            show_costs(f"{agent}, one after the other", samples)

    if whole:
        inputs = 10 * count
        ideal = ideal_seconds(inputs)
        samples = await waits(ways.choose(ways.TOGETHER, backend, "sleeping"), inputs, 2)
        title = f"{inputs} agents of {SLEEP_SECONDS * 1000:g} ms, limit {SLEEP_LIMIT}"
        print(f"\n{title:44} {'seconds':>8} {'x ideal':>8}\n  {'the ideal':42} {ideal:8.2f} {1:8.2f}")
        for way in samples:
            print(f"  {way:42} {samples.median(way):8.2f} {samples.median(way) / ideal:8.2f}", flush=True)


def show_growths(backend: str, count: int) -> None:
    print(f"\n{f'memory and tasks, {MEASURED}, limit 100, {count} inputs':44} {'MiB more':>8} {'tasks':>8}")
    chosen = ways.choose(ways.TOGETHER, backend, MEASURED)
    for way, (memory, tasks) in growths(backend, count, 100, chosen).items():
        print(f"  {way:42} {memory:8.1f} {tasks:8}")


async def table_costs(backend: str, count: int, repeats: int) -> tuple[dict[str, rounds.Samples], float]:
    samples = {}
    for title, limit, found in [("together", 100, ways.TOGETHER), ("in turn", 1, ways.IN_TURN)]:
        samples[title] = await costs(ways.choose(found, backend, MEASURED), MEASURED, count, limit, repeats)

    for agent, found in ways.OTHERWISE.items():
        samples[agent] = await costs(ways.choose(found, backend, agent), agent, count, 100, repeats)

    inputs = 10 * count
    waited = await waits({ways.OURS: ways.run_all}, inputs, 3)
    return samples, waited.median(ways.OURS) / ideal_seconds(inputs)


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    count, repeats = (100, 1) if quick else (2000, 9)
    samples, waited = rounds.run(table_costs, backend, backend, count, repeats)
    together, in_turn = samples["together"], samples["in turn"]
    found = {
        f"`run_all`, times as fast as {name}": f"{together.ratio(way, ways.OURS):.1f}x"
        for way, name in PEERS.items()
        if way in together
    }
    for way, name in PEERS_IN_TURN.items():
        if way in in_turn:
            ratio = in_turn.ratio(ways.OURS_IN_TURN, way)
            found[f"`run_single`, time relative to {name}"] = f"{ratio:.2f}x"

    ratio = together.ratio(ways.AS_COMPLETED, ways.OURS)
    found["`as_completed`, time relative to `run_all`"] = f"{ratio:.2f}x"
    found[f"{10 * count:,} agents of 20 ms, 500 at once: time relative to the ideal"] = f"{waited:.2f}x"
    found |= {
        f"One invocation: {way}": f"{together.median(way):.1f} µs"
        for way in (ways.FLOOR, ways.OURS, ways.AS_COMPLETED, ways.SINGLE, ways.SINGLE_AT_ONCE)
    }
    found |= {
        f"One invocation, {agent}: {way}": f"{samples[agent].median(way):.1f} µs"
        for agent in ways.OTHERWISE
        for way in samples[agent]
    }
    chosen = [way for way in REMEMBERED if way in together]
    return found | {
        f"{10 * count:,} invocations: {way}": f"{memory:.0f} MiB, {tasks:,} tasks"
        for way, (memory, tasks) in growths(backend, 10 * count, 100, chosen).items()
    }


def main() -> None:
    parser = rounds.parser(__doc__)
    add = parser.add_argument
    add("--agent", choices=[*ways.AGENTS], action="append", help="may be repeated (default: all)")
    add("--limit", type=int, action="append", help="may be repeated (default: 10, 100 and 1000)")
    add("--invocations", type=int, help="at least, per way and round (default: 2000)")
    add("--rounds", type=int, help="(default: 3)")
    add("--quick", action="store_true", help="few of everything: for a look, not for a judgement")
    options = parser.parse_args()
    count = options.invocations or (200 if options.quick else 2000)
    limits = options.limit or ([100] if options.quick else LIMITS)
    repeats = options.rounds or 3
    print(
        f"{options.backend}, CPython {platform.python_version()}, processor time, medians of {repeats} rounds"
    )
    print("'ours is': the way below the floor is so many times as fast as this one")
    print(rounds.insides(options.backend))
    for package in ways.MISSING:
        print(f"{package} is not installed, and left out")

    # Who asks for one kind of agent has no time for the rest.
    whole = options.agent is None
    agents = options.agent or [*ways.AGENTS]
    rounds.run(show, options.backend, options.backend, agents, limits, count, repeats, whole)
    if whole:
        show_growths(options.backend, 10 * count)


if __name__ == "__main__":
    main()
