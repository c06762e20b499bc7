"""
Run one batch in one process and in several, and kill one of them on the way.

Install ``agentloop-anyio[dask,trio]``; in a checkout, ``pip install -e ".[dask,trio]"``. Then::

    python examples/many_processes.py [--processes 2] [--address tcp://scheduler:8786] [--backend trio]

Each agent waits for a model and then computes for some milliseconds, as an SDK does that validates an answer.
One process computes on one processor, so that the batch is faster in several. Then one of them is killed
while it runs: its calls are sent to others, and every input still has its result. With ``--address`` the
calls go to the workers of a Dask cluster, none of which is killed.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

import anyio
from telling import Parser, status_of, whole

from agentloop import AgentLoop, Invocation, InvocationResult, LoopConfig
from agentloop.contrib.dask import Workers

CONFIG = LoopConfig(max_concurrency=100, timeout_seconds=60)
WAIT_SECONDS, COMPUTE_SECONDS = 0.05, 0.003
Answer = tuple[int, int]


async def ask(question: int) -> Answer:
    """The agent: wait for a model, and then compute. It is the same here and there."""
    await anyio.sleep(WAIT_SECONDS)
    ends = time.process_time() + COMPUTE_SECONDS
    while time.process_time() < ends:
        pass

    return question * question, os.getpid()


async def time_in_one(count: int) -> float:
    """Return the seconds that a batch takes in this process."""
    began = anyio.current_time()
    results = await AgentLoop(CONFIG).run_all(Invocation.map(ask, range(count)))
    return tell("this process", results, anyio.current_time() - began)


async def time_in_many(workers: Workers, count: int) -> float:
    """Return the seconds that the batch takes in the worker processes."""
    remote = workers.remote(ask)
    loop = AgentLoop(CONFIG)
    # They import what the agent needs when they are called first.
    await loop.run_all(Invocation.map(remote, range(10)))
    began = anyio.current_time()
    results = await loop.run_all(Invocation.map(remote, range(count)))
    return tell(f"{workers.statistics().processes} processes", results, anyio.current_time() - began)


async def kill_one(workers: Workers, count: int) -> bool:
    """Kill a process in the middle of the batch, and return whether nothing was lost."""
    results: list[InvocationResult[Answer]] = []
    began = anyio.current_time()
    killed = 0
    async with AgentLoop(CONFIG).as_completed(Invocation.map(workers.remote(ask), range(count))) as done:
        async for result in done:
            results.append(result)
            if len(results) == count // 3 and result.output is not None:
                _, killed = result.output
                print(f"  process {killed} is killed after {len(results)} results")
                os.kill(killed, signal.SIGKILL)

    tell("with a kill", results, anyio.current_time() - began)
    after = {result.output[1] for result in results[-count // 3 :] if result.output}
    print(
        f"  {workers.statistics().lost} process lost; the last third came from {len(after - {killed})} others"
    )
    return all(result.success for result in results) and len(results) == count


def tell(where: str, results: Sequence[InvocationResult[Answer]], seconds: float) -> float:
    """Print how long a batch took, and check that each input has its own result."""
    right = sum(result.output is not None and result.output[0] == result.index**2 for result in results)
    print(f"  {where:14} {right} of {len(results)} right in {seconds:.2f} s, {right / seconds:,.0f} a second")
    return seconds


async def run(found: argparse.Namespace) -> bool:
    print(f"{found.count} agents, {CONFIG.max_concurrency} at once, on {found.backend}")
    one = await time_in_one(found.count)
    processes = None if found.address else found.processes
    async with Workers(processes, address=found.address) as workers:
        many = await time_in_many(workers, found.count)
        print(f"  {one / many:.2f} times as fast")
        return found.address is not None or await kill_one(workers, found.count)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--processes", type=whole, default=2, help="how many to start (default: %(default)s)")
    parser.add_argument("--address", help="the scheduler of a Dask cluster, whose workers are used instead")
    parser.add_argument("--count", type=whole, default=1000, help="how many inputs (default: %(default)s)")
    found = parser.read()
    return status_of(run, found, backend=found.backend)


# Worker processes import this file, and must not run it.
if __name__ == "__main__":
    sys.exit(main())
