"""
How a batch of any length grows: tasks and memory while ``as_completed`` runs up to a million trivial inputs.
Then the memory that each of a thousand invocations holds while all wait at an event, in ours and other ways.

    python benchmarks/scale.py --backend trio --inputs 1000000
    python benchmarks/scale.py --inputs 0                           # the latter only
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import AsyncIterator

import anyio
import attrs
import rounds
import ways

from agentloop import AgentLoop, Invocation, LoopConfig

COMPARED = (ways.OURS, ways.AS_COMPLETED, ways.SINGLE, ways.GATHERED, ways.NAIVE)
HELD = {ways.TASKS: ways.bare_tasks, **{name: ways.TOGETHER[name] for name in COMPARED}}


@attrs.frozen
class Size:
    inputs: int
    tasks: int
    mib: float
    us_each: float


async def measure(inputs: int, limit: int) -> Size:
    """Run one batch, and look at it fifty times."""
    loop, others = AgentLoop(LoopConfig(max_concurrency=limit)), len(anyio.get_running_tasks())
    agent, every = ways.one_checkpoint(), max(1, inputs // 50)
    succeeded, tasks, memory, start = 0, 0, 0.0, time.process_time()
    async with loop.as_completed(Invocation.map(agent, range(inputs))) as results:
        async for result in results:
            succeeded += result.output == result.index
            if result.index % every == 0:
                tasks = max(tasks, len(anyio.get_running_tasks()) - others)
                memory = max(memory, rounds.memory_mib())

    assert succeeded == inputs, f"{succeeded} of {inputs} agents have a result"
    return Size(inputs, tasks, memory, (time.process_time() - start) / inputs * 1e6)


async def sizes(up_to: int, limit: int) -> AsyncIterator[Size]:
    inputs = 1000
    while inputs <= up_to:
        yield await measure(inputs, limit)
        inputs *= 10


async def hold(way: ways.Way, count: int) -> tuple[float, float]:
    """Return how many bytes, and objects that the collector looks at, an invocation holds while it waits."""
    waiting, go = 0, anyio.Event()

    async def agent(index: int) -> int:
        nonlocal waiting
        waiting += 1
        await go.wait()
        return index

    def held() -> tuple[int, int]:
        gc.collect()
        return tracemalloc.get_traced_memory()[0], len(gc.get_objects())

    # Both load modules and make objects that stay.
    await way(ways.one_checkpoint(), count, count)
    await anyio.wait_all_tasks_blocked()
    before = held()
    async with anyio.create_task_group() as group:
        group.start_soon(way, agent, count, count)
        await anyio.wait_all_tasks_blocked()
        after = held()
        assert waiting == count, f"{waiting} of {count} agents wait"
        go.set()

    return (after[0] - before[0]) / count, (after[1] - before[1]) / count


async def show(backend: str, up_to: int, limit: int, waiting: int) -> None:
    print(f"limit {limit}\n{'inputs':>10} {'tasks':>6} {'MiB':>7} {'us each':>8}")
    async for size in sizes(up_to, limit):
        print(f"{size.inputs:>10} {size.tasks:>6} {size.mib:>7.1f} {size.us_each:>8.1f}", flush=True)

    print(f"\n{f'{waiting} wait at once, each holds':34} {'bytes':>8} {'objects':>8}")
    tracemalloc.start()
    for name, way in ways.choose(HELD, backend, "waiting").items():
        held, objects = await hold(way, waiting)
        print(f"{name:34} {held:>8.0f} {objects:>8.1f}", flush=True)

    tracemalloc.stop()


async def small_and_large(small: int, large: int) -> tuple[Size, Size]:
    return await measure(small, 100), await measure(large, 100)


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    small, large = (200, 2000) if quick else (10_000, 100_000)
    first, last = rounds.run(small_and_large, backend, small, large)
    title = f"`as_completed` of {large:,}, relative to {small:,}"
    found = {
        f"{title}: tasks": f"{last.tasks / first.tasks:.2f}x",
        f"{title}: processor time of each": f"{last.us_each / first.us_each:.2f}x",
    }
    return found | {f"{title}: memory": f"{last.mib / first.mib:.2f}x"} if first.mib else found


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--waiting", type=int, default=1000)
    options = parser.parse_args()
    print(rounds.insides(options.backend))
    rounds.run(show, options.backend, options.backend, options.inputs, options.limit, options.waiting)


if __name__ == "__main__":
    main()
