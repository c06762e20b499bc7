"""Thousands of random programs, and cancellation at every single checkpoint."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import fuzz
import pytest
from agents import backends, make_loop, run_scheduled
from anyio.lowlevel import checkpoint
from audit import leak_audit

from agentloop import AgentLoop, Backoff, Invocation

pytestmark = pytest.mark.long

PROGRAMS = int(os.environ.get("AGENTLOOP_FUZZ_PROGRAMS", "160"))
BLOCKS = 8


@backends
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_programs_hold_every_guarantee(backend: str, block: int) -> None:
    with leak_audit():
        for seed in range(block, PROGRAMS, BLOCKS):
            try:
                fuzz.run_seed(backend, seed)
            except BaseException as exc:
                exc.add_note(f"seed {seed} on {backend}")
                raise


def test_a_worker_called_into_a_cancelled_batch_waits_for_its_cancellation() -> None:
    # On asyncio nobody tells a task that starts when all else in its scope is shielded. It must not poll
    # for its cancellation: no time passes on a virtual clock then, and a processor burns on a real one.
    with leak_audit():
        fuzz.run_seed("asyncio", 10074)


@backends
def test_random_programs_are_the_same_at_each_run(backend: str) -> None:
    def story(seed: int) -> Any:
        program = fuzz.run_seed(backend, seed)
        return {
            agent_id: [(result.status, result.retries, result.latency_ms) for result in results]
            for agent_id, results in program.metrics.results.items()
        }

    stories = [story(seed) for seed in range(60)]
    assert stories == [story(seed) for seed in range(60)]
    assert sum(map(len, stories)) > 100


# -- cancellation at every checkpoint in turn

Scenario = Callable[[AgentLoop], Coroutine[Any, Any, None]]


async def agent(x: int) -> int:
    await checkpoint()
    if x % 3 == 0:
        raise OSError

    await anyio.sleep(x / 10)
    return x


async def parent(loop: AgentLoop) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "child", agent, 1)
        group.start_soon(loop.run_single, "child", agent, 3)

    await loop.run_all(Invocation.map(agent, range(3)))


async def run_single(loop: AgentLoop) -> None:
    await loop.run_single("a", agent, 0)
    await loop.run_single("a", agent, 1)


async def run_all(loop: AgentLoop) -> None:
    await loop.run_all(Invocation.map(agent, range(5)))


async def run_all_of_an_async_input(loop: AgentLoop) -> None:
    async def inputs() -> AsyncIterator[Any]:
        for x in range(4):
            await checkpoint()
            yield Invocation("a", agent, (x,))

    await loop.run_all(inputs())


async def as_completed(loop: AgentLoop) -> None:
    async with loop.as_completed(Invocation.map(agent, range(5))) as results:
        async for _ in results:
            await checkpoint()


async def as_completed_left_early(loop: AgentLoop) -> None:
    async with loop.as_completed(Invocation.map(agent, range(5))) as results:
        async for _ in results:
            break


async def chunks(x: int, upto: int = 20) -> AsyncGenerator[int]:
    try:
        for i in range(upto):
            if i % 7 == x:
                await anyio.sleep(0.1)

            yield i

        if x == 2:
            raise OSError
    finally:
        with anyio.CancelScope(shield=True):
            await checkpoint()


async def run_streaming(loop: AgentLoop) -> None:
    async with loop.run_streaming("a", chunks, 0) as stream:
        async for i in stream:
            if i % 5 == 0:
                await checkpoint()


async def run_streaming_left_early(loop: AgentLoop) -> None:
    async with loop.run_streaming("a", chunks, 1) as stream:
        async for i in stream:
            await checkpoint()
            if i == 10:
                break


async def run_streaming_retried(loop: AgentLoop) -> None:
    calls = 0

    async def fails(x: int) -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        await checkpoint()
        if calls % 2:
            raise OSError

        with anyio.fail_after(50):
            for i in range(20):
                await checkpoint()
                yield i

    async with loop.with_config(idle_timeout_seconds=5).run_streaming("a", fails, 1) as stream:
        async for _ in stream:
            pass


async def stream_all(loop: AgentLoop) -> None:
    async with loop.stream_all(Invocation.map(chunks, range(4))) as events:
        async for _ in events:
            await checkpoint()


async def streams_in_streams(loop: AgentLoop) -> None:
    async def outer() -> AsyncGenerator[int]:
        async with loop.run_streaming("inner", chunks, 0) as stream:
            async for i in stream:
                if i % 5 == 0:
                    await loop.run_single("b", agent, 1)

                yield i

    async with loop.run_streaming("outer", outer) as stream:
        async for _ in stream:
            pass


async def streams_of_an_entered_loop(loop: AgentLoop) -> None:
    async def read(x: int) -> AsyncGenerator[int]:
        # So few that the first holds its slot only for a while, though its reader pauses.
        async with loop.run_streaming("a", chunks, x, 10) as stream:
            async for chunk in stream:
                yield chunk

    async with loop:
        first, second = read(0), read(1)
        try:
            await anext(first)
            await anext(second)
        finally:
            with anyio.CancelScope(shield=True):
                await first.aclose()
                await second.aclose()


async def nested(loop: AgentLoop) -> None:
    await loop.run_all([Invocation("parent", parent, (loop,))] * 2)


async def entered(loop: AgentLoop) -> None:
    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "a", agent, 0)
            group.start_soon(loop.run_all, list(Invocation.map(agent, range(3))))
            await as_completed(loop)


SCENARIOS: list[Scenario] = [
    run_single,
    run_all,
    run_all_of_an_async_input,
    as_completed,
    as_completed_left_early,
    run_streaming,
    run_streaming_left_early,
    run_streaming_retried,
    stream_all,
    streams_in_streams,
    streams_of_an_entered_loop,
    nested,
    entered,
]


@backends
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_cancelling_the_caller_at_any_checkpoint_leaves_nothing(
    backend: str, scenario: Scenario, limit: int
) -> None:
    for step in range(10_000):
        completed = False

        async def main(step: int = step) -> None:
            nonlocal completed
            # Short, since one moment of a wait to be retried is like another.
            backoff = Backoff(initial_seconds=0.25, jitter="none")
            loop = make_loop(max_concurrency=limit, max_retries=1, backoff=backoff)
            tasks = len(anyio.get_running_tasks())
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def cancel() -> None:
                        # One turn of the event loop per step; when all wait for a timer, time goes on.
                        for turn in range(step):
                            if turn % 4 == 3:
                                await anyio.sleep(0.05)
                            else:
                                await checkpoint()

                        scope.cancel()

                    group.start_soon(cancel)
                    await scenario(loop)
                    completed = True
                    group.cancel_scope.cancel()

            now = loop.statistics()
            assert (now.running, now.waiting) == (0, 0), step
            assert len(anyio.get_running_tasks()) == tasks, step
            with anyio.fail_after(5):
                await AgentLoop(limiter=loop.limiter).run_single("after", checkpoint)

        run_scheduled(backend, None, main)
        if completed:
            assert step > 5
            return

    raise AssertionError("it never completed")
