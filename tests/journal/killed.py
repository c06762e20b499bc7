"""
A batch with a journal that is going to be killed:
``python killed.py FILE BACKEND VERB DRAIN COUNT``.

It prints a line when it begins, and appends a line to ``FILE.calls`` for each call and to ``FILE.delivered``
for each result.
"""

import os
import random
import sys
from contextlib import nullcontext
from typing import Any

import anyio

from agentloop import AgentLoop, Invocation, InvocationResult, LoopConfig, drain_on_signals
from agentloop.journal import Journal

path, backend, verb, drains, count = sys.argv[1:]
calls = os.open(f"{path}.calls", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
delivered = os.open(f"{path}.delivered", os.O_CREAT | os.O_APPEND | os.O_WRONLY)


async def ask(x: int) -> list[int]:
    os.write(calls, b"%d\n" % x)
    await anyio.sleep(random.random() * 0.02)
    return [x, x * x]


def deliver(result: InvocationResult[Any]) -> None:
    if result.success:
        assert result.output == [result.index, result.index**2]
        os.write(delivered, b"%d\n" % result.index)


async def main() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=10))
    async with drain_on_signals(loop) if drains == "drain" else nullcontext():
        async with Journal(path) as journal:
            print("begun", flush=True)
            inputs = Invocation.map(ask, range(int(count)))
            if verb == "run_all":
                for result in await loop.run_all(inputs, journal=journal):
                    deliver(result)
            else:
                async with loop.as_completed(inputs, journal=journal) as results:
                    async for result in results:
                        deliver(result)

    print("done", flush=True)


anyio.run(main, backend=backend)
