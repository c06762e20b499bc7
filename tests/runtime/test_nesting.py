"""Invocations that run others on the same loop."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import anyio
import pytest
from agents import both_verbs, make_loop, run
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, Backoff, Invocation, InvocationResult, LoopConfig, Status
from agentloop._limits.slots import Slot
from agentloop._stream.channel import BUFFER
from agentloop.testing import FakeAgent, FakeHTTPError, Reply


class Meter:
    """Counts the agents that do something of their own, rather than wait for others that they run."""

    def __init__(self) -> None:
        self.working = self.peak = self.total = 0

    async def work(self, seconds: float = 1) -> None:
        self.working += 1
        self.total += 1
        self.peak = max(self.peak, self.working)
        try:
            await anyio.sleep(seconds)
        finally:
            self.working -= 1


@pytest.fixture
def meter() -> Meter:
    return Meter()


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3, 10, 50])
async def test_single_in_single_never_deadlocks(limit: int, depth: int, meter: Meter) -> None:
    loop = make_loop(max_concurrency=limit, timeout_seconds=None)

    async def agent(depth: int) -> int:
        await meter.work()
        if depth:
            return 1 + (await loop.run_single("child", agent, depth - 1)).unwrap()

        return 0

    results = await loop.run_all(Invocation.map(agent, [depth] * 4))
    assert [result.unwrap() for result in results] == [depth] * 4
    assert meter.peak == min(limit, 4)


@both_verbs
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_batches_in_batches_never_deadlock(limit: int, verb: str, meter: Meter) -> None:
    loop = make_loop(max_concurrency=limit)

    async def agent(depth: int) -> int:
        await meter.work()
        if not depth:
            return 1

        jobs = [Invocation("child", agent, (depth - 1,)) for _ in range(3)]
        return sum(result.unwrap() for result in await run(verb, loop, jobs))

    results = await loop.run_all(Invocation.map(agent, [3] * 3))
    assert [result.unwrap() for result in results] == [27] * 3
    assert (meter.total, meter.peak) == (3 * (1 + 3 + 9 + 27), limit)


@pytest.mark.parametrize("limit", [1, 2, 4])
async def test_several_nested_calls_at_once_share_the_parents_slot(limit: int, meter: Meter) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=limit))

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(loop.run_single, "child", meter.work)

            group.start_soon(loop.run_all, [Invocation("child", meter.work)] * 4)

    start = anyio.current_time()
    await loop.run_single("parent", parent)
    assert (meter.peak, meter.total) == (limit, 10)
    assert anyio.current_time() - start == pytest.approx(-(-10 // limit), abs=1.01)


async def test_reader_of_a_batch_may_run_others_in_between(meter: Meter) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def parent() -> None:
        async with loop.as_completed([Invocation("child", meter.work)] * 5) as results:
            async for _ in results:
                await loop.run_single("between", meter.work)

    await loop.run_single("parent", parent)
    await parent()
    assert (meter.total, meter.peak) == (20, 1)


async def test_views_and_other_loops_with_the_same_limiter_lend_too(meter: Meter) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    view = loop.with_config(timeout_seconds=100)
    other = AgentLoop(limiter=loop.limiter)

    async def parent() -> None:
        await view.run_single("view", meter.work)
        await other.run_single("other", meter.work)

    assert (await loop.run_single("parent", parent)).success
    assert meter.total == 2


async def test_slots_are_lent_through_a_loop_with_another_limiter(meter: Meter) -> None:
    one, two = AgentLoop(LoopConfig(max_concurrency=1)), AgentLoop(LoopConfig(max_concurrency=1))

    async def outer() -> None:
        assert (await two.run_single("middle", middle)).success

    async def middle() -> None:
        assert (await one.run_single("inner", meter.work)).success

    assert (await one.run_single("outer", outer)).success
    assert meter.total == 1


async def test_nested_invocation_that_waits_to_retry_lends_the_slot_on(meter: Meter) -> None:
    backoff = Backoff(initial_seconds=100, max_seconds=100, jitter="none")
    loop = make_loop(max_concurrency=1, max_retries=1, backoff=backoff)

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "flaky", FakeAgent(OSError(), Reply()))
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(2):
                await loop.run_single("other", meter.work)

    assert (await loop.run_single("parent", parent)).success


async def test_fatal_verdict_in_a_nested_batch_ends_that_batch_only() -> None:
    fatal = [Invocation("a", FakeAgent(FakeHTTPError(401)))] * 2

    async def parent(x: int) -> list[Status]:
        return [result.status for result in await loop.run_all(fatal)]

    loop = make_loop(max_concurrency=1)
    results = await loop.run_all(Invocation.map(parent, range(2)))
    assert [result.output for result in results] == [[Status.ERROR, Status.SKIPPED]] * 2


async def test_time_out_of_the_parent_cancels_the_children(meter: Meter) -> None:
    loop = make_loop(max_concurrency=2, timeout_seconds=5)
    children = [Invocation("child", meter.work, (100,))] * 4
    result = await loop.run_single("parent", loop.with_config(timeout_seconds=None).run_all, children)
    assert (result.status, meter.working, meter.total) == (Status.TIMEOUT, 0, 2)


async def test_child_that_outlives_its_parent_keeps_the_slot_until_it_ends(meter: Meter) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with anyio.create_task_group() as group:

        async def parent() -> None:
            group.start_soon(loop.run_single, "child", meter.work, 5)
            await checkpoint()
            await checkpoint()

        await loop.run_single("parent", parent)
        assert loop.statistics().running == 1
        start = anyio.current_time()
        await loop.run_single("next", meter.work)
        assert anyio.current_time() - start == pytest.approx(6)

    assert meter.peak == 1


async def test_child_that_waits_when_its_parent_ends_is_lent_the_next_slot_further_out(meter: Meter) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def grandparent() -> None:
        async with anyio.create_task_group() as group:

            async def parent() -> None:
                group.start_soon(loop.run_single, "first", meter.work, 3)
                group.start_soon(loop.run_single, "second", meter.work, 3)
                await anyio.sleep(1)

            await loop.run_single("parent", parent)

    with anyio.fail_after(100):
        assert (await loop.run_single("grandparent", grandparent)).success

    assert (meter.total, meter.peak) == (2, 1)


async def test_child_that_waits_while_its_parent_and_the_slot_are_cancelled_leaves_nothing() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "first", anyio.sleep, 10)
            group.start_soon(loop.run_single, "second", anyio.sleep, 10)

    for seconds in (1, 5, 9.5, 10, 10.5, 15):
        with anyio.move_on_after(seconds):
            await loop.run_single("parent", parent)

        assert loop.statistics().running == 0


async def test_chain_of_invocations_that_start_the_next_in_the_background_forgets_its_past() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    slots = 0

    def count_slots() -> int:
        gc.collect()
        return sum(isinstance(thing, Slot) for thing in gc.get_objects())

    async def link(left: int) -> None:
        nonlocal slots
        if left:
            group.start_soon(loop.run_single, "link", link, left - 1)
            await checkpoint()
        else:
            slots = count_slots() - before

    # Other tests may have left some.
    before = count_slots()
    async with anyio.create_task_group() as group:
        await loop.run_single("link", link, 1500)

    assert loop.statistics().running == 0
    assert 0 < slots <= 10


async def test_nested_calls_count_the_slot_once() -> None:
    loop = make_loop(max_concurrency=3)

    async def child() -> int:
        return loop.statistics().running

    result = await loop.run_single("parent", loop.run_single, "child", child)
    assert result.unwrap().output == 1


async def full() -> AsyncIterator[int]:
    """Yield one chunk more than are let in before any was read."""
    for number in range(BUFFER + 1):
        yield number


async def drain(stream: AsyncIterator[int]) -> None:
    async for _ in stream:
        pass


async def test_waiter_for_the_slot_further_out_is_lent_the_one_that_is_resumed() -> None:
    # A stream comes back for its slot after its own reader has asked for it, and before that one has it: it
    # would wait for what its reader holds, while its reader waits for it.
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    read_on, was_read, release = anyio.Event(), anyio.Event(), anyio.Event()

    async def read_inner() -> None:
        async with loop.run_streaming("inner", full) as stream:
            await read_on.wait()
            await drain(stream)

        was_read.set()

    async def middle() -> AsyncIterator[int]:
        group.start_soon(read_inner)
        await anyio.wait_all_tasks_blocked()
        async for number in full():
            yield number

        await was_read.wait()

    async def outer() -> None:
        async with loop.run_streaming("middle", middle) as stream, anyio.create_task_group() as own:
            await anyio.wait_all_tasks_blocked()
            own.start_soon(loop.run_single, "other", release.wait)
            await anyio.wait_all_tasks_blocked()
            own.start_soon(drain, stream)
            await anyio.wait_all_tasks_blocked()
            assert loop.statistics().waiting == 1
            read_on.set()
            await anyio.wait_all_tasks_blocked()
            assert loop.statistics().waiting == 2
            release.set()

    async with anyio.create_task_group() as group:
        result = await loop.run_single("outer", outer)

    assert result.success
    assert was_read.is_set()


async def test_slot_that_is_resumed_with_a_token_gives_that_back() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    release = anyio.Event()
    running: list[int] = []

    async def inner() -> AsyncIterator[int]:
        async for number in full():
            yield number

        running.append(loop.statistics().running)

    async def outer() -> None:
        async with loop.run_streaming("inner", inner) as stream, anyio.create_task_group() as group:
            await anyio.wait_all_tasks_blocked()
            # The slot that the stream was lent is lent to this one while it waits for its reader.
            group.start_soon(loop.run_single, "other", release.wait)
            await anyio.wait_all_tasks_blocked()
            running.append(loop.statistics().running)
            await drain(stream)
            running.append(loop.statistics().running)
            release.set()

    assert (await loop.run_single("outer", outer)).success
    assert running == [1, 2, 1]


async def test_slot_that_is_resumed_after_the_one_around_it_has_ended_lends_itself() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    read_on, go_on, has_run, release = (anyio.Event() for _ in range(4))

    async def run_nested() -> None:
        await go_on.wait()
        await loop.run_single("nested", checkpoint)
        has_run.set()

    async def inner() -> AsyncIterator[int]:
        group.start_soon(run_nested)
        async for number in full():
            yield number

        await has_run.wait()

    async def read() -> None:
        async with loop.run_streaming("inner", inner) as stream:
            await read_on.wait()
            await drain(stream)

    async def outer() -> None:
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as group:
        await loop.run_single("outer", outer)
        group.start_soon(loop.run_single, "other", release.wait)
        await anyio.wait_all_tasks_blocked()
        read_on.set()
        await anyio.wait_all_tasks_blocked()
        assert loop.statistics().waiting == 1
        go_on.set()
        await anyio.wait_all_tasks_blocked()
        assert loop.statistics().waiting == 2
        release.set()

    assert has_run.is_set()


@pytest.mark.parametrize("frames", range(0, 60, 6))
async def test_chain_of_agents_without_an_end_is_an_error_of_the_innermost(frames: int) -> None:
    loop = AgentLoop()

    async def agent() -> object:
        return (await loop.run_single("a", agent)).unwrap()

    async def begin(frames: int) -> InvocationResult[object]:
        return await (begin(frames - 1) if frames else loop.run_single("a", agent))

    result = await begin(frames)
    assert (result.status, type(result.exception)) == (Status.ERROR, RecursionError)
    assert loop.statistics().running == 0
