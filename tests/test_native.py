"""What an asyncio program can do to a task: native cancellation, and the marks that it leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from agentloop import AgentLoop, Invocation, InvocationCancelled, LoopConfig, Status
from agentloop.testing import virtual_clock


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return virtual_clock("asyncio")


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def ok(x: int = 0) -> int:
    await asyncio.sleep(1)
    return x


async def cancels_itself() -> None:
    current_task().cancel()
    await asyncio.sleep(1)


async def cancels_itself_and_returns() -> str:
    current_task().cancel()
    return "kept"


async def cancels_itself_and_raises() -> None:
    current_task().cancel()
    raise ValueError("mine")


async def swallows_its_own_cancellation() -> str:
    current_task().cancel()
    try:
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        return "kept"

    raise AssertionError


async def awaits_a_cancelled_future() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def awaits_a_cancelled_task() -> None:
    task = asyncio.ensure_future(asyncio.sleep(10))
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


async def raises_cancelled_error() -> None:
    raise asyncio.CancelledError


async def lets_a_task_group_fail() -> str:
    async def fail() -> None:
        raise OSError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.sleep(1)
    except* OSError:
        pass

    return "kept"


OUTCOMES: list[tuple[Any, Status]] = [
    (cancels_itself, Status.CANCELLED),
    (cancels_itself_and_returns, Status.SUCCESS),
    (cancels_itself_and_raises, Status.ERROR),
    (swallows_its_own_cancellation, Status.SUCCESS),
    (awaits_a_cancelled_future, Status.CANCELLED),
    (awaits_a_cancelled_task, Status.CANCELLED),
    (raises_cancelled_error, Status.CANCELLED),
    (lets_a_task_group_fail, Status.SUCCESS),
]


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize(("agent", "status"), OUTCOMES)
async def test_one_agent_is_one_result_and_the_next_starts_clean(
    agent: Any, status: Status, limit: int
) -> None:
    async def checks_its_task() -> int:
        assert current_task().cancelling() == 0
        await asyncio.sleep(1)
        return current_task().cancelling()

    async def times_out() -> None:
        await asyncio.sleep(100)

    jobs = [Invocation("odd", agent), Invocation("clean", checks_its_task), Invocation("late", times_out)] * 6
    loop = AgentLoop(LoopConfig(max_concurrency=limit, max_retries=0, timeout_seconds=5))
    results = await loop.run_all(jobs)
    assert [result.status for result in results] == [status, Status.SUCCESS, Status.TIMEOUT] * 6
    assert current_task().cancelling() == 0
    if status is Status.CANCELLED:
        assert isinstance(results[0].exception, InvocationCancelled)
        assert isinstance(results[0].exception.__cause__, asyncio.CancelledError)


async def test_leaked_cancellation_count_hides_no_time_out() -> None:
    async def agent() -> None:
        await lets_a_task_group_fail()
        await asyncio.sleep(100)

    async def swallows() -> None:
        await swallows_its_own_cancellation()
        await asyncio.sleep(100)

    loop = AgentLoop(LoopConfig(timeout_seconds=5, max_retries=0))
    results = await loop.run_all([Invocation("a", agent), Invocation("b", swallows)] * 3)
    assert [result.status for result in results] == [Status.TIMEOUT] * 6


async def test_cancellation_that_an_agent_ordered_for_later_ends_no_batch() -> None:
    async def agent() -> None:
        asyncio.get_running_loop().call_later(1.5, current_task().cancel)
        await asyncio.sleep(1)

    async def inputs() -> Any:
        yield Invocation("a", agent)
        await asyncio.sleep(3)
        for i in range(3):
            yield Invocation("b", ok, (i,))

    results = await AgentLoop(LoopConfig(max_concurrency=1)).run_all(inputs())
    assert [result.status for result in results] == [Status.SUCCESS] * 4


async def test_cancellation_that_an_agent_ordered_for_later_hits_one_waiting_for_a_slot() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2, max_retries=0))

    async def agent() -> None:
        asyncio.get_running_loop().call_later(1.5, current_task().cancel)
        await asyncio.sleep(1)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "first", asyncio.sleep, 0.5)
        await anyio.wait_all_tasks_blocked()
        batch = [Invocation("a", agent), Invocation("b", ok, (1,)), Invocation("c", ok, (2,))]

        async def run() -> None:
            results = await loop.run_all(batch)
            assert len(results) == 3
            assert [result.index for result in results] == [0, 1, 2]

        group.start_soon(run)
        await anyio.sleep(0.6)
        group.start_soon(loop.run_single, "hog", asyncio.sleep, 5)
        await anyio.sleep(0.5)
        group.start_soon(loop.run_single, "hog", asyncio.sleep, 5)


async def test_input_that_is_cancelled_from_within_does_not_look_complete() -> None:
    async def inputs() -> Any:
        yield Invocation("a", ok)
        raise asyncio.CancelledError

    with pytest.raises(InvocationCancelled, match="input was cancelled"):
        await AgentLoop().run_all(inputs())


# -- native cancellation of the caller


async def run_single(loop: AgentLoop, agent: Any) -> None:
    await loop.run_single("a", agent)


async def run_all(loop: AgentLoop, agent: Any) -> None:
    await loop.run_all([Invocation("a", agent)] * 5)


async def as_completed(loop: AgentLoop, agent: Any) -> None:
    async with loop.as_completed([Invocation("a", agent)] * 5) as results:
        async for _ in results:
            pass


@pytest.mark.parametrize("verb", [run_single, run_all, as_completed])
@pytest.mark.parametrize("entered", [False, True])
async def test_native_cancellation_of_the_caller_cancels_the_agents_and_propagates(
    verb: Any, entered: bool
) -> None:
    cleaned = started = 0

    async def agent() -> None:
        nonlocal cleaned, started
        started += 1
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)

            cleaned += 1

    loop = AgentLoop(LoopConfig(max_concurrency=3))
    if entered:
        await loop.__aenter__()

    task = asyncio.ensure_future(verb(loop, agent))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert task.cancelled()
    assert cleaned == started == (1 if verb is run_single else 3)
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == started
    if entered:
        await loop.__aexit__(None, None, None)


@pytest.mark.parametrize("verb", [run_single, run_all, as_completed])
async def test_native_time_limits_of_the_caller_work(verb: Any) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(verb(loop, lambda: asyncio.sleep(100)), 1)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await verb(loop, lambda: asyncio.sleep(100))

    assert current_task().cancelling() == 0


async def test_native_cancellation_while_waiting_for_a_result_loses_none() -> None:
    seen = []
    loop = AgentLoop(LoopConfig(max_concurrency=3))

    async def agent(x: int) -> None:
        await asyncio.sleep(x % 7 / 10)

    async with loop.as_completed(Invocation.map(agent, range(50))) as results:
        while True:
            try:
                seen.append((await asyncio.wait_for(anext(results), 0.1)).index)
            except TimeoutError:
                continue
            except StopAsyncIteration:
                break

    assert sorted(seen) == list(range(50))


async def test_agents_own_cancellation_of_the_callers_task_is_the_callers() -> None:
    task = asyncio.ensure_future(AgentLoop().run_single("a", cancels_itself))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_stray_cancellation_in_the_callers_task_is_a_result() -> None:
    for agent in (awaits_a_cancelled_future, awaits_a_cancelled_task, raises_cancelled_error):
        result = await AgentLoop().run_single("a", agent)
        assert result.status is Status.CANCELLED
        assert current_task().cancelling() == 0


async def test_native_cancellation_and_our_time_out_in_one_moment_is_the_callers() -> None:
    async def call() -> None:
        await AgentLoop(LoopConfig(timeout_seconds=1, max_retries=0)).run_single("a", asyncio.sleep, 100)

    task = asyncio.ensure_future(call())
    asyncio.get_running_loop().call_later(1, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_agents_that_shield_or_gather_are_cancelled_by_our_time_out() -> None:
    async def shields() -> None:
        await asyncio.shield(inner)

    async def gathers() -> None:
        await asyncio.gather(asyncio.sleep(50), asyncio.sleep(60))

    async def waits() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), 50)

    async def queues() -> None:
        await asyncio.Queue[int]().get()

    async def groups() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(50))

    inner = asyncio.ensure_future(asyncio.sleep(3))
    loop = AgentLoop(LoopConfig(timeout_seconds=1, max_retries=0))
    jobs = [Invocation("a", agent) for agent in (shields, gathers, waits, queues, groups)] * 2
    assert [result.status for result in await loop.run_all(jobs)] == [Status.TIMEOUT] * 10
    await inner


async def test_callers_cancellation_is_not_taken_for_a_mark_that_the_agent_left() -> None:
    async def agent() -> None:
        current_task().cancel()
        scope.cancel()

    with anyio.CancelScope() as scope:
        await AgentLoop().run_all([Invocation("a", agent)] * 3)

    assert scope.cancelled_caught
    assert current_task().cancelling() == 0
