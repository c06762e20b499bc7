"""Budgets: what may be spent once, who waits for what may come back, and what happens when it is spent."""

import asyncio
import math
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from agents import (
    agent_for,
    backends,
    each_batch,
    into,
    launch,
    on_asyncio,
    run_scheduled,
    run_stream,
    run_until_stopped,
)
from trouble import ONCE, one_chunk, one_or_batch, overload, passed, run_one

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    BudgetSpent,
    ContextStore,
    Invocation,
    InvocationResult,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    Status,
    VerdictKind,
    classify,
)
from agentloop.testing import Fail, FakeAgent, FakeHTTPError

QUICK = LoopConfig(backoff=Backoff(1, jitter="none"))
FAILS = FakeAgent(OSError)


def cost(invocation: Invocation[Any]) -> float:
    return invocation.args[0]


def real_cost(result: InvocationResult[Any]) -> float:
    return result.output if result.success else 1


def budget(limit: float, max_concurrency: int = 10, settled: bool = False) -> Limiter:
    """Make a limiter with a budget; agents are given what they cost, and return what they did cost."""
    settle = real_cost if settled else None
    return Limiter(max_concurrency, rates=[Rate(limit, per_seconds=None, cost=cost, settle=settle)])


async def agent(estimate: float, real: float | None = None, seconds: float = 1) -> float:
    await anyio.sleep(seconds)
    return estimate if real is None else real


def jobs(*costs: float) -> list[Invocation[float]]:
    return [Invocation(f"{index}", agent, (each,)) for index, each in enumerate(costs)]


def remaining(limiter: Limiter) -> float:
    (left,) = limiter.statistics().remaining
    return left


def statuses(results: list[InvocationResult[Any]]) -> str:
    """Give the first letter of each status."""
    return "".join(str(result.status)[0] for result in results)


# -- values


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"burst": 5}, "burst must be left out where per_seconds is None, got 5"),
        ({"limit": 0.5}, "limit must be at least 1 where each attempt costs 1, got 0.5$"),
        ({"limit": 0}, "limit must be greater than 0, got 0"),
    ],
)
def test_budget_that_makes_no_sense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Rate(**{"limit": 5, "per_seconds": None, **arguments})


def test_error_of_a_spent_budget_is_permanent_and_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(BudgetSpent(5, 2.5, 50)))
    assert (error.cost, error.remaining, error.limit) == (5, 2.5, 50)
    assert str(error) == "a cost of 5 cannot be paid any more: 2.5 is left of a budget of 50"
    assert classify(error).kind is VerdictKind.PERMANENT


def test_each_budget_has_a_figure() -> None:
    rates = [Rate(5, per_seconds=None), Rate(60), Rate(7, per_seconds=None)]
    assert Limiter(1, rates=rates).statistics().remaining == (5, 7)
    assert Limiter(1, rates=[Rate(60)]).statistics().remaining == ()


# -- spending


async def test_budget_is_spent_once_and_for_all() -> None:
    limiter = budget(10)
    loop = AgentLoop(limiter=limiter)
    view = loop.with_config(timeout_seconds=5)
    assert (await loop.run_single("a", agent, 4)).success
    await anyio.sleep(100_000)
    assert (await view.run_single("b", agent, 4)).success
    assert remaining(limiter) == 2
    result = await AgentLoop(limiter=limiter).run_single("c", agent, 3)
    assert result.status is Status.SKIPPED
    assert isinstance(result.exception, BudgetSpent)
    assert (result.exception.cost, result.exception.remaining, result.exception.limit) == (3, 2, 10)
    # What is left is there for those who can do with it.
    assert (await loop.run_single("d", agent, 2)).success
    assert (await loop.run_single("e", agent, 0)).success
    assert remaining(limiter) == 0


async def test_fractions_add_up() -> None:
    loop = AgentLoop(limiter=budget(0.3))
    results = await loop.run_all(jobs(*[0.1] * 3))
    assert statuses(results) == "sss"
    assert loop.limiter.statistics().remaining == (0,)


async def test_reservation_counts_until_the_cost_is_known() -> None:
    limiter = budget(10, settled=True)
    async with anyio.create_task_group() as group:
        group.start_soon(AgentLoop(limiter=limiter).run_single, "a", agent, 6, 2)
        await anyio.sleep(0.5)
        assert remaining(limiter) == 4

    assert remaining(limiter) == 8


