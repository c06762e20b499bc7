"""An agent that leaves a cancel scope or a task group open in its task."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from agents import agent_for, each_batch, entered_or_not, run, within
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, BatchStopped, Invocation, LeftOpenError, LoopConfig, Status
from agentloop._eventloop import loop as event_loop


async def leave_scope() -> None:
    anyio.CancelScope().__enter__()


async def leave_cancelled_scope() -> None:
    scope = anyio.CancelScope()
    scope.__enter__()
    scope.cancel()


async def leave_deadline() -> None:
    anyio.move_on_after(1).__enter__()


# Kept, as a client that was opened and never closed would be.
groups: list[Any] = []


@pytest.fixture(autouse=True, params=["insides", "public"])
def way_to_see_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "public":
        monkeypatch.setattr(event_loop, "works_here", lambda *_: False)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    groups.clear()


async def leave_group() -> None:
    groups.append(anyio.create_task_group())
    await groups[-1].__aenter__()


async def leave_group_with_a_task() -> None:
    await leave_group()
    groups[-1].start_soon(anyio.sleep, 50)
    await checkpoint()


async def leave_group_with_a_task_that_fails() -> None:
    async def fail() -> None:
        await anyio.sleep(1)
        raise OSError

    await leave_group()
    groups[-1].start_soon(fail)


WAYS = [
    leave_scope,
    leave_cancelled_scope,
    leave_deadline,
    leave_group,
    leave_group_with_a_task,
    leave_group_with_a_task_that_fails,
]
every_way = pytest.mark.parametrize("leave", WAYS)


@entered_or_not
@each_batch
@every_way
async def test_agent_that_leaves_a_scope_open_fails_alone(leave: Any, verb: str, entered: bool) -> None:
    async def agent(x: int) -> int:
        await anyio.sleep(x)
        if x == 2:
            await leave()

        return x

    loop = AgentLoop(LoopConfig(max_concurrency=4))
    async with within(loop, entered):
        results = await run(verb, loop, [*Invocation.map(agent_for(verb, agent), range(9), "a")])
        assert loop.statistics().running == 0

    assert [result.success for result in results] == [x != 2 for x in range(9)]
    assert verb == "stream_all" or [result.output for result in results] == [0, 1, None, 3, 4, 5, 6, 7, 8]
    assert results[2].status is Status.ERROR
    assert isinstance(results[2].exception, LeftOpenError)
    assert "'a-2' has left a cancel scope or a task group open" in str(results[2].exception)
    assert results[2].retries == 0


@each_batch
@every_way
async def test_error_of_the_agent_is_the_cause(leave: Any, verb: str) -> None:
    async def agent() -> None:
        await leave()
        raise KeyError("mine")

    async def stream() -> AsyncIterator[int]:
        yield 1
        await agent()

    inputs = [Invocation("a", stream if verb == "stream_all" else agent)]
    [result] = await run(verb, AgentLoop(LoopConfig(max_concurrency=2)), inputs)
    assert isinstance(result.exception, LeftOpenError)
    assert isinstance(result.exception.__cause__, KeyError)


async def test_scope_that_is_left_open_at_a_time_out_is_told() -> None:
    async def agent() -> None:
        await leave_scope()
        await anyio.sleep_forever()

    loop = AgentLoop(LoopConfig(timeout_seconds=1, max_concurrency=2))
    results = await loop.run_all([Invocation("a", agent), Invocation("b", anyio.sleep, (0.5,))])
    assert [type(result.exception) for result in results] == [LeftOpenError, type(None)]


@every_way
async def test_batch_stops_after_as_many_as_the_limit(leave: Any) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    results = await loop.run_all(Invocation.map(lambda _: leave(), range(9), "bad"))
    statuses = [result.status for result in results]
    assert statuses[:2] == [Status.ERROR] * 2
    assert set(statuses[3:]) == {Status.SKIPPED}
    stopped = results[-1].exception
    assert isinstance(stopped, BatchStopped)
    assert stopped.reason.startswith("2 agents left a scope open, the last one 'bad-")
    assert isinstance(stopped.__cause__, LeftOpenError)


@every_way
async def test_agents_that_leave_scopes_open_at_once_harm_none_that_begins_then(leave: Any) -> None:
    async def agent(x: int) -> int:
        if x == 3:
            await anyio.sleep(1)
        else:
            await leave()

        return x

    loop = AgentLoop(LoopConfig(max_concurrency=4))
    results = await loop.run_all(Invocation.map(agent, range(4)))
    assert results[3].output == 3


@every_way
async def test_cancelled_batch_leaves_no_task_of_a_spoilt_one(leave: Any) -> None:
    async def agent(x: int) -> None:
        if x == 0:
            await leave()
        else:
            await anyio.sleep_forever()

    loop = AgentLoop(LoopConfig(max_concurrency=3))
    with anyio.move_on_after(5) as scope:
        await loop.run_all(Invocation.map(agent, range(3)))

    assert scope.cancelled_caught
    counts = loop.metrics.snapshot().counts
    assert (counts[Status.ERROR], counts[Status.CANCELLED]) == (1, 2)


# A scope that is cancelled itself ends the agent before.
@pytest.mark.parametrize("leave", [leave for leave in WAYS if leave is not leave_cancelled_scope])
async def test_agent_that_is_cancelled_with_a_scope_open_is_cancelled(leave: Any) -> None:
    async def agent(x: int) -> None:
        if x == 0:
            await leave()

        await anyio.sleep_forever()

    loop = AgentLoop(LoopConfig(max_concurrency=3))
    with anyio.move_on_after(0.5) as scope:
        await loop.run_all(Invocation.map(agent, range(3)))

    assert scope.cancelled_caught
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 3


async def test_interrupt_is_not_hidden_by_a_spoilt_task() -> None:
    async def agent(x: int) -> None:
        await anyio.sleep(x)
        if x == 1:
            raise KeyboardInterrupt

        await leave_group()

    loop = AgentLoop(LoopConfig(max_concurrency=3))
    with pytest.raises(KeyboardInterrupt):
        await loop.run_all(Invocation.map(agent, range(2)))


@entered_or_not
@every_way
async def test_run_single_raises_and_names_the_agent(leave: Any, entered: bool) -> None:
    loop = AgentLoop()
    outcome: list[BaseException] = []

    async def call() -> None:
        try:
            await loop.run_single("forgetful", leave)
        except BaseException as exc:
            outcome.append(exc)
            raise

    async with within(loop, entered):
        # The scope is left open in a task that nothing else uses.
        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError), flatten_subgroups=True):
            async with anyio.create_task_group() as group:
                group.start_soon(call)

        assert loop.statistics().running == 0

    assert [type(exc) for exc in outcome] == [LeftOpenError]
    assert "'forgetful'" in str(outcome[0])
    assert loop.metrics.snapshot().counts[Status.ERROR] == 1


@entered_or_not
@every_way
async def test_stream_that_leaves_a_scope_open_fails_alone(leave: Any, entered: bool) -> None:
    async def agent() -> AsyncIterator[int]:
        yield 1
        await leave()

    loop = AgentLoop(LoopConfig(max_concurrency=4))
    async with within(loop, entered):
        for _ in range(3):
            with pytest.raises(LeftOpenError, match="'writer' has left"):
                async with loop.run_streaming("writer", agent) as stream:
                    assert await anext(stream) == 1
                    await anext(stream)

            assert stream.result.status is Status.ERROR

        assert (await loop.run_single("a", checkpoint)).success
        assert loop.statistics().running == 0


async def test_runtime_error_of_a_streams_function_does_not_pass_for_a_scope_left_open() -> None:
    def agent() -> AsyncIterator[int]:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        async with AgentLoop().run_streaming("a", agent) as stream:
            await anext(stream)

    assert not isinstance(stream.result.exception, LeftOpenError)


def test_interrupt_of_the_program_is_not_hidden_by_a_spoilt_task() -> None:
    async def agent(x: int) -> None:
        if x:
            await anyio.sleep_forever()

        await leave_group()

    def run(backend: str) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        loop = AgentLoop(LoopConfig(max_concurrency=3))
        anyio.run(loop.run_all, [Invocation("a", agent, (x,)) for x in (0, 0, 1)], backend=backend)

    with pytest.raises(KeyboardInterrupt):
        run("asyncio")

    # Trio raises it where the main task waits, within task groups.
    with pytest.RaisesGroup(KeyboardInterrupt, allow_unwrapped=True, flatten_subgroups=True):
        run("trio")
