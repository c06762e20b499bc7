"""What is left of a run is freed at once, and does not wait for the collector."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import FrameType
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Invocation, LoopConfig


async def stream(upto: int, error: bool = False) -> AsyncGenerator[int]:
    for i in range(upto):
        await checkpoint()
        yield i

    if error:
        raise OSError


async def stream_at_once(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        yield i


async def stream_in_a_scope(upto: int) -> AsyncGenerator[int]:
    with anyio.move_on_after(1):
        for i in range(upto):
            yield i


async def double(x: int) -> int:
    await checkpoint()
    return 2 * x


async def fail(x: int) -> None:
    await checkpoint()
    raise OSError(x)


async def hang(x: int) -> None:
    await anyio.sleep(100)


def make_loop() -> AgentLoop:
    return AgentLoop(LoopConfig(max_concurrency=3, max_retries=0, timeout_seconds=5))


async def read_stream(loop: AgentLoop, agent: Any, *args: Any, upto: int = 1000, pause: float = 0) -> None:
    async with loop.run_streaming("a", agent, *args) as chunks:
        await anyio.sleep(pause)
        try:
            async for chunk in chunks:
                if chunk == upto:
                    break
        except OSError:
            pass


async def read_to_the_end(loop: AgentLoop) -> None:
    await read_stream(loop, stream, 3)


async def wait_for_room(loop: AgentLoop) -> None:
    await read_stream(loop, stream_at_once, 50, pause=1)


async def leave_early(loop: AgentLoop) -> None:
    await read_stream(loop, stream, 100, upto=1)


async def leave_early_without_room(loop: AgentLoop) -> None:
    await read_stream(loop, stream_at_once, 100, upto=1)


async def read_an_error(loop: AgentLoop) -> None:
    await read_stream(loop, stream, 3, True)


async def cancel_an_agent_that_yields(loop: AgentLoop) -> None:
    await read_stream(loop, stream_in_a_scope, 50, pause=2)


async def leave_stream_all(loop: AgentLoop) -> None:
    async with loop.stream_all(Invocation.map(stream, [30] * 6)) as events:
        await anext(events)


async def read_stream_all(loop: AgentLoop) -> None:
    async with loop.stream_all(Invocation.map(stream_at_once, [30] * 6)) as events:
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

    async def read() -> None:
        async with loop.as_completed(inputs()) as results:
            async for _ in results:
                pass

    with pytest.raises(OSError):
        await read()


async def run_all_of_failing_agents(loop: AgentLoop) -> None:
    await loop.run_all(Invocation.map(fail, range(3)))


async def run_all_of_agents_that_time_out(loop: AgentLoop) -> None:
    await loop.run_all(Invocation.map(hang, range(3)))


USES: list[Callable[[AgentLoop], Awaitable[None]]] = [
    read_to_the_end,
    wait_for_room,
    leave_early,
    leave_early_without_room,
    read_an_error,
    cancel_an_agent_that_yields,
    leave_stream_all,
    read_stream_all,
    leave_as_completed,
    read_the_error_of_an_input,
    run_all_of_failing_agents,
    run_all_of_agents_that_time_out,
]


def is_ours(found: object) -> bool:
    if isinstance(found, FrameType):
        return "agentloop" in found.f_globals.get("__name__", "")

    return type(found).__module__.startswith("agentloop")


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
async def test_nothing_of_ours_waits_for_the_collector(use: Any, entered: bool) -> None:
    loop = make_loop()
    if entered:
        await loop.__aenter__()

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
        if entered:
            await loop.__aexit__(None, None, None)

    assert found == []