async def test_settled_cost_above_the_estimate_leaves_less_than_nothing() -> None:
    loop = AgentLoop(limiter=budget(10, settled=True))
    assert (await loop.run_single("a", agent, 6, 13)).success
    assert remaining(loop.limiter) == -3
    result = await loop.run_single("b", agent, 1)
    assert result.error == "BudgetSpent: a cost of 1 cannot be paid any more: -3 is left of a budget of 10"
    assert (await loop.run_single("free", agent, 0)).success


@one_or_batch
async def test_more_than_the_whole_budget_is_an_error_of_one_invocation(verb: str) -> None:
    loop = AgentLoop(limiter=budget(10))
    assert (await loop.run_single("before", agent, 5)).success
    results = [await run_one(verb, loop, "a", agent, each) for each in (11, 5)]
    assert statuses(results) == "es"
    assert isinstance(results[0].exception, ValueError)
    assert "is 11, which can never be paid with limit=10" in str(results[0].error)


# -- failures


async def test_each_attempt_pays_and_an_overload_gives_it_back() -> None:
    limiter = budget(100)
    outcomes: list[Exception] = [OSError("1"), FakeHTTPError(429), OSError("2")]
    left = []

    async def fail(_: float) -> None:
        left.append(remaining(limiter))
        if outcomes:
            raise outcomes.pop(0)

    assert (await AgentLoop(QUICK, limiter=limiter).run_single("a", fail, 10)).retries == 3
    assert left == [90, 80, 80, 70]


@one_or_batch
async def test_last_overload_is_given_back_whatever_settle_says(verb: str) -> None:
    loop = AgentLoop(ONCE, limiter=budget(10, settled=True))
    assert (await run_one(verb, loop, "a", FakeAgent(FakeHTTPError(429)), 10)).status is Status.ERROR
    assert remaining(loop.limiter) == 10


@one_or_batch
async def test_last_failure_is_settled_and_those_before_are_not(verb: str) -> None:
    loop = AgentLoop(LoopConfig(max_retries=2, backoff=Backoff(1)), limiter=budget(100, settled=True))
    await run_one(verb, loop, "a", FAILS, 10)
    assert remaining(loop.limiter) == 100 - 10 - 10 - 1


async def test_retry_that_cannot_be_paid_is_not_made() -> None:
    result = await AgentLoop(QUICK, limiter=budget(10)).run_single("a", FAILS, 6)
    assert (result.status, result.retries) == (Status.ERROR, 0)
    assert isinstance(result.exception, OSError)
    (note,) = result.exception.__notes__
    assert note == "not retried: a cost of 6 cannot be paid any more: 4 is left of a budget of 10"


async def test_attempt_that_never_began_pays_nothing() -> None:
    limiter, free = budget(10, 1), anyio.Event()
    loop = AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "hold", lambda _: free.wait(), 1)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                await launch(inner, loop.run_single, "a", agent, 5)
                # The slot is granted in the moment of the cancellation.
                free.set()
                scope.cancel()

    assert remaining(limiter) in (9, 4)
    assert (await loop.run_single("b", agent, remaining(limiter))).success


@pytest.mark.parametrize("settled", [True, False])
async def test_attempt_that_has_not_begun_is_waited_for_until_it_does(settled: bool) -> None:
    loop = AgentLoop(limiter=budget(10, 2, settled))
    results: list[Any] = []
    loop.limiter.pause()
    async with anyio.create_task_group() as group, anyio.create_task_group() as cancelled:
        await launch(cancelled, loop.run_single, "a", agent, 6)
        await launch(group, into, results, loop.run_single, "b", agent, 5)
        # The first one gets its slot, and is cancelled before it has begun.
        loop.limiter.resume()
        cancelled.cancel_scope.cancel()

    results.append(await loop.run_single("c", agent, 6))
    assert [result.status for result in results] == [Status.SUCCESS, Status.SKIPPED]


async def test_cancelled_attempt_is_settled() -> None:
    loop = AgentLoop(limiter=budget(10, settled=True))
    with anyio.move_on_after(0.5):
        await loop.run_single("a", agent, 8)

    assert remaining(loop.limiter) == 9


# -- a batch


@each_batch
async def test_batch_stops_when_the_budget_is_spent(verb: str) -> None:
    loop = AgentLoop(limiter=budget(50, 2))
    inputs = [Invocation(f"{index}", agent_for(verb, agent), (20,)) for index in range(5)]
    results, stopped = await run_until_stopped(verb, loop, inputs)
    assert isinstance(stopped, BatchStopped)
    assert stopped.reason == (
        "'2' was refused: a cost of 20 cannot be paid any more: 10 is left of a budget of 50"
    )
    assert isinstance(stopped.__cause__, BudgetSpent)
    assert [result.success for result in results] == [True, True, False, False, False][: len(results)]
    assert len(results) == 5 or verb != "run_all"
    assert {result.exception for result in results[2:]} == {stopped}
    assert classify(stopped).kind is VerdictKind.PERMANENT


