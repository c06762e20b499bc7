"""
How a batch of any length grows: tasks and memory while ``as_completed`` runs up to a million trivial inputs.

    python benchmarks/scale.py --backend trio --inputs 1000000
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
import attrs
import rounds
from ways import one_checkpoint

from agentloop import AgentLoop, Invocation, LoopConfig


@attrs.frozen
class Size:
    inputs: int
    tasks: int
    mib: float
    us_each: float


async def measure(inputs: int, limit: int) -> Size:
    """Run one batch, and look at it fifty times."""
    loop, others = AgentLoop(LoopConfig(max_concurrency=limit)), len(anyio.get_running_tasks())
    agent, every = one_checkpoint(), max(1, inputs // 50)
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


async def show(up_to: int, limit: int) -> None:
    print(f"limit {limit}\n{'inputs':>10} {'tasks':>6} {'MiB':>7} {'us each':>8}")
    async for size in sizes(up_to, limit):
        print(f"{size.inputs:>10} {size.tasks:>6} {size.mib:>7.1f} {size.us_each:>8.1f}", flush=True)


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
    options = parser.parse_args()
    rounds.run(show, options.backend, options.inputs, options.limit)


if __name__ == "__main__":
    main()
