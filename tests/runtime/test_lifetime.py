"""async with loop: the lifetime of a loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    BatchStopped,
    Invocation,
    InvocationCancelled,
    InvocationResult,
    LoopClosed,
    LoopConfig,
    Status,
)


async def double(x: int) -> int:
    await checkpoint()
    return 2 * x


@pytest.fixture
def loop() -> AgentLoop:
    return AgentLoop(LoopConfig(max_concurrency=3))


async def test_all_verbs_work_inside_the_block(loop: AgentLoop) -> None:
    async with loop as entered:
        assert entered is loop
        assert (await loop.run_single("a", double, 1)).output == 2
        assert [r.output for r in await loop.run_all(Invocation.map(double, range(9)))] == [
            2 * i for i in range(9)
        ]
        async with loop.as_completed(Invocation.map(double, range(9))) as results:
            assert sorted([r.unwrap() async for r in results]) == [2 * i for i in range(9)]


async def test_leaving_waits_for_what_runs(loop: AgentLoop) -> None:
    results: list[Any] = []

    async def single() -> None:
        results.append(await loop.run_single("a", anyio.sleep, 5))

    async def batch() -> None:
        results.extend(await loop.run_all([Invocation("b", anyio.sleep, (2,))] * 6))

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(single)
            group.start_soon(batch)
            await anyio.sleep(1)

        assert anyio.current_time() - start == pytest.approx(6)

    assert [result.status for result in results] == [Status.SUCCESS] * 7


async def test_leaving_by_an_exception_cancels_what_runs_and_every_invocation_has_its_result(
    loop: AgentLoop,
) -> None:
    results: list[InvocationResult[Any]] = []

    async def single() -> None:
        results.append(await loop.run_single("a", anyio.sleep_forever))

    async def batch() -> None:
        results.extend(await loop.run_all([Invocation("b", anyio.sleep_forever)] * 6))

    async def read() -> None:
        async with loop.as_completed([Invocation("c", anyio.sleep_forever)] * 6) as done:
            with pytest.raises(BatchStopped, match="the loop was left by ValueError"):
                async for result in done:
                    results.append(result)

    error = ValueError("body")
    async with anyio.create_task_group() as group:
        with pytest.raises(ValueError, match="body") as caught:
            async with loop:
                group.start_soon(single)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(batch)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                raise error

        assert caught.value is error

    by_name = {name: [r for r in results if r.agent_id == name] for name in "abc"}
    assert [r.status for r in by_name["a"]] == [Status.CANCELLED]
    assert isinstance(by_name["a"][0].exception, InvocationCancelled)
    assert "the loop was left by ValueError" in str(by_name["a"][0].exception)
    assert [r.status for r in by_name["b"]] == [Status.CANCELLED] * 2 + [Status.SKIPPED] * 4
    assert [r.status for r in by_name["c"]] == [Status.SKIPPED]


async def test_being_cancelled_while_leaving_cancels_what_runs(loop: AgentLoop) -> None:
    cleaned = False

    async def agent() -> None:
        nonlocal cleaned
        try:
            await anyio.sleep_forever()
        finally:
            cleaned = True

    async with anyio.create_task_group() as group:
        with anyio.move_on_after(5) as scope:
            async with loop:
                group.start_soon(loop.run_single, "a", agent)
                await anyio.sleep(1)

        assert scope.cancelled_caught
        assert cleaned


async def test_new_work_is_refused_afterwards_by_a_clear_error(loop: AgentLoop) -> None:
    async with loop:
        pass

    for view in (loop, loop.with_config(timeout_seconds=1)):
        with pytest.raises(LoopClosed, match="has been left"):
            await view.run_single("a", double, 1)

        with pytest.raises(LoopClosed, match="has been left"):
            await view.run_all([])

        with pytest.raises(LoopClosed, match="has been left"):
            async with view.as_completed([]):
                pass

    async with loop:
        assert (await loop.run_single("a", double, 1)).output == 2


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


async def test_results_can_be_read_inside_an_async_generator_that_is_abandoned(loop: AgentLoop) -> None:
    cleaned = 0

    async def agent(x: int) -> int:
        nonlocal cleaned
        if x == 0:
            return x

        try:
            await anyio.sleep_forever()
        finally:
            cleaned += 1

        return x

    async def read() -> AsyncIterator[int]:
        async with loop.as_completed(Invocation.map(agent, range(10))) as results:
            async for result in results:
                yield result.index

    async with loop:
        generator = read()
        assert await anext(generator) == 0
        await anyio.sleep(1)
        async with anyio.create_task_group() as group:
            # Closed by another task than the one that read.
            group.start_soon(generator.aclose)

    assert cleaned == 3


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


async def test_cancelled_reader_in_an_entered_loop_waits_for_its_agents(loop: AgentLoop) -> None:
    cleaned = 0

    async def agent() -> None:
        nonlocal cleaned
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)

            cleaned += 1

    async with loop:
        start = anyio.current_time()
        with anyio.move_on_after(1) as scope:
            async with loop.as_completed([Invocation("a", agent)] * 9) as results:
                async for _ in results:
                    pass

        assert scope.cancelled_caught
        assert cleaned == 3
        assert anyio.current_time() - start == pytest.approx(4)


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


async def test_results_cannot_be_read_after_the_block(loop: AgentLoop) -> None:
    async with loop.as_completed([Invocation("a", anyio.sleep_forever)]) as results:
        pass

    with pytest.raises(BatchStopped, match="the block that reads the results was left"):
        await anext(results)


async def test_interrupt_from_an_agent_whose_results_nobody_reads_leaves_the_loop(loop: AgentLoop) -> None:
    async def agent() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with loop:
            await loop.as_completed([Invocation("a", agent)]).__aenter__()
            await anyio.sleep(1)


async def test_agent_that_reads_results_while_the_loop_is_left_reads_them_all(loop: AgentLoop) -> None:
    outputs: list[int] = []

    async def parent() -> None:
        async with loop.as_completed(Invocation.map(slow, range(9))) as results:
            async for result in results:
                outputs.append(result.unwrap())

    async def slow(x: int) -> int:
        await anyio.sleep(1)
        return x

    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "parent", parent)
            await anyio.sleep(0.5)

    assert sorted(outputs) == list(range(9))