async def test_first_in_line_decides() -> None:
    loop = AgentLoop(limiter=budget(10, 3))
    results = await loop.run_all(jobs(6, 6, 1, 1))
    assert [result.success for result in results] == [True, False, False, False]
    # Another call is not of the batch.
    assert (await loop.run_single("a", agent, 4)).success


@pytest.mark.parametrize("settled", [True, False])
async def test_what_a_running_attempt_may_give_back_is_waited_for(settled: bool) -> None:
    loop = AgentLoop(limiter=budget(10, settled=settled))
    results = await loop.run_all([Invocation("a", agent, (6, 2)) for _ in range(4)])
    # 10 - 6 + 4 - 6 + 4 = 6 pays for a third one, and then 4 are left.
    assert sum(result.success for result in results) == (3 if settled else 1)


async def test_waiting_ends_when_too_little_came_back() -> None:
    loop, ended = AgentLoop(limiter=budget(10, settled=True)), []

    async def call(name: str, *args: float) -> None:
        result = await loop.run_single(name, agent, *args)
        ended.append((name, result.status, passed(begin)))

    begin = anyio.current_time()
    async with anyio.create_task_group() as group:
        for name, *args in (("a", 5, 5, 1), ("b", 5, 4, 2), ("c", 2)):
            group.start_soon(call, name, *args)
            await anyio.sleep(0.1)

    assert ended == [("a", Status.SUCCESS, 1), ("b", Status.SUCCESS, 2.1), ("c", Status.SKIPPED, 2.1)]


async def test_invocation_that_waits_to_be_retried_is_not_waited_for() -> None:
    loop = AgentLoop(QUICK, limiter=budget(10, 1, settled=True))
    # One slot, so one worker: the second input waits in it for the first, which would wait for it.
    results = await loop.run_all([Invocation("a", FAILS, (6,)), Invocation("b", agent, (6,))])
    assert [result.status for result in results] == [Status.ERROR, Status.SKIPPED]
    assert remaining(loop.limiter) == 9


async def test_invocation_that_begins_to_wait_for_its_retry_is_waited_for_no_more() -> None:
    loop = AgentLoop(LoopConfig(backoff=Backoff(30, jitter="none")), limiter=budget(10, settled=True))
    begin = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "a", FakeAgent(Fail(OSError("again"), after_seconds=1)), 3)
        await anyio.sleep(0.5)
        assert (await loop.run_single("b", agent, 8)).status is Status.SKIPPED
        assert passed(begin) == 1


async def test_two_batches_that_share_a_budget_both_stop() -> None:
    limiter, outcomes = budget(10, 2), []
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(into, outcomes, AgentLoop(limiter=limiter).run_all, jobs(*[3] * 4))

    assert sum(result.success for results in outcomes for result in results) == 3
    assert len({id(results[-1].exception) for results in outcomes}) == 2


async def test_keyed_limiter_has_a_budget_for_each_key() -> None:
    limiter = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: budget(5))
    loop = AgentLoop(limiter=limiter)
    assert [(await loop.run_single(key, agent, 5)).success for key in "aab"] == [True, False, True]


# -- nested work


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
async def test_nested_invocation_is_refused_rather_than_a_deadlock(settled: bool, slots: int) -> None:
    loop = AgentLoop(limiter=budget(10, slots, settled))

    async def outer(_: float) -> float:
        result = await loop.run_single("inner", agent, 5)
        assert isinstance(result.exception, BudgetSpent)
        return 1

    result = await loop.run_single("outer", outer, 6)
    assert result.unwrap() == 1
    assert remaining(loop.limiter) == (9 if settled else 4)


async def test_nested_batch_stops_and_the_outer_one_goes_on() -> None:
    loop = AgentLoop(limiter=budget(20, 2, settled=True))

    async def outer(_: float) -> float:
        results = await loop.run_all(jobs(5, 9))
        return 1 + 5 * results[0].success

    results = await loop.run_all([Invocation("a", outer, (8,))])
    assert [result.output for result in results] == [6]


