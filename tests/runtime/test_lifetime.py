"""async with loop: the lifetime of a loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from agents import agent_for, count, double, each_verb, run, run_into
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, BatchStopped, Invocation, InvocationCancelled, LoopClosed, LoopConfig, Status
from agentloop.testing import FakeAgent, Reply, Stall


@pytest.fixture
def loop() -> AgentLoop:
    return AgentLoop(LoopConfig(max_concurrency=3))


@each_verb
async def test_each_verb_works_inside_the_block(loop: AgentLoop, verb: str) -> None:
    async with loop as entered:
        assert entered is loop
        results = await run(verb, loop, Invocation.map(agent_for(verb, double), range(9)))

    assert [result.success for result in results] == [True] * 9
    if "stream" not in verb:
        assert [result.output for result in results] == [2 * i for i in range(9)]


async def test_leaving_waits_for_what_runs(loop: AgentLoop) -> None:
    results: list[Any] = []
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        async with loop:
            jobs = [Invocation("b", anyio.sleep, (2,))] * 6
            group.start_soon(run_into, results, "run_single", loop, [Invocation("a", anyio.sleep, (5,))])
            group.start_soon(run_into, results, "run_all", loop, jobs)
            await anyio.sleep(1)

        assert anyio.current_time() - start == pytest.approx(6)

    assert [result.status for result in results] == [Status.SUCCESS] * 7


async def test_leaving_by_an_exception_cancels_what_runs_and_every_invocation_has_its_result(
    loop: AgentLoop,
) -> None:
    results: list[Any] = []

    async def read() -> None:
        with pytest.raises(BatchStopped, match="the loop was left by ValueError"):
            await run_into(results, "as_completed", loop, [Invocation("c", anyio.sleep_forever)] * 6)

    error = ValueError("body")
    async with anyio.create_task_group() as group:
        with pytest.raises(ValueError, match="body") as caught:
            async with loop:
                for verb, count in (("run_single", 1), ("run_all", 6)):
                    jobs = [Invocation(verb, anyio.sleep_forever)] * count
                    group.start_soon(run_into, results, verb, loop, jobs)
                    await anyio.wait_all_tasks_blocked()

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                raise error

        assert caught.value is error

    single, batch, read_ones = (
        [result for result in results if result.agent_id == name] for name in ("run_single", "run_all", "c")
    )
    assert [result.status for result in single] == [Status.CANCELLED]
    assert isinstance(single[0].exception, InvocationCancelled)
    assert "the loop was left by ValueError" in str(single[0].exception)
    assert [result.status for result in batch] == [Status.CANCELLED] * 2 + [Status.SKIPPED] * 4
    assert [result.status for result in read_ones] == [Status.SKIPPED]


async def test_being_cancelled_while_leaving_cancels_what_runs(loop: AgentLoop) -> None:
    agent = FakeAgent(Stall())
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(5) as scope:
            async with loop:
                group.start_soon(loop.run_single, "a", agent)
                await anyio.sleep(1)

        assert scope.cancelled_caught
        assert [call.cancelled for call in agent.calls] == [True]


@each_verb
async def test_new_work_is_refused_afterwards_by_a_clear_error(loop: AgentLoop, verb: str) -> None:
    async with loop:
        pass

    jobs = [Invocation("a", agent_for(verb, double), (1,))]
    for view in (loop, loop.with_config(timeout_seconds=1)):
        if verb == "run_streaming":
            with pytest.raises(LoopClosed, match="has been left"):
                await view.run_streaming("a", count, 1).__aenter__()
        else:
            with pytest.raises(LoopClosed, match="has been left"):
                await run(verb, view, jobs)

    async with loop:
        assert (await run(verb, loop, jobs))[0].success


async def test_invocations_that_run_while_the_loop_is_left_may_still_run_others(loop: AgentLoop) -> None:
    outputs: list[Any] = []

    async def parent() -> None:
        await anyio.sleep(5)
        outputs.append((await loop.run_single("child", double, 4)).output)
        outputs.extend(r.output for r in await loop.run_all(Invocation.map(double, range(2))))

    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "parent", parent)
            await anyio.sleep(1)

            async def late() -> None:
                await anyio.sleep(1)
                with pytest.raises(LoopClosed):
                    await loop.run_single("late", double, 1)

            group.start_soon(late)

    assert outputs == [8, 0, 2]


async def test_loop_is_entered_once_at_a_time_and_left_by_the_same_task(loop: AgentLoop) -> None:
    async with loop:
        with pytest.raises(RuntimeError, match="entered already"):
            await loop.__aenter__()

        async with anyio.create_task_group() as group:

            async def leave() -> None:
                with pytest.raises(RuntimeError, match="left by the task that entered it"):
                    await loop.__aexit__(None, None, None)

            group.start_soon(leave)

        assert (await loop.run_single("a", double, 1)).output == 2


@pytest.mark.parametrize("verb", ["as_completed", "stream_all"])
async def test_results_can_be_read_inside_async_generators_that_are_abandoned(verb: str) -> None:
    async def agent(x: int) -> None:
        await (anyio.sleep_forever() if x else checkpoint())

    async def read() -> AsyncIterator[Any]:
        async with getattr(loop, verb)(Invocation.map(agent_for(verb, agent), range(5))) as items:
            async for item in items:
                yield item

    async with AgentLoop(LoopConfig(max_concurrency=15)) as loop:
        generators = [read() for _ in range(3)]
        for generator in generators:
            await anext(generator)

        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as group:
            # Closed by other tasks than the one that read.
            for index in (1, 0, 2):
                group.start_soon(generators[index].aclose)

    counts = loop.metrics.snapshot().counts
    assert (counts[Status.SUCCESS], counts[Status.CANCELLED]) == (3, 12)


async def test_results_of_several_batches_can_be_closed_in_any_order(loop: AgentLoop) -> None:
    async with loop:
        readers = [
            loop.as_completed([Invocation("a", anyio.sleep, (i,)) for i in range(5)]) for _ in range(3)
        ]
        for reader in readers:
            results = await reader.__aenter__()
            await anext(results)

        for index in (0, 2, 1):
            await readers[index].__aexit__(None, None, None)


async def test_results_that_nobody_reads_keep_no_loop_open(loop: AgentLoop) -> None:
    with anyio.fail_after(10):
        async with loop:
            reader = loop.as_completed([Invocation("a", anyio.sleep, (1,))] * 50)
            results = await reader.__aenter__()
            await anyio.sleep(0.5)

    assert [(await anext(results)).status for _ in range(3)] == [Status.SUCCESS] * 3
    with pytest.raises(BatchStopped, match="the loop was left"):
        await anext(results)

    await reader.__aexit__(None, None, None)


async def test_leaving_by_an_exception_does_not_wait_for_an_input_that_hangs(loop: AgentLoop) -> None:
    async def inputs() -> AsyncIterator[Any]:
        yield Invocation("a", anyio.sleep_forever)
        await anyio.sleep_forever()

    async def batch() -> None:
        with pytest.raises(BatchStopped, match="the loop was left by ValueError"):
            await loop.run_all(inputs())

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            with pytest.raises(ValueError, match="body"):
                async with loop:
                    group.start_soon(batch)
                    await anyio.sleep(1)
                    raise ValueError("body")

    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


def test_batch_can_be_described_outside_an_event_loop() -> None:
    assert AgentLoop().as_completed([])


async def test_batch_that_was_cancelled_with_its_loop_does_not_look_complete(loop: AgentLoop) -> None:
    async def read() -> None:
        async with loop.as_completed([Invocation("a", anyio.sleep, (i,)) for i in range(9)]) as results:
            assert (await anext(results)).success
            with pytest.raises(BatchStopped, match="the loop was cancelled"):
                while True:
                    await anext(results)

    async with anyio.create_task_group() as group:
        with anyio.move_on_after(1.5):
            async with loop:
                group.start_soon(read)
                await anyio.sleep_forever()


async def test_interrupt_from_an_agent_whose_results_nobody_reads_leaves_the_loop(loop: AgentLoop) -> None:
    with pytest.raises(KeyboardInterrupt):
        async with loop:
            await loop.as_completed([Invocation("a", FakeAgent(KeyboardInterrupt))]).__aenter__()
            await anyio.sleep(1)


async def test_agent_that_reads_results_while_the_loop_is_left_reads_them_all(loop: AgentLoop) -> None:
    results: list[Any] = []
    jobs = Invocation.map(FakeAgent(Reply(after_seconds=1)), range(9))
    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "parent", run_into, results, "as_completed", loop, jobs)
            await anyio.sleep(0.5)

    assert sorted(result.index for result in results) == list(range(9))
    assert all(result.success for result in results)
