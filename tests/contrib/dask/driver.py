"""
A batch with worker processes that is going to be killed: ``python driver.py FILE BACKEND COUNT``.

It prints the numbers of its worker processes when it has begun, and appends a line to ``FILE.calls`` for each
call and to ``FILE.delivered`` for each result.
"""

import os
import random
import sys
from typing import Any

import anyio

from agentloop import AgentLoop, Invocation, LoopConfig, drain_on_signals
from agentloop.contrib.dask import Workers
from agentloop.journal import Journal

path, backend, count = sys.argv[1:]


def append(suffix: str, number: int) -> None:
    with open(f"{path}.{suffix}", "ab", buffering=0) as file:
        file.write(b"%d\n" % number)


async def ask(x: int) -> list[int]:
    append("calls", x)
    await anyio.sleep(random.random() * 0.05)
    return [x, os.getpid()]


async def main() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=20))
    async with drain_on_signals(loop), Workers(2) as workers, Journal(path) as journal:
        warm: list[Any] = await loop.run_all(
            Invocation.map(workers.remote(ask), range(-20, 0)), journal=journal
        )
        print(*{result.unwrap()[1] for result in warm}, flush=True)
        inputs = Invocation.map(workers.remote(ask), range(int(count)))
        async with loop.as_completed(inputs, journal=journal) as results:
            async for result in results:
                append("delivered", result.unwrap()[0])

    print("done", flush=True)


if __name__ == "__main__":
    anyio.run(main, backend=backend)
