"""Random programs that are drained at a random moment: nothing is lost, late or left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import anyio
import attrs
import pytest
from agents import backends, run_into, run_scheduled, within
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Invocation,
    InvocationResult,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    Status,
)
from agentloop.testing import FakeHTTPError

Kind = Literal["ok", "fail", "overload", "single", "batch"]
KINDS: list[Kind] = ["ok", "fail", "overload", "single", "batch"]
SECONDS = st.integers(0, 8).map(lambda halves: halves / 2)


@attrs.frozen
class Agent:
    kind: Kind
    seconds: float


@attrs.frozen
class Call:
    at: float
    verb: str
    inputs: Literal["list", "iterator", "async", "endless"]
    agents: list[Agent]


@attrs.frozen
class Program:
    limiter: Literal["plain", "paused", "rate", "keyed"]
    limit: int
    entered: bool
    calls: list[Call]
    drains: list[tuple[float, float | None]]
    """When, and with which grace."""


AGENTS = st.builds(Agent, st.sampled_from(KINDS), SECONDS)
CALLS = st.builds(
    Call,
    SECONDS,
    st.sampled_from(["run_single", "run_streaming", "run_all", "as_completed", "stream_all"]),
    st.sampled_from(["list", "iterator", "async", "endless"]),
    st.lists(AGENTS, min_size=1, max_size=5),
)
PROGRAMS = st.builds(
    Program,
    st.sampled_from(["plain", "paused", "rate", "keyed"]),
    st.integers(1, 3),
    st.booleans(),
    st.lists(CALLS, min_size=1, max_size=4),
    st.lists(st.tuples(SECONDS, st.sampled_from([None, 0.0, 1.5])), min_size=1, max_size=2),
)


def make_limiter(program: Program) -> Any:
    if program.limiter == "keyed":
        return KeyedLimiter(lambda invocation: invocation.agent_id[-1], lambda _: Limiter(program.limit))

    limiter = Limiter(program.limit, rates=[Rate(2, per_seconds=3)] if program.limiter == "rate" else [])
    if program.limiter == "paused":
        limiter.pause()

    return limiter


class Run:
    """A program that runs, and what it has seen."""

    def __init__(self, program: Program) -> None:
        self.program = program
        config = LoopConfig(max_retries=2, backoff=Backoff(1.5, jitter="none"), collect_metrics=False)
        self.loop = AgentLoop(config, limiter=make_limiter(program))
        self.drained_at: float | None = None
        self.ends_by = float("inf")
        self.ended: set[str] = set()
        self.running = 0
        self.wrong: list[str] = []

    async def work(self, agent: Agent, name: str) -> str:
        # What an agent raises is a result, so what is wrong is noted.
        if self.drained_at is not None:
            self.wrong.append(f"{name} has begun")

        self.running += 1
        try:
            await anyio.sleep(agent.seconds)
            if agent.kind == "fail":
                raise OSError("again")

            if agent.kind == "overload":
                raise FakeHTTPError(429, retry_after=2)

            if agent.kind == "single":
                await self.nested(name, 1)
            elif agent.kind == "batch":
                await self.nested(name, 3)

            self.ended.add(name)
            return name
        finally:
            self.running -= 1
            if anyio.current_time() > self.ends_by:
                self.wrong.append(f"{name} has ended late")

    async def nested(self, name: str, count: int) -> None:
        work = Invocation(f"nested {name}", anyio.sleep, (0.5,))
        if count == 1:
            results = [await self.loop.run_single(work.agent_id, work.fn, *work.args)]
        else:
            results = await self.loop.run_all([work] * count)

        if not all(result.success for result in results):
            self.wrong.append(f"of {name} not all nested work was done: {results}")

    async def write(self, agent: Agent, name: str) -> AsyncIterator[str]:
        yield await self.work(agent, name)

    def invocations(self, number: int, call: Call) -> Iterator[Invocation[Any]]:
        fn = self.write if call.verb in ("stream_all", "run_streaming") else self.work
        for index, agent in enumerate(call.agents):
            name = f"{number}.{index}"
            yield Invocation(name, fn, (agent, name))

    def inputs(self, number: int, call: Call) -> Any:
        if call.inputs == "list":
            return list(self.invocations(number, call))

        return self.invocations(number, call) if call.inputs == "iterator" else self.feed(number, call)

    async def feed(self, number: int, call: Call) -> AsyncIterator[Invocation[Any]]:
        for invocation in self.invocations(number, call):
            await anyio.sleep(0.5)
            yield invocation

        if call.inputs == "endless":
            await anyio.sleep(float("inf"))

    async def call(self, number: int, call: Call) -> None:
        await anyio.sleep(call.at)
        (first, *_) = self.invocations(number, call)
        if call.verb == "run_streaming" and self.drained_at is not None:
            with pytest.raises(BatchStopped):
                await self.loop.run_streaming(first.agent_id, first.fn, *first.args).__aenter__()

            return

        results: list[InvocationResult[Any]] = []
        stopped: BatchStopped | None = None
        is_batch = call.verb in ("run_all", "as_completed", "stream_all")
        count = len(call.agents) if is_batch else 1
        try:
            inputs = self.inputs(number, call) if is_batch else [first]
            await run_into(results, call.verb, self.loop, inputs)
        except BatchStopped as exc:
            stopped = exc
            if call.verb == "run_all":
                assert call.inputs in ("async", "endless")
                results = list(exc.results)

        self.check(number, count, results, stopped)

    def check(
        self, number: int, count: int, results: list[InvocationResult[Any]], stopped: BatchStopped | None
    ) -> None:
        assert sorted(result.index for result in results) == list(range(len(results)))
        assert len(results) == count or stopped is not None
        if stopped is not None or any(result.status is Status.SKIPPED for result in results):
            assert self.drained_at is not None

        ended = {name for name in self.ended if name.startswith(f"{number}.")}
        succeeded = {result.agent_id for result in results if result.success}
        assert succeeded <= ended
        # What has ended in the moment in which it was cancelled may be either.
        cancelled = {result.agent_id for result in results if result.status is Status.CANCELLED}
        assert ended <= succeeded | cancelled

    async def drain(self) -> None:
        for at, grace in sorted(self.program.drains, key=lambda drain: drain[0]):
            await anyio.sleep(at if self.drained_at is None else max(0, at - self.drained_at))
            now = anyio.current_time()
            self.drained_at = now if self.drained_at is None else self.drained_at
            if grace is not None:
                self.ends_by = min(self.ends_by, now + grace)

            self.loop.drain(grace_seconds=grace)

    async def main(self) -> None:
        tasks = len(anyio.get_running_tasks())
        async with within(self.loop, self.program.entered):
            await self.calls()
        assert not self.wrong
        now = self.loop.statistics()
        assert (now.running, now.waiting, now.drained, self.running) == (0, 0, True, 0)
        assert len(anyio.get_running_tasks()) == tasks
        if not self.program.entered:
            assert (await self.loop.run_single("late", anyio.sleep, 0)).status is Status.SKIPPED

    async def calls(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self.drain)
            for number, call in enumerate(self.program.calls):
                group.start_soon(self.call, number, call)


@backends
@settings(max_examples=100)
@given(program=PROGRAMS)
def test_drained_program_loses_nothing_and_leaves_nothing_behind(backend: str, program: Program) -> None:
    run_scheduled(backend, None, Run(program).main)
