"""What an agent finds out about its attempt: current_attempt()."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
from agents import agent_for, backends, each_verb, run, run_scheduled, run_stream
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Attempt,
    Backoff,
    Event,
    Invocation,
    LoopConfig,
    StartedEvent,
    current_attempt,
)

QUICK = LoopConfig(max_retries=2, backoff=Backoff(jitter="none"))


class Recorder:
    """An agent that notes its attempts, fails so many times, and returns its last attempt."""

    def __init__(self, failures: int = 0) -> None:
        self.seen: list[Attempt] = []
        self.errors = [OSError(number) for number in range(failures)]

    async def __call__(self, _: object = None) -> Attempt:
        self.seen.append(current_attempt())
        await checkpoint()
        # Still the same after a step.
        assert current_attempt() == self.seen[-1]
        number = self.seen[-1].number
        if number <= len(self.errors):
            raise self.errors[number - 1]

        return self.seen[-1]


def check(seen: list[Attempt], agent_id: str, errors: list[OSError]) -> None:
    assert [attempt.agent_id for attempt in seen] == [agent_id] * len(seen)
    assert [attempt.number for attempt in seen] == list(range(1, len(seen) + 1))
    assert [attempt.failures for attempt in seen] == [tuple(errors[:count]) for count in range(len(seen))]
    (key,) = {attempt.idempotency_key for attempt in seen}
    assert len(key) == 32
    assert int(key, 16) >= 0


@each_verb
async def test_attempts_of_an_invocation_have_one_key_and_know_the_failures_before(verb: str) -> None:
    agents = [Recorder(failures=count % 3) for count in range(9)]
    jobs = [Invocation(f"a{index}", agent_for(verb, agent)) for index, agent in enumerate(agents)]
    results = await run(verb, AgentLoop(attrs.evolve(QUICK, max_concurrency=2)), jobs)
    assert [result.retries for result in results] == [0, 1, 2] * 3
    for index, agent in enumerate(agents):
        assert len(agent.seen) == len(agent.errors) + 1
        check(agent.seen, f"a{index}", agent.errors)

    assert len({agent.seen[0].idempotency_key for agent in agents}) == len(agents)


async def test_stream_sees_the_same_attempt_after_each_chunk() -> None:
    agent = Recorder(failures=2)

    async def write() -> AsyncIterator[Attempt]:
        yield await agent()
        yield current_attempt()
        yield current_attempt()

    chunks, _, _ = await run_stream(AgentLoop(QUICK), write)
    assert chunks == [agent.seen[-1]] * 3


async def test_same_invocation_that_is_run_again_has_another_key() -> None:
    agent = Recorder()
    invocation = Invocation("a", agent)
    loop = AgentLoop()
    await loop.run_all([invocation, invocation])
    await loop.run_all([invocation])
    await loop.run_single("a", agent)
    assert len({attempt.idempotency_key for attempt in agent.seen}) == 4


async def test_nested_agent_sees_the_innermost_attempt_and_its_parent_its_own_again() -> None:
    loop = AgentLoop(attrs.evolve(QUICK, max_concurrency=1))
    inner = Recorder(failures=1)

    async def outer() -> tuple[Attempt, Attempt, Attempt]:
        before = current_attempt()
        await loop.run_single("inner", inner)
        between = current_attempt()
        await loop.run_all([Invocation("inner", inner)])
        return before, between, current_attempt()

    outcome = (await loop.run_single("outer", outer)).unwrap()
    assert len(set(outcome)) == 1
    assert outcome[0].agent_id == "outer"
    assert [(one.agent_id, one.number) for one in inner.seen] == [("inner", 1), ("inner", 2)] * 2
    assert outcome[0].idempotency_key not in {one.idempotency_key for one in inner.seen}


@pytest.mark.parametrize("failures", [0, 1])
async def test_tasks_and_threads_of_an_agent_see_its_attempt(failures: int) -> None:
    seen: list[Attempt] = []

    async def task() -> None:
        await checkpoint()
        seen.append(current_attempt())

    async def agent() -> Attempt:
        if current_attempt().number <= failures:
            raise OSError

        async with anyio.create_task_group() as group:
            group.start_soon(task)

        seen.append(await anyio.to_thread.run_sync(current_attempt))
        return current_attempt()

    attempt = (await AgentLoop(QUICK).run_single("a", agent)).unwrap()
    assert (seen, attempt.number) == ([attempt, attempt], failures + 1)


async def test_task_left_over_from_an_attempt_goes_on_to_see_that_one() -> None:
    seen: list[Attempt] = []
    ended = anyio.Event()
    left: list[Attempt] = []

    async with anyio.create_task_group() as group:

        async def linger() -> None:
            await ended.wait()
            left.append(current_attempt())

        async def agent() -> None:
            seen.append(current_attempt())
            group.start_soon(linger)
            await anyio.wait_all_tasks_blocked()
            if len(seen) < 3:
                raise OSError

        for run in (
            AgentLoop(QUICK).run_single("a", agent),
            AgentLoop(QUICK).run_all([Invocation("a", agent)]),
        ):
            seen.clear()
            await run
            ended.set()
            await anyio.wait_all_tasks_blocked()
            assert sorted(left, key=lambda attempt: attempt.number) == seen
            left.clear()
            ended = anyio.Event()


async def test_attempt_of_an_agent_cannot_be_had_outside_of_it() -> None:
    with pytest.raises(
        RuntimeError, match="outside of an agent: call it in a function that an AgentLoop runs"
    ):
        current_attempt()

    await AgentLoop().run_single("a", Recorder())
    await AgentLoop().run_all([Invocation("a", Recorder())])
    with pytest.raises(RuntimeError, match="outside of an agent"):
        current_attempt()


def test_attempt_cannot_be_had_without_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match="outside of an agent"):
        current_attempt()


async def test_function_that_is_told_of_a_start_sees_the_attempt() -> None:
    seen: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, StartedEvent):
            seen.append(current_attempt().number)

    agent = Recorder(failures=1)
    await AgentLoop(QUICK, on_event=watch).run_single("a", agent)
    assert seen == [1, 2]
    check(agent.seen, "a", agent.errors)


async def test_threads_that_ask_at_the_same_time_get_one_key() -> None:
    async def agent() -> int:
        with ThreadPoolExecutor(8) as pool:
            contexts = [copy_context() for _ in range(64)]
            attempts = pool.map(lambda context: context.run(current_attempt), contexts)
            return len({attempt.idempotency_key for attempt in attempts})

    assert (await AgentLoop().run_single("a", agent)).output == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@backends
def test_forked_process_has_other_keys(backend: Any) -> None:
    def key() -> str:
        agent = Recorder()
        run_scheduled(backend, None, AgentLoop().run_single, "a", agent)
        return agent.seen[0].idempotency_key

    key()  # what is drawn once per process is drawn
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, key().encode())
        os._exit(0)

    os.waitpid(child, 0)
    theirs = os.read(read, 100).decode()
    os.close(read)
    os.close(write)
    ours = key()
    assert len(theirs) == 32
    # In the same place of the same order, so that only the process tells them apart.
    assert abs(int(ours, 16) - int(theirs, 16)) > 1000


def test_attempt_is_a_value() -> None:
    attempt = Attempt("a", 1, (), "key")
    assert attempt == Attempt("a", 1, (), "key")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        attempt.number = 2  # type: ignore[misc]  # what the test is about
