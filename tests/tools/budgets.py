"""
Random programs on one budget, against an account of their own that is kept by events.

``python tests/tools/budgets.py --backend trio --seeds 0:1000`` runs as many.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any, Literal

import anyio
import attrs

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    BudgetSpent,
    Event,
    Invocation,
    InvocationCancelled,
    InvocationResult,
    Limiter,
    LoopConfig,
    Rate,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    VerdictKind,
)
from agentloop.testing import FakeHTTPError, virtual_clock

Verb = Literal["run_single", "run_streaming", "run_all", "as_completed", "stream_all"]
VERBS: list[Verb] = ["run_single", "run_streaming", "run_all", "as_completed", "stream_all"]
# What settle says of an attempt that did not succeed.
FAILED_COST = 1


@attrs.frozen
class Agent:
    seconds: float
    cost: int
    real_cost: int
    failures: list[Literal["fail", "overload"]]
    nested: list[Agent]
    nested_verb: Verb


@attrs.frozen
class Call:
    at: float
    verb: Verb
    loop: int
    agents: list[Agent]
    cancel_at: float | None
    natively: bool


@attrs.frozen
class Program:
    limit: int
    max_concurrency: int
    settled: bool
    rate: bool
    runs: list[list[Call]]
    """The calls of each event loop that uses the budget in turn."""


def make_agent(random: Random, depth: int) -> Agent:
    nested = [make_agent(random, depth - 1) for _ in range(random.randint(0, 2))] if depth else []
    return Agent(
        random.randint(0, 8) / 2,
        random.randint(0, 9),
        random.randint(0, 12),
        random.choices(["fail", "overload"], k=random.randint(0, 2)),
        nested,
        random.choice(VERBS),
    )


def make_call(random: Random) -> Call:
    return Call(
        random.randint(0, 8) / 2,
        random.choice(VERBS),
        random.randint(0, 2),
        [make_agent(random, 2) for _ in range(random.randint(1, 4))],
        random.choice([None, random.randint(0, 8) / 2]),
        random.choice([True, False]),
    )


def make_program(random: Random) -> Program:
    runs = [[make_call(random) for _ in range(random.randint(0, 4))] for _ in range(random.randint(1, 2))]
    return Program(
        random.randint(9, 40),
        random.randint(1, 3),
        random.choice([True, False]),
        random.choice([True, False]),
        runs,
    )


class Account:
    """What was spent, by the events of attempts alone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.agents: dict[str, Agent] = {}
        # What the attempts have cost, by invocation; the last figure may change.
        self.costs: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.overloaded: set[str] = set()
        # Those whose agents run others.
        self.waiting: set[str] = set()
        self.settled: list[str] = []
        self.succeeded: list[str] = []
        # What was left, and whether anything could still come back, at any moment of the current time.
        self.now = 0.0
        # By how much settled costs were above their estimates, at the current time.
        self.raised = 0
        self.state = program.limit, False
        self.seen = {self.state}
        self.stops: dict[str, set[tuple[int, bool]]] = {}
        self.wrong: list[str] = []

    @property
    def left(self) -> int:
        return self.program.limit - sum(map(sum, self.costs.values()))

    def look(self, now: float | None = None) -> None:
        state = (self.left, self.program.settled and bool(self.running - self.waiting))
        if now is not None and now != self.now:
            self.now, self.seen, self.raised = now, {self.state}, 0

        self.state = state
        self.seen.add(state)

    def cost(self, invocation: Invocation[Any]) -> int:
        return self.agents[invocation.agent_id].cost

    def settle(self, result: InvocationResult[Any]) -> int:
        name = result.agent_id
        self.settled.append(name)
        cost = self.agents[name].real_cost if result.success else FAILED_COST
        if name not in self.overloaded:
            self.raised += max(0, cost - self.costs[name][-1])
            self.costs[name][-1] = cost

        self.look()
        return cost

    def tell(self, event: Event) -> None:
        if isinstance(event, StartedEvent):
            name, cost = event.invocation.agent_id, self.cost(event.invocation)
            self.look(event.at)
            # What was reserved a moment ago begins, even if another attempt has cost more than it should.
            if cost > max(0, self.left + self.raised):
                self.wrong.append(f"{name} begins and costs {cost}, but {self.left} is left")

            self.costs.setdefault(name, []).append(cost)
            self.running.add(name)
            self.overloaded.discard(name)
            self.look(event.at)
        elif isinstance(event, RetryEvent):
            self.end(event.invocation.agent_id, event.verdict.kind is VerdictKind.OVERLOAD)
            self.look(event.at)
        elif isinstance(event, ResultEvent):
            name, result = event.invocation.agent_id, event.result
            error = result.exception
            if name in self.running:
                self.end(name, isinstance(error, FakeHTTPError))
                self.succeeded += [name] if result.success else []

            self.look(event.at)
            if result.status is Status.SKIPPED:
                self.check_skipped(name, error)
        elif isinstance(event, StopEvent):
            self.look(event.at)
            self.stops[event.reason] = self.seen

    def end(self, name: str, overloaded: bool) -> None:
        self.running.remove(name)
        if overloaded:
            self.overloaded.add(name)
            self.costs[name][-1] = 0

    def check_skipped(self, name: str, error: Exception | None) -> None:
        """An invocation is skipped only if it, or the first in line of its batch, can never be paid."""
        seen, spent = self.seen, error
        if isinstance(error, BatchStopped) and error.__cause__ is not None:
            seen, spent = self.stops[error.reason], error.__cause__

        if isinstance(spent, BudgetSpent):
            if spent.cost <= spent.remaining or (spent.remaining, False) not in seen:
                self.wrong.append(f"{name} is skipped by {spent}, seen {seen}")
        elif not isinstance(error, (InvocationCancelled, BatchStopped)):
            self.wrong.append(f"{name} is skipped by {error!r}")


