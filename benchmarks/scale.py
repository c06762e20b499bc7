"""
How a batch of any length grows: tasks and memory while ``as_completed`` runs up to a million trivial inputs.

    python benchmarks/scale.py --backend trio --inputs 1000000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anyio
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Invocation, LoopConfig


async def agent(_: int) -> None:
    await checkpoint()


def resident_mib() -> float:
    """Return how much memory the process has now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def main(inputs: int, limit: int) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=limit))
    others = len(anyio.get_running_tasks())
    print(f"limit {limit}\n{'inputs':>10} {'tasks':>6} {'MiB':>7} {'us each':>8}")
    size = 1000
    while size <= inputs:
        tasks, memory, start = 0, 0.0, time.perf_counter()
        every = max(1, size // 50)
        async with loop.as_completed(Invocation.map(agent, range(size))) as results:
            async for result in results:
                if result.index % every == 0:
                    tasks = max(tasks, len(anyio.get_running_tasks()) - others)
                    memory = max(memory, resident_mib())

        seconds = time.perf_counter() - start
        print(f"{size:>10} {tasks:>6} {memory:>7.1f} {seconds / size * 1e6:>8.1f}", flush=True)
        size *= 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--limit", type=int, default=100)
    options = parser.parse_args()
    anyio.run(main, options.inputs, options.limit, backend=options.backend)
