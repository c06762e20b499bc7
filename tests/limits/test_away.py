"""An agent that waits for a store to change lends its slot meanwhile, and has one again when it goes on."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest
from agents import run
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Backoff,
    ContextStore,
    DeadlockError,
    Invocation,
    InvocationResult,
    InvocationTimeout,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Rate,
    ResultEvent,
    Status,
    StopRule,
    in_thread,
)
from agentloop.testing import virtual_clock

Wait = Callable[[ContextStore, str], Awaitable[Any]]


class Team:
    """A store, a loop, and how many agents work at once."""

    def __init__(self, limit: int = 1, **config: Any) -> None:
        self.store = ContextStore()
        self.limiter = Limiter(limit)
        self.loop = AgentLoop(LoopConfig(max_retries=0, **config), limiter=self.limiter)
        self.working = self.peak = 0

    async def work(self, seconds: float = 1) -> None:
        self.working += 1
        self.peak = max(self.peak, self.working)
        try:
            await anyio.sleep(seconds)
        finally:
            self.working -= 1

    async def set(self, key: str, seconds: float = 1) -> None:
        await self.work(seconds)
        await self.store.set(key, True)

    async def wait_and_work(self, key: str, seconds: float = 1) -> float:
        await wait_for(self.store, key)
        began = anyio.current_time()
        await self.work(seconds)
        return began


async def wait_for(store: ContextStore, key: str) -> Any:
    return await store.wait_for(lambda now: now.get(key))


async def watch(store: ContextStore, key: str) -> None:
    async with store.watch(key) as values:
        async for value in values:
            if value:
                break


waits = pytest.mark.parametrize("wait", [wait_for, watch])


@waits
async def test_agent_that_waits_lets_the_one_run_that_it_waits_for(wait: Wait) -> None:
    team = Team()
    results = await team.loop.run_all([Invocation("a", wait, (team.store, "k")), ("b", team.set, ("k",), {})])
    assert [result.status for result in results] == [Status.SUCCESS] * 2


@waits
async def test_single_invocation_that_waits_lends_its_slot(wait: Wait) -> None:
    team = Team()
    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_single, "a", wait, team.store, "k")
        await anyio.wait_all_tasks_blocked()
        assert (await team.loop.run_single("b", team.set, "k")).success


async def test_batch_begins_one_more_for_each_that_waits_and_no_more() -> None:
    team = Team()
    begun: list[int] = []

    async def relay(number: int) -> None:
        begun.append(number)
        if number < 9:
            await wait_for(team.store, str(number + 1))

        await team.work()
        if number == 9:
            assert begun == [*range(10)]

        await team.store.set(str(number), True)

    results = await team.loop.run_all(Invocation.map(relay, range(12)))
    assert all(result.success for result in results)
    assert team.peak == 1


async def test_agent_with_a_slot_on_loan_lends_that_to_anybody() -> None:
    team = Team()

    async def lead(key: str, other: str) -> None:
        results = await team.loop.run_all([Invocation("nested", member, (key, other))])
        results[0].unwrap()

    async def member(key: str, other: str) -> None:
        await team.set(key)
        await wait_for(team.store, other)
        await team.work()

    results = await team.loop.run_all([("a", lead, ("x", "y"), {}), ("b", lead, ("y", "x"), {})])
    assert [result.status for result in results] == [Status.SUCCESS] * 2
    assert team.peak == 1


async def test_thread_of_an_agent_that_waits_lends_its_slot() -> None:
    team = Team()

    @in_thread
    def blocking() -> None:
        anyio.from_thread.run(wait_for, team.store, "k")

    with anyio.fail_after(5):
        results = await team.loop.run_all([Invocation("a", blocking), ("b", team.set, ("k", 0), {})])

    assert [result.status for result in results] == [Status.SUCCESS] * 2


async def test_stream_that_waits_lends_its_slot() -> None:
    team = Team()

    async def stream() -> AsyncIterator[Any]:
        yield 1
        yield await wait_for(team.store, "k")

    async with team.loop.run_streaming("a", stream) as chunks:
        assert await anext(chunks) == 1
        await anyio.wait_all_tasks_blocked()
        assert (await team.loop.run_single("b", team.set, "k")).success
        assert [chunk async for chunk in chunks] == [True]


async def test_task_of_a_stream_that_waits_has_a_slot_when_it_goes_on_though_chunks_are_unread() -> None:
    team = Team()
    start = anyio.current_time()

    async def stream() -> AsyncIterator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(team.wait_and_work, "k")
            await anyio.wait_all_tasks_blocked()
            for number in range(50):
                yield number

    async with team.loop.run_streaming("a", stream) as chunks:
        assert await anext(chunks) == 0
        await team.loop.run_single("b", team.set, "k", 5)
        assert (await team.loop.run_single("c", team.work)).success
        assert [chunk async for chunk in chunks] == [*range(1, 50)]

    assert team.peak == 1
    assert anyio.current_time() - start == 7


@pytest.mark.parametrize("keyed", [False, True])
async def test_task_of_a_stream_that_waits_does_not_take_the_slot_that_the_reader_needs(keyed: bool) -> None:
    team = Keyed() if keyed else Team()

    async def stream() -> AsyncIterator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, team.store, "k")
            await anyio.wait_all_tasks_blocked()
            for number in range(50):
                yield number

        await team.work()

    async def read() -> None:
        async with team.loop.run_streaming("a", stream) as chunks:
            assert await anext(chunks) == 0
            await anyio.wait_all_tasks_blocked()
            await team.store.set("k", True)
            await anyio.wait_all_tasks_blocked()
            (await team.loop.run_single("a", team.work)).unwrap()
            assert [chunk async for chunk in chunks] == [*range(1, 50)]

    with anyio.fail_after(100):
        (await team.loop.run_single("a", read)).unwrap()

    assert team.peak == 1
    assert team.loop.statistics().running == team.loop.statistics().waiting == 0


@pytest.mark.parametrize("limit", [1, 3])
async def test_agents_that_go_on_together_are_never_more_than_the_limit(limit: int) -> None:
    team = Team(limit)
    start = anyio.current_time()
    jobs = [Invocation("waits", team.wait_and_work, ("k",)) for _ in range(20)]
    results = await team.loop.run_all([*jobs, Invocation("sets", team.set, ("k",))])
    assert all(result.success for result in results)
    assert team.peak == limit
    assert anyio.current_time() - start == 1 + math.ceil(20 / limit)


async def test_agent_goes_on_at_once_if_its_slot_has_come_back() -> None:
    team = Team()
    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_single, "a", team.wait_and_work, "k", 5)
        await anyio.wait_all_tasks_blocked()
        assert (await team.loop.run_single("b", team.work)).success
        assert (team.loop.statistics().running, team.loop.statistics().waiting) == (0, 1)
        await team.store.set("k", True)
        await anyio.wait_all_tasks_blocked()
        assert team.working == 1
        assert (team.loop.statistics().running, team.loop.statistics().waiting) == (1, 0)


async def test_agent_that_goes_on_comes_before_those_that_have_not_begun_and_is_held_by_no_pause() -> None:
    team = Team(2)
    order: list[Any] = []
    start = anyio.current_time()

    async def begin(name: str, seconds: float) -> None:
        order.append((name, anyio.current_time() - start))
        await team.work(seconds)

    async def waits() -> None:
        await wait_for(team.store, "k")
        await begin("waits", 1)
        team.limiter.resume()

    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_single, "a", waits)
        await anyio.wait_all_tasks_blocked()
        for name, seconds in (("short", 5), ("long", 50), ("last", 1)):
            group.start_soon(team.loop.run_single, name, begin, name, seconds)
            await anyio.wait_all_tasks_blocked()

        await team.store.set("k", True)
        team.limiter.pause()

    assert order == [("short", 0), ("long", 0), ("waits", 5), ("last", 6)]


async def test_slot_is_lent_to_one_after_the_other_also_of_those_that_came_before() -> None:
    team = Team()
    start = anyio.current_time()

    async def agent() -> None:
        await team.work()
        await wait_for(team.store, "k")

    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_single, "a", agent)
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            group.start_soon(team.loop.run_single, "b", team.work)

        await anyio.wait_all_tasks_blocked()
        group.start_soon(team.loop.run_single, "c", team.set, "k")

    assert anyio.current_time() - start == 5
    assert team.peak == 1


async def test_borrower_pays_its_rate_and_the_agent_that_goes_on_pays_nothing() -> None:
    team = Team()
    team.limiter = Limiter(1, rates=[Rate(2, per_seconds=60, burst=2)])
    team.loop = AgentLoop(LoopConfig(), limiter=team.limiter)
    start = anyio.current_time()
    results = await team.loop.run_all(
        [("a", team.wait_and_work, ("k",), {}), ("b", team.set, ("k",), {}), ("c", team.work, (), {})]
    )
    assert results[0].unwrap() - start == 1
    assert anyio.current_time() - start > 30


async def test_lowered_limit_counts_borrowers_too() -> None:
    team = Team(3)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(team.loop.run_single, "waits", wait_for, team.store, "k")

        await anyio.wait_all_tasks_blocked()
        team.limiter.max_concurrency = 2
        for _ in range(4):
            group.start_soon(team.loop.run_single, "works", team.work)

        await anyio.sleep(1.5)
        await team.store.set("k", True)

    assert team.peak == 2


async def test_keyed_limiter_lends_within_the_key() -> None:
    store = ContextStore()
    limiter = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: Limiter(1))
    loop = AgentLoop(limiter=limiter)
    jobs = [Invocation("a", wait_for, (store, "k")), Invocation("a", store.set, ("k", True))]
    with anyio.fail_after(5):
        assert all(result.success for result in await loop.run_all(jobs))


# -- those around an agent that waits


@pytest.mark.parametrize("verb", ["run_single", "run_all"])
@pytest.mark.parametrize("keyed", [False, True])
async def test_invocation_that_only_waits_for_one_that_waits_lends_its_slot_too(
    verb: str, keyed: bool
) -> None:
    team = Keyed() if keyed else Team()
    start = anyio.current_time()

    async def lead() -> float:
        nested = [Invocation("nested", wait_for, (team.store, "k"))]
        assert (await run(verb, team.loop, nested))[0].success
        began = anyio.current_time()
        await team.work()
        return began - start

    # The slot is taken again when the agent around goes on.
    jobs = [("lead", lead, (), {}), ("other", team.set, ("k", 2), {}), ("last", team.work, (5,), {})]
    results = await team.loop.run_all(jobs)
    assert [result.success for result in results] == [True] * 3
    assert results[0].output in (2, 7)
    assert team.peak == 1


async def read_all(
    verb: str,
    team: Team,
    agent: Callable[[], Awaitable[Any]],
    number: int = 1,
    name: str = "b",
    pause: float = 0,
) -> list[Any]:
    """Run an agent a number of times, and return the errors of the results, read after a pause."""

    async def stream() -> AsyncIterator[Any]:
        yield await agent()

    if verb == "run_streaming":
        async with team.loop.run_streaming(name, stream) as chunks:
            await anyio.sleep(pause)
            assert len([chunk async for chunk in chunks]) == 1

        return [chunks.result.error]

    if verb == "stream_all":
        async with team.loop.stream_all([Invocation(name, stream)] * number) as events:
            await anyio.sleep(pause)
            return [event.result.error async for event in events if isinstance(event, ResultEvent)]

    async with team.loop.as_completed([Invocation(name, agent)] * number) as results:
        await anyio.sleep(pause)
        return [result.error async for result in results]


reads = pytest.mark.parametrize("verb", ["as_completed", "stream_all", "run_streaming"])


@reads
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("reads_two", [False, True])
async def test_agent_that_reads_from_one_that_waits_lends_its_slot_too(
    verb: str, keyed: bool, reads_two: bool
) -> None:
    team = Keyed() if keyed else Team()
    start = anyio.current_time()

    async def read() -> float:
        assert await read_all(verb, team, partial(wait_for, team.store, "k"), pause=1) == [None]
        began = anyio.current_time()
        await team.work()
        return began - start

    async def stream() -> AsyncIterator[int]:
        for number in range(50):
            yield number

    async def read_between_chunks() -> float:
        async with team.loop.run_streaming("b", stream) as chunks:
            assert await anext(chunks) == 0
            return await read()

    lead = read_between_chunks if reads_two else read
    jobs: list[Any] = [("a", lead, (), {}), ("b", team.set, ("k", 2), {}), ("c", team.work, (5,), {})]
    results = await team.loop.run_all(jobs)
    assert [result.error for result in results] == [None] * 3
    assert results[0].output in (3, 8)
    assert team.peak == 1
    assert team.loop.statistics().running == team.loop.statistics().waiting == 0


async def test_two_tasks_of_an_agent_that_read_lend_its_slot() -> None:
    team = Team()

    async def read() -> None:
        async with team.loop.as_completed([Invocation("b", wait_for, (team.store, "k"))] * 2) as results:
            async with anyio.create_task_group() as group:
                for _ in range(2):
                    group.start_soon(anext, results)

        await team.work()

    with anyio.fail_after(100):
        results = await team.loop.run_all([("a", read, (), {}), ("c", team.set, ("k",), {})])

    assert [result.error for result in results] == [None] * 2
    assert team.peak == 1


async def test_agent_whose_results_another_task_reads_keeps_its_slot() -> None:
    team = Team(2)

    async def agent() -> None:
        async with team.loop.as_completed([Invocation("b", wait_for, (team.store, "k"))]) as results:
            reading.append(results)
            await team.work(5)
            await team.store.set("k", True)

    async with anyio.create_task_group() as group:
        reading: list[AsyncIterator[Any]] = []
        group.start_soon(team.loop.run_single, "a", agent)
        await anyio.sleep(1)
        group.start_soon(anext, reading[0])
        await anyio.wait_all_tasks_blocked()
        assert team.loop.statistics().running == 1


@reads
async def test_item_is_not_lost_if_the_reader_gives_up_while_it_waits_for_its_slot(verb: str) -> None:
    team = Team()
    start = anyio.current_time()

    async def stream() -> AsyncIterator[Any]:
        yield await wait_for(team.store, "k")

    async def read() -> float:
        match verb:
            case "run_streaming":
                reader: Any = team.loop.run_streaming("b", stream)
            case "stream_all":
                reader = team.loop.stream_all([Invocation("b", stream)])
            case _:
                reader = team.loop.as_completed([Invocation("b", wait_for, (team.store, "k"))])

        async with reader as items:
            with anyio.move_on_after(2):
                await anext(items)

            began = anyio.current_time()
            assert len([item async for item in items]) == (2 if verb == "stream_all" else 1)
            return began - start

    async with anyio.create_task_group() as group:

        async def lead() -> None:
            assert (await team.loop.run_single("a", read)).unwrap() == 11

        group.start_soon(lead)
        await anyio.sleep(1)
        group.start_soon(team.loop.run_single, "busy", team.work, 10)
        await anyio.wait_all_tasks_blocked()
        await team.store.set("k", True)

    assert team.peak == 1


@reads
async def test_readers_of_two_keys_that_wait_for_each_other_get_an_error(verb: str) -> None:
    team = Keyed(None, timeout_seconds=None)

    async def lead(name: str) -> bool:
        await team.work()
        try:
            errors = await read_all(verb, team, team.work, 2, name)
        except DeadlockError:
            return False

        return errors[0] is None

    with anyio.fail_after(100):
        results = await team.loop.run_all([Invocation("a", lead, ("b",)), Invocation("b", lead, ("a",))])

    assert sorted(result.unwrap() for result in results) == [False, True]


async def test_agent_that_comes_back_lends_its_place_to_one_of_another_key() -> None:
    team = Keyed()

    async def agent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, team.store, "k")
            await anyio.sleep(2)
            await team.loop.run_single("b", team.work)

    with anyio.fail_after(100):
        async with anyio.create_task_group() as group:
            group.start_soon(team.loop.run_single, "a", agent)
            await anyio.sleep(1)
            group.start_soon(team.loop.run_single, "c", team.work, 10)
            await anyio.sleep(2)
            await team.store.set("k", True)

    assert team.peak == 1


async def test_interrupt_does_not_wait_for_the_slot_of_an_agent_that_will_not_go_on() -> None:
    team = Team()
    start = anyio.current_time()

    async def interrupt() -> None:
        await wait_for(team.store, "k")
        raise KeyboardInterrupt

    async def lead() -> None:
        await team.loop.run_single("nested", interrupt)

    async def change() -> None:
        await anyio.sleep(1)
        await team.store.set("k", True)

    async with anyio.create_task_group() as group:
        group.start_soon(change)
        with pytest.raises(KeyboardInterrupt):
            await team.loop.run_single("lead", lead)

    assert anyio.current_time() - start == 1
    assert team.loop.statistics().running == team.loop.statistics().waiting == 0


# -- places of a keyed limiter's total


async def test_loan_waits_for_a_place() -> None:
    team = Keyed()

    async def lead() -> None:
        results = await team.loop.run_all([("a", team.work, (), {}), ("b", team.work, (), {})])
        assert all(result.success for result in results)

    with anyio.fail_after(100):
        (await team.loop.run_single("b", lead)).unwrap()

    assert team.peak == 1


class Keyed(Team):
    """A team of which each agent has a key: the first letter of its name."""

    def __init__(self, total: int | None = 1, limit: int = 1, **config: Any) -> None:
        super().__init__(limit, **config)
        self.limiter: Any = KeyedLimiter(
            lambda invocation: invocation.agent_id[0], lambda _: Limiter(limit), max_concurrency=total
        )
        self.loop = AgentLoop(LoopConfig(max_retries=0, **config), limiter=self.limiter)

    async def relay(self, key: str, other: str, times: int = 3) -> None:
        """Set a key and wait for another one, in turns."""
        for turn in range(times):
            await self.set(f"{key}{turn}")
            await wait_for(self.store, f"{other}{turn}")


@waits
async def test_agent_that_waits_lets_one_of_another_key_run(wait: Wait) -> None:
    team = Keyed()
    results = await team.loop.run_all([Invocation("a", wait, (team.store, "k")), ("b", team.set, ("k",), {})])
    assert [result.status for result in results] == [Status.SUCCESS] * 2
    assert team.limiter.statistics().running == 0


async def test_agents_of_two_keys_that_wait_in_turns_share_one_place() -> None:
    team = Keyed()
    jobs: list[Any] = [("a", team.relay, ("x", "y"), {}), ("b", team.relay, ("y", "x"), {})]
    assert all(result.success for result in await team.loop.run_all(jobs))
    assert team.peak == 1


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize("names", ["ab", "aa", "aab"])
async def test_nested_agents_that_wait_for_each_other_share_the_places(names: str, total: int) -> None:
    team = Keyed(total, limit=4)

    async def lead(number: int) -> None:
        jobs = [Invocation(names[number], team.relay, (str(number), str((number + 1) % len(names))))]
        (result,) = await team.loop.run_all(jobs)
        result.unwrap()

    jobs = [Invocation(name, lead, (number,)) for number, name in enumerate(names)]
    results = await team.loop.run_all(jobs)
    assert [result.error for result in results] == [None] * len(jobs)
    assert team.peak <= total
    assert team.limiter.statistics().running == 0


async def test_agent_that_has_stepped_aside_waits_for_a_place() -> None:
    team = Keyed()
    start = anyio.current_time()
    async with anyio.create_task_group() as group:

        async def agent() -> None:
            result = await team.loop.run_single("a", team.wait_and_work, "k")
            assert result.unwrap() - start == 5

        group.start_soon(agent)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(team.loop.run_single, "b", team.work, 5)
        await anyio.wait_all_tasks_blocked()
        assert team.limiter.statistics().running == 1
        await team.store.set("k", True)

    assert team.peak == 1


async def test_agent_that_has_stepped_aside_leaves_its_slot_to_its_key() -> None:
    team = Keyed(2)
    results = await team.loop.run_all(
        [
            ("a waits", team.wait_and_work, ("k",), {}),
            ("b", team.work, (9,), {}),
            ("c", team.work, (1,), {}),
            ("a sets", team.set, ("k",), {}),
        ]
    )
    assert all(result.success for result in results)
    assert team.peak == 2


async def test_limiter_of_an_agent_that_has_stepped_aside_is_not_forgotten() -> None:
    team = Keyed()
    team.limiter._max_limiters = 2
    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_single, "a", wait_for, team.store, "k")
        await anyio.wait_all_tasks_blocked()
        assert (await team.loop.run_single("b", team.work)).success
        assert (await team.loop.run_single("c", team.set, "k")).success
        assert [*team.limiter] == ["a", "c"]


async def test_agent_that_has_stepped_aside_and_is_timed_out_leaves_nothing_behind() -> None:
    team = Keyed(timeout_seconds=2)
    jobs: list[Any] = [("a", wait_for, (team.store, "never"), {}), *[("b", team.work, (1,), {})] * 4]
    results = await team.loop.run_all(jobs)
    assert [result.status for result in results] == [Status.TIMEOUT, *[Status.SUCCESS] * 4]
    assert team.limiter.statistics().running == 0
    assert team.peak == 1


async def test_agent_that_waits_for_a_store_and_for_another_key_is_not_stuck() -> None:
    team = Keyed(3)
    start = anyio.current_time()

    async def waits() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(nest, "b")
            await wait_for(team.store, "k")
            group.cancel_scope.cancel()

    async def nest(name: str) -> float:
        await team.work()
        (await team.loop.run_single(name, team.work)).unwrap()
        return anyio.current_time() - start

    async def set_later() -> None:
        await anyio.sleep(5)
        await team.store.set("k", True)

    async with anyio.create_task_group() as group:
        group.start_soon(set_later)
        # The slot of the one that waits is lent to another one of its key, which ends in time.
        jobs: list[Any] = [("a", waits, (), {}), ("b", nest, ("a",), {}), ("a", team.work, (3,), {})]
        results = await team.loop.run_all(jobs)

    assert [result.error for result in results] == [None] * 3
    assert results[1].unwrap() == 4


# -- several tasks of an agent


async def test_slot_stays_lent_as_long_as_any_task_of_the_agent_waits() -> None:
    team = Team()

    async def agent() -> None:
        async with anyio.create_task_group() as group:
            for key in ("first", "second"):
                group.start_soon(wait_for, team.store, key)

        await team.work()

    jobs = [("a", agent, (), {}), ("b", team.set, ("first",), {}), ("c", team.set, ("second", 5), {})]
    results = await team.loop.run_all(jobs)
    assert all(result.success for result in results)
    assert team.peak == 1


async def test_slot_that_has_come_back_is_lent_again_if_another_task_of_the_agent_waits() -> None:
    team = Team(2)
    start = anyio.current_time()

    async def agent() -> float:
        async with anyio.create_task_group() as group:
            for key in ("first", "second"):
                group.start_soon(wait_for, team.store, key)

        return anyio.current_time() - start

    async def ask() -> None:
        assert (await team.loop.run_single("a", agent)).unwrap() == 2

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        for name, fn, argument in (
            ("short", team.work, 1),
            ("long", team.work, 9),
            ("c", team.set, "second"),
        ):
            group.start_soon(team.loop.run_single, name, fn, argument)
            await anyio.wait_all_tasks_blocked()

        await team.store.set("first", True)


# The slot that has come back is lent to an agent that makes the change, or the change is made without a slot.
@pytest.mark.parametrize("by_agent", [True, False])
async def test_tasks_of_an_agent_that_go_on_one_after_the_other_need_one_slot(by_agent: bool) -> None:
    team = Team()

    async def agent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, team.store, "first")
            await anyio.sleep(2)
            await wait_for(team.store, "second")

    with anyio.fail_after(100):
        async with anyio.create_task_group() as group:
            group.start_soon(team.loop.run_single, "a", agent)
            await anyio.sleep(1)
            group.start_soon(team.loop.run_single, "b", team.work, 5)
            await team.store.set("first", True)
            await anyio.sleep(2)
            if by_agent:
                await team.loop.run_single("c", team.set, "second")
            else:
                await team.store.set("second", True)


async def test_agent_whose_call_has_ended_goes_on_while_another_of_its_tasks_waits() -> None:
    team = Team()
    start = anyio.current_time()

    async def agent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, team.store, "k")
            await team.loop.run_single("nested", team.work)
            assert anyio.current_time() - start == 1
            await team.store.set("k", True)

    async with anyio.create_task_group() as group:
        group.start_soon(team.loop.run_all, [Invocation("a", agent)])
        await anyio.sleep(0.5)
        group.start_soon(team.loop.run_single, "busy", team.work, 10)

    assert team.peak == 1


async def test_agent_that_lends_to_its_own_goes_on_beside_them() -> None:
    team = Team()

    async def agent() -> float:
        async with anyio.create_task_group() as group:
            group.start_soon(team.loop.run_single, "nested", team.work, 10)
            await wait_for(team.store, "k")
            return anyio.current_time()

    async with anyio.create_task_group() as group:

        async def change() -> None:
            await anyio.sleep(1)
            await team.store.set("k", True)

        start = anyio.current_time()
        group.start_soon(change)
        result = await team.loop.run_single("a", agent)
        assert result.unwrap() - start == 1


# -- cancelled, timed out


async def busy(team: Team, seconds: float = 10) -> None:
    """Take two slots, for so long."""
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(team.loop.run_single, "busy", team.work, seconds)


async def impatient_in_a_scope(team: Team) -> None:
    with anyio.move_on_after(1):
        await wait_for(team.store, "never")


async def impatient_in_a_task(team: Team) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(wait_for, team.store, "never")
        await anyio.sleep(1)
        group.cancel_scope.cancel()


async def impatient_while_it_comes_back(team: Team) -> None:
    with anyio.move_on_after(1):
        await wait_for(team.store, "k")


async def impatient_natively(team: Team) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await wait_for(team.store, "never")


async def impatient_natively_while_it_comes_back(team: Team) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await wait_for(team.store, "k")


async def impatient_natively_several_times(team: Team) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3), asyncio.timeout(2), asyncio.timeout(1):
            await wait_for(team.store, "never")


NATIVELY = [
    impatient_natively,
    impatient_natively_while_it_comes_back,
    impatient_natively_several_times,
]


async def run_as(verb: str, team: Team, agent: Callable[[], Awaitable[Any]]) -> None:
    """Run an agent: itself, or as a stream of no chunks."""

    async def stream() -> AsyncIterator[Any]:
        calls.append(None)
        if len(calls) == retries:
            raise OSError

        await agent()
        for chunk in calls[:0]:
            yield chunk

    calls: list[None] = []
    retries = int(verb == "a retried stream")
    loop = team.loop.with_config(max_retries=retries, backoff=Backoff(initial_seconds=0.1, jitter="none"))
    if verb == "an agent":
        (await loop.run_single("a", agent)).unwrap()
    elif verb == "streams of a batch":
        async with loop.stream_all([Invocation("a", stream)]) as events:
            assert [type(event) async for event in events] == [ResultEvent]
    else:
        async with loop.run_streaming("a", stream) as chunks:
            assert [chunk async for chunk in chunks] == []


@pytest.mark.parametrize("verb", ["an agent", "a stream", "a retried stream", "streams of a batch"])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(
    "give_up", [impatient_in_a_scope, impatient_in_a_task, impatient_while_it_comes_back, *NATIVELY]
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_agent_that_gives_up_waiting_has_a_slot_before_it_goes_on(
    backend: str, give_up: Any, keyed: bool, verb: str
) -> None:
    if give_up in NATIVELY and backend != "asyncio":
        pytest.skip("a native cancellation is asyncio's")

    async def main() -> None:
        team = Keyed(2, limit=2) if keyed else Team(2)
        went_on: list[float] = []

        async def agent() -> None:
            await give_up(team)
            went_on.append(anyio.current_time() - start)
            await team.work()

        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(run_as, verb, team, agent)

            await anyio.sleep(0.5)
            group.start_soon(busy, team, 9.5)
            await anyio.sleep(0.25)
            await team.store.set("k", True)

        assert went_on == [10, 10]
        assert team.peak == 2

    name, options = virtual_clock(backend)
    anyio.run(main, backend=name, backend_options=options)


async def test_stream_that_is_closed_does_not_wait_for_the_slot() -> None:
    team = Team()
    start = anyio.current_time()

    async def stream() -> AsyncIterator[int]:
        try:
            for number in range(50):
                yield number
        finally:
            await impatient_in_a_scope(team)

    async with anyio.create_task_group() as group:
        async with team.loop.run_streaming("a", stream) as chunks:
            assert await anext(chunks) == 0
            group.start_soon(team.loop.run_single, "busy", team.work, 10)
            await anyio.wait_all_tasks_blocked()

        assert anyio.current_time() - start == 1


def test_nested_stream_that_a_native_cancellation_ends_does_not_wait_for_the_slot() -> None:
    async def main() -> None:
        team = Team()
        ended_at: list[float] = []

        async def stream() -> AsyncIterator[int]:
            try:
                async with asyncio.timeout(1):
                    for number in range(50):
                        yield number
            finally:
                ended_at.append(anyio.current_time() - start)

        async def read() -> None:
            async with team.loop.run_streaming("a", stream) as chunks:
                assert await anext(chunks) == 0
                await team.loop.run_single("b", team.work, 10)

        start = anyio.current_time()
        (await team.loop.run_single("a", read)).unwrap()
        assert ended_at == [1]

    name, options = virtual_clock("asyncio")
    anyio.run(main, backend=name, backend_options=options)


@pytest.mark.parametrize("is_coming_back", [False, True])
async def test_attempt_is_timed_out_in_time_though_its_slot_is_lent(is_coming_back: bool) -> None:
    team = Team(timeout_seconds=2)
    slow = AgentLoop(limiter=team.limiter)
    async with anyio.create_task_group() as group:

        async def agent() -> None:
            start = anyio.current_time()
            result = await team.loop.run_single("a", team.wait_and_work, "k")
            assert result.status is Status.TIMEOUT
            assert anyio.current_time() - start == 2

        group.start_soon(agent)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(slow.run_single, "busy", team.work, 10)
        await anyio.sleep(1)
        if is_coming_back:
            await team.store.set("k", True)


@pytest.mark.parametrize("verb", ["an agent", "a stream"])
async def test_attempt_is_timed_out_in_time_while_it_comes_back_after_giving_up(verb: str) -> None:
    team = Team(timeout_seconds=2)
    slow = AgentLoop(limiter=team.limiter)
    async with anyio.create_task_group() as group:

        async def agent() -> None:
            start = anyio.current_time()
            with pytest.raises(InvocationTimeout):
                await run_as(verb, team, partial(impatient_in_a_scope, team))

            assert anyio.current_time() - start == 2

        group.start_soon(agent)
        await anyio.wait_all_tasks_blocked()
        await slow.run_single("busy", team.work, 10)


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("is_set", [False, True])
async def test_cancelled_caller_does_not_wait_for_the_slot(steps: int, is_set: bool) -> None:
    team = Team()
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await anyio.sleep(1)
                group.start_soon(team.loop.run_single, "busy", team.work, 10)
                await anyio.sleep(1)
                if is_set:
                    await team.store.set("k", True)

                for _ in range(steps):
                    await checkpoint()

                scope.cancel()

            group.start_soon(cancel)
            await team.loop.run_all([Invocation("a", team.wait_and_work, ("k",))])

        assert scope.cancelled_caught
        assert team.working == 1
        assert team.peak == 1


async def test_agent_that_its_stopped_batch_cancels_does_not_wait_for_the_slot() -> None:
    team = Team(stop=StopRule(failures=1, grace_seconds=0))
    other = AgentLoop(limiter=team.limiter)
    async with anyio.create_task_group() as group:

        async def fail() -> None:
            group.start_soon(other.run_single, "busy", team.work, 10)
            await team.work()
            raise ValueError

        start = anyio.current_time()
        results = await team.loop.run_all([("a", wait_for, (team.store, "k"), {}), ("b", fail, (), {})])
        assert [result.status for result in results] == [Status.CANCELLED, Status.ERROR]
        assert anyio.current_time() - start == 1
        assert team.working == 1


async def test_task_that_waits_on_after_its_agent_has_ended_holds_no_slot() -> None:
    team = Team()
    async with anyio.create_task_group() as group:

        async def agent() -> None:
            group.start_soon(wait_for, team.store, "k")
            await anyio.wait_all_tasks_blocked()

        assert (await team.loop.run_single("a", agent)).success
        assert team.loop.statistics().running == 0
        await team.loop.run_all(Invocation.map(team.work, [1, 1]))
        assert team.peak == 1
        await team.store.set("k", True)


async def test_agent_that_ends_while_it_comes_back_gives_the_slot_back() -> None:
    team = Team()
    async with anyio.create_task_group() as group:

        async def agent() -> None:
            group.start_soon(left_over)
            await anyio.sleep(2)

        async def left_over() -> None:
            await wait_for(team.store, "k")
            await team.loop.run_single("nested", team.work)

        group.start_soon(team.loop.run_single, "a", agent)
        await anyio.wait_all_tasks_blocked()
        for _ in range(2):
            group.start_soon(team.loop.run_single, "busy", team.work, 10)

        await anyio.sleep(1)
        await team.store.set("k", True)
        await anyio.sleep(2)
        assert team.loop.statistics().running == 1

    assert team.loop.statistics().running == 0
    assert team.peak == 1


async def test_task_that_begins_to_wait_after_its_agent_has_ended_lends_nothing() -> None:
    team = Team()
    pulled: list[int] = []
    go = anyio.Event()

    def inputs() -> Iterator[Invocation[None]]:
        for number in range(5):
            pulled.append(number)
            yield Invocation("b", team.work)

    async def left_over() -> None:
        await go.wait()
        await wait_for(team.store, "k")

    async with anyio.create_task_group() as group:

        async def agent() -> None:
            group.start_soon(left_over)

        await team.loop.run_single("a", agent)
        group.start_soon(team.loop.run_all, inputs())
        await anyio.wait_all_tasks_blocked()
        go.set()
        await anyio.wait_all_tasks_blocked()
        assert pulled == [0]
        await team.store.set("k", True)


async def test_event_loop_in_a_thread_of_an_agent_lends_nothing() -> None:
    team = Team()
    go = threading.Event()

    async def main() -> int:
        store = ContextStore()
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, store, "k")
            await anyio.wait_all_tasks_blocked()
            waiting = team.loop.statistics().waiting
            await store.set("k", True)

        return waiting

    async with anyio.create_task_group() as group:

        @in_thread
        def agent() -> int:
            go.wait(5)
            return anyio.run(main)

        async def ask() -> None:
            results.append(await team.loop.run_single("a", agent))

        results: list[Any] = []
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(team.loop.run_single, "b", team.work)
        await anyio.wait_all_tasks_blocked()
        go.set()

    assert results[0].unwrap() == 1


# -- at random


@pytest.mark.long
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", ["one limiter", "keys", "keys and a total"])
@pytest.mark.parametrize("seed", range(20))
def test_random_teams_come_to_an_end_and_are_never_more_than_the_limit(
    backend: str, kind: str, seed: int
) -> None:
    draw = random.Random(f"{kind} {seed}")
    limit, keys = draw.randrange(1, 4), "a" if kind == "one limiter" else "abc"
    total = limit if kind != "keys" else None
    team = Team(limit) if keys == "a" else Keyed(total, draw.randrange(1, 3), timeout_seconds=None)
    if total is None:
        limit = len(keys) * 2

    def check(results: list[InvocationResult[Any]]) -> None:
        assert all(result.success or isinstance(result.exception, DeadlockError) for result in results)

    async def run_one(depth: int) -> None:
        check([await team.loop.run_single(draw.choice(keys), agent, depth)])

    async def agent(depth: int) -> None:
        await team.work(draw.random())
        for _ in range(draw.randrange(4)):
            key = draw.choice("xyz")
            match draw.randrange(7 if depth else 5):
                case 0:
                    await team.store.transform(key, lambda n: n + 1, 0)
                case 1:
                    with anyio.move_on_after(draw.random() * 3):
                        await team.store.wait_for(lambda now, key=key: now.get(key, 0) > 5)
                case 2:
                    with anyio.move_on_after(draw.random() * 3):
                        async with team.store.watch(key) as values:
                            await anext(values)
                            await anext(values)
                case 3:
                    await wait_for(team.store, "done")
                case 4:
                    async with anyio.create_task_group() as group:
                        group.start_soon(wait_for, team.store, "done")
                        if depth:
                            group.start_soon(run_one, depth - 1)
                case 5:
                    names = draw.choices(keys, k=draw.randrange(3))
                    check(await team.loop.run_all([Invocation(name, agent, (depth - 1,)) for name in names]))
                case _:
                    await run_one(depth - 1)

            await team.work(draw.random())

    async def main() -> None:
        jobs = [Invocation(draw.choice(keys), agent, (2,)) for _ in range(6)]
        # What all of them wait for comes last.
        last = Invocation("a", team.set, ("done",))
        with anyio.move_on_after(draw.choice([5, math.inf])), anyio.fail_after(5000):
            check(await team.loop.run_all([*jobs, last]))

        assert team.loop.statistics().running == team.loop.statistics().waiting == 0

    name, options = virtual_clock(backend, seed=seed)
    anyio.run(main, backend=name, backend_options=options)
    assert team.peak <= limit