async def test_call_that_makes_its_agent_wait_is_noticed() -> None:
    """A waits for what B gives back; B runs C, which stands in line behind A."""
    loop = AgentLoop(limiter=budget(10, settled=True))
    order: list[tuple[str, Status]] = []

    async def call(name: str, fn: Callable[..., Any], estimate: float) -> InvocationResult[Any]:
        result = await loop.run_single(name, fn, estimate)
        order.append((name, result.status))
        return result

    async def outer(_: float) -> float:
        await anyio.sleep(1)
        await call("c", agent, 2)
        return 1

    async with anyio.create_task_group() as group:
        group.start_soon(call, "b", outer, 6)
        await anyio.sleep(0.5)
        group.start_soon(call, "a", agent, 5)

    assert order == [("a", Status.SKIPPED), ("c", Status.SUCCESS), ("b", Status.SUCCESS)]


async def test_agents_of_two_limiters_do_not_wait_for_each_other() -> None:
    """One has paid and comes to wait for the slot of the other, which waits for what the first gives back."""
    paying, plain = AgentLoop(limiter=budget(10, settled=True)), AgentLoop(limiter=Limiter(1))

    async def pays(_: float) -> float:
        await anyio.sleep(1)
        return 1 + (await plain.run_single("behind", agent, 1)).unwrap()

    async def holds() -> Status:
        return (await paying.run_single("waits", agent, 6)).status

    async with anyio.create_task_group() as group:
        group.start_soon(paying.run_single, "pays", pays, 6)
        await anyio.sleep(0.5)
        assert (await plain.run_single("holds", holds)).unwrap() is Status.SKIPPED

    assert remaining(paying.limiter) == 8


def settled_at_nothing() -> AgentLoop:
    return AgentLoop(limiter=Limiter(2, rates=[Rate(10, None, cost=cost, settle=lambda _: 0)]))


@pytest.mark.parametrize("delay", [0, 1])
async def test_stream_that_waits_for_its_reader_is_waited_for_a_few_seconds_only(delay: float) -> None:
    loop = settled_at_nothing()

    async def write(_: float) -> AsyncIterator[int]:
        yield -1
        await anyio.sleep(delay)
        for number in range(100):
            yield number

    begin = anyio.current_time()
    async with loop.run_streaming("a", write, 6) as stream:
        assert await anext(stream) == -1
        # The reader itself waits for what the stream would give back.
        result = await loop.run_single("b", agent, 6)
        assert (result.status, passed(begin)) == (Status.SKIPPED, delay + 5)
        assert len([chunk async for chunk in stream]) == 100

    assert remaining(loop.limiter) == 10


async def test_stream_still_waits_for_its_reader_when_another_task_of_its_agent_goes_on() -> None:
    loop, store = settled_at_nothing(), ContextStore()

    async def write(_: float) -> AsyncIterator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(store.wait_for, lambda now: now.get("k"))
            for number in range(100):
                yield number

    begin = anyio.current_time()
    async with loop.run_streaming("a", write, 6):
        await anyio.wait_all_tasks_blocked()
        await store.set("k", True)
        result = await loop.run_single("b", agent, 6)
        assert (result.status, passed(begin)) == (Status.SKIPPED, 5)


@pytest.mark.parametrize("seconds", [0.3, 0])
async def test_stream_whose_reader_goes_on_is_waited_for(seconds: float) -> None:
    loop, results = settled_at_nothing(), []

    async def write(_: float) -> AsyncIterator[int]:
        for number in range(100):
            yield number

        await anyio.sleep(20)

    async with anyio.create_task_group() as group:
        async with loop.run_streaming("a", write, 6) as stream:
            group.start_soon(into, results, loop.run_single, "b", agent, 6)
            async for _ in stream:
                await anyio.sleep(seconds)

    assert [result.success for result in results] == [True]


async def test_stream_that_cannot_be_paid_raises_that() -> None:
    loop = AgentLoop(limiter=budget(10))
    assert (await loop.run_single("a", agent, 6)).success
    _, error, result = await run_stream(loop, one_chunk, 6)
    assert isinstance(error, BudgetSpent)
    assert result.status is Status.SKIPPED


# -- cancellation, and what else comes together


class Hold:
    """An agent that runs until it is told to end."""

    def __init__(self) -> None:
        self.end = anyio.Event()

    async def __call__(self, estimate: float) -> float:
        await self.end.wait()
        return estimate


async def test_refused_waiter_that_is_cancelled_lets_the_next_one_go() -> None:
    hold, loop, results = Hold(), AgentLoop(limiter=budget(10, settled=True)), []
    async with anyio.create_task_group() as group:
        await launch(group, into, results, loop.run_single, "a", hold, 6)
        async with anyio.create_task_group() as cancelled:
            await launch(cancelled, into, results, loop.run_single, "b", agent, 7)
            await launch(group, into, results, loop.run_single, "c", agent, 4)
            hold.end.set()
            cancelled.cancel_scope.cancel()

    assert [result.success for result in results if result.status is not Status.SKIPPED] == [True, True]
    assert remaining(loop.limiter) == 0