class Run:
    """A program in one event loop."""

    def __init__(self, account: Account, limiter: Limiter) -> None:
        config = LoopConfig(max_retries=2, backoff=Backoff(1.5, jitter="none"), collect_metrics=False)
        loop = AgentLoop(config, limiter=limiter, on_event=account.tell)
        other = AgentLoop(config, limiter=limiter, on_event=account.tell)
        self.loops = [loop, loop.with_config(timeout_seconds=1000), other]
        self.account = account

    async def work(self, agent: Agent, name: str, failures: list[str], loop: AgentLoop) -> None:
        await anyio.sleep(agent.seconds)
        if agent.nested:
            account = self.account
            account.waiting.add(name)
            account.look()
            try:
                await self.use(agent.nested_verb, loop, agent.nested)
            finally:
                account.waiting.discard(name)

        if failures:
            raise ValueError if failures.pop() == "fail" else FakeHTTPError(429)

    async def write(self, *args: Any) -> AsyncIterator[int]:
        await self.work(*args)
        yield 1
        yield 2

    def invocations(self, verb: Verb, loop: AgentLoop, agents: list[Agent]) -> Iterator[Invocation[Any]]:
        fn: Any = self.write if verb in ("stream_all", "run_streaming") else self.work
        for agent in agents:
            name = f"{len(self.account.agents)}"
            self.account.agents[name] = agent
            yield Invocation(name, fn, (agent, name, [*agent.failures], loop))

    async def use(self, verb: Verb, loop: AgentLoop, agents: list[Agent]) -> None:
        # What goes wrong is checked by events; one result per input is checked elsewhere.
        with suppress(BatchStopped, BudgetSpent, ValueError, FakeHTTPError):
            inputs = list(self.invocations(verb, loop, agents))
            only = inputs[0]
            if verb == "run_all":
                assert len(await loop.run_all(inputs)) == len(agents)
            elif verb == "run_single":
                await loop.run_single(only.agent_id, only.fn, *only.args)
            else:
                call = (only.agent_id, only.fn, *only.args) if verb == "run_streaming" else (inputs,)
                async with getattr(loop, verb)(*call) as items:
                    async for _ in items:
                        pass

    async def call(self, call: Call) -> None:
        await anyio.sleep(call.at)
        use = partial(self.use, call.verb, self.loops[call.loop], call.agents)
        if call.cancel_at is None:
            await use()
        elif call.natively and is_asyncio():
            task = asyncio.ensure_future(use())
            asyncio.get_running_loop().call_later(call.cancel_at, task.cancel)
            with suppress(asyncio.CancelledError):
                await task
        else:
            with anyio.move_on_after(call.cancel_at):
                await use()

    async def main(self, calls: list[Call]) -> None:
        async with anyio.create_task_group() as group:
            for call in calls:
                group.start_soon(self.call, call)


def is_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False

    return True


def run(program: Program, backend: Literal["asyncio", "trio"]) -> None:
    account = Account(program)
    settle = account.settle if program.settled else None
    rates = [Rate(program.limit, per_seconds=None, cost=account.cost, settle=settle)]
    if program.rate:
        rates.insert(0, Rate(2, per_seconds=3))

    limiter = Limiter(program.max_concurrency, rates=rates)
    for calls, turn in zip(
        program.runs, [backend, "trio" if backend == "asyncio" else "asyncio"], strict=False
    ):
        name, options = virtual_clock(turn)
        account.now = -1
        anyio.run(Run(account, limiter).main, calls, backend=name, backend_options=options)

    assert not account.wrong
    assert not account.running
    assert limiter.statistics().remaining == (account.left,)
    if program.settled:
        assert sorted(account.succeeded) == sorted(set(account.settled) & set(account.succeeded))
        assert len(account.settled) == len(set(account.settled))

    # Each attempt has begun with its whole cost left, so only what they cost besides can be too much.
    agents = account.agents
    errors = [max(0, agents[name].real_cost - agents[name].cost) for name in account.succeeded]
    errors += [FAILED_COST for _ in agents]
    assert account.left >= -sum(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], required=True)
    parser.add_argument("--seeds", default="0:1000", help="such as 0:1000, or 7:8 for that of seed 7 alone")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split(":"))
    for seed in range(first, last):
        try:
            run(make_program(Random(seed)), arguments.backend)
        except BaseException:
            print(f"seed {seed}")
            raise


if __name__ == "__main__":
    main()
