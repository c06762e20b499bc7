"""What is left of a run is freed at once, and does not wait for the collector."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import anyio
import pytest
from agents import count, count_at_once, double, entered_or_not, make_loop, run, within
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Invocation


async def fails_after(upto: int) -> AsyncGenerator[int]:
    async for i in count(upto):
        yield i

    raise OSError


async def stream_in_a_scope(upto: int) -> AsyncGenerator[int]:
    with anyio.move_on_after(1):
        for i in range(upto):
            yield i


async def fail(x: int) -> None:
    await checkpoint()
    raise OSError(x)


async def read_stream(
    loop: AgentLoop, *, agent: Any = count, size: int, upto: int = 1000, pause: float = 0
) -> None:
    async with loop.run_streaming("a", agent, size) as chunks:
        await anyio.sleep(pause)
        with suppress(OSError):
            async for chunk in chunks:
                if chunk == upto:
                    break


async def leave_stream_all(loop: AgentLoop) -> None:
    async with loop.stream_all(Invocation.map(count, [30] * 6)) as events:
        await anext(events)


async def read_stream_all(loop: AgentLoop) -> None:
    async with loop.stream_all(Invocation.map(count_at_once, [30] * 6)) as events:
        await anyio.sleep(1)
        async for _ in events:
            pass


async def leave_as_completed(loop: AgentLoop) -> None:
    async with loop.as_completed(Invocation.map(double, range(30))) as results:
        await anext(results)


async def read_the_error_of_an_input(loop: AgentLoop) -> None:
    def inputs() -> Any:
        yield Invocation("a", double, (1,))
        raise OSError

    with pytest.raises(OSError):
        await run("as_completed", loop, inputs())


async def run_all_of_failing_agents(loop: AgentLoop) -> None:
    await loop.run_all(Invocation.map(fail, range(3)))


async def run_all_of_agents_that_time_out(loop: AgentLoop) -> None:
    await loop.run_all([Invocation("a", anyio.sleep, (100,))] * 3)


USES: dict[str, Callable[[AgentLoop], Awaitable[None]]] = {
    "read to the end": partial(read_stream, size=3),
    "wait for room": partial(read_stream, agent=count_at_once, size=50, pause=1),
    "leave early": partial(read_stream, size=100, upto=1),
    "leave early without room": partial(read_stream, agent=count_at_once, size=100, upto=1),
    "read an error": partial(read_stream, agent=fails_after, size=3),
    "cancel an agent that yields": partial(read_stream, agent=stream_in_a_scope, size=50, pause=2),
    "leave stream_all": leave_stream_all,
    "read stream_all": read_stream_all,
    "leave as_completed": leave_as_completed,
    "read the error of an input": read_the_error_of_an_input,
    "run_all of failing agents": run_all_of_failing_agents,
    "run_all of agents that time out": run_all_of_agents_that_time_out,
}


def is_ours(found: object) -> bool:
    if isinstance(found, FrameType):
        return "agentloop" in found.f_globals.get("__name__", "")

    return type(found).__module__.startswith("agentloop")


@pytest.mark.long
@entered_or_not
@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_nothing_of_ours_waits_for_the_collector(use: Any, entered: bool) -> None:
    loop = make_loop(max_concurrency=3, timeout_seconds=5)
    async with within(loop, entered):
        try:
            await use(loop)
            await anyio.wait_all_tasks_blocked()
            gc.collect()
            gc.disable()
            for _ in range(3):
                await use(loop)

            await anyio.wait_all_tasks_blocked()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = [repr(thing) for thing in gc.garbage if is_ours(thing)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    assert found == []