@on_asyncio
async def test_refused_waiter_that_is_cancelled_natively_lets_the_next_one_go() -> None:
    hold, loop = Hold(), AgentLoop(limiter=budget(10, settled=True))

    async def run_first() -> None:
        await loop.run_single("a", hold, 6)
        # The next one was refused in this step, and does not know it yet.
        waiting.cancel()

    async def call(*args: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(loop.run_single(*args) if args else run_first())
        await anyio.wait_all_tasks_blocked()
        return task

    first = await call()
    waiting = await call("b", agent, 7)
    behind = await call("c", agent, 4)
    hold.end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert (await behind).success
    await first


async def test_drain_that_comes_before_a_refusal_is_what_ends_it() -> None:
    limiter, hold, results = budget(10, settled=True), Hold(), []
    drained, other = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        await launch(group, other.run_single, "a", hold, 6)
        await launch(group, into, results, drained.run_single, "b", agent, 7)
        drained.drain()
        hold.end.set()

    assert [type(result.exception) for result in results] == [BatchStopped]


async def test_settle_that_raises_leaves_the_estimate() -> None:
    def settle(_: InvocationResult[Any]) -> float:
        raise ValueError("no usage")

    limiter = Limiter(1, rates=[Rate(10, per_seconds=None, cost=cost, settle=settle)])
    loop = AgentLoop(limiter=limiter)
    results = await loop.run_all(jobs(6, 6))
    assert [result.success for result in results] == [True, False]
    assert remaining(limiter) == 4


async def test_budget_and_rate_of_one_limiter_hold_both() -> None:
    limiter = Limiter(5, rates=[Rate(1, per_seconds=10), Rate(3, per_seconds=None)])
    begin = anyio.current_time()
    results = await AgentLoop(limiter=limiter).run_all(Invocation.map(agent, [0] * 5))
    assert [result.success for result in results] == [True] * 3 + [False] * 2
    assert anyio.current_time() - begin == 21
    assert limiter.statistics().remaining == (0,)


# -- event loops


@backends
def test_budget_outlives_its_event_loops(backend: str) -> None:
    limiter = budget(10)

    def run(amount: float) -> Status:
        loop = AgentLoop(limiter=limiter)
        return run_scheduled(backend, None, loop.run_single, "a", agent, amount).status

    assert run(6) is Status.SUCCESS
    assert remaining(limiter) == 4
    assert run(6) is Status.SKIPPED
    assert run(4) is Status.SUCCESS


@backends
def test_event_loop_that_was_stopped_reserves_nothing_and_settles_late(backend: str) -> None:
    limiter = budget(10, max_concurrency=1, settled=True)
    loop, stopped = AgentLoop(limiter=limiter), asyncio.new_event_loop()

    async def stop(estimate: float) -> float:
        await anyio.sleep(0)
        stopped.stop()
        return estimate

    async def main() -> list[bool]:
        # The one that runs elsewhere is not waited for.
        return [(await loop.run_single("c", agent, each)).success for each in (6, 4)]

    def run_elsewhere() -> list[bool]:
        return run_scheduled(backend, None, main)

    def end(task: asyncio.Task[Any]) -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            stopped.run_until_complete(task)

    # The first one stops the event loop as it ends, when the second one has just got its slot.
    tasks = [
        stopped.create_task(loop.run_single("a", stop, 1)),
        stopped.create_task(loop.run_single("b", agent, 4)),
    ]
    stopped.run_forever()
    assert (limiter.statistics().running, remaining(limiter)) == (1, 5)
    assert run_elsewhere() == [True, False]
    assert remaining(limiter) == 3
    end(tasks[1])
    assert remaining(limiter) == 3
    assert tasks[0].result().success
    # This one has paid when it is interrupted.
    task = stopped.create_task(loop.run_single("d", agent, 2, None, math.inf))
    stopped.call_later(0.01, stopped.stop)
    stopped.run_forever()
    assert remaining(limiter) == 1
    assert run_elsewhere() == [False, False]
    end(task)
    stopped.close()
    assert remaining(limiter) == 2


async def test_overload_gives_back_to_the_budget_alone_and_not_to_a_rate() -> None:
    limiter = Limiter(1, rates=[Rate(2, per_seconds=60), Rate(5, per_seconds=None)])
    loop = AgentLoop(ONCE, limiter=limiter)
    began = anyio.current_time()
    for _ in range(3):
        await loop.run_single("a", overload)

    assert limiter.statistics().remaining == (5,)
    assert passed(began) == 60
