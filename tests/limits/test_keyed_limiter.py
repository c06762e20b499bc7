"""KeyedLimiter: a limiter for each key, made when it is needed and forgotten when it is not."""

import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from agents import backends, both_verbs, into, launch, nothing, run_scheduled, run_stream, run_until_stopped
from anyio.abc import TaskGroup
from elsewhere import in_use_elsewhere
from trouble import ONCE, fail, one_chunk, one_or_batch, overload, refuse, run_one, watched

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Invocation,
    KeyedLimiter,
    Limiter,
    LimiterStatistics,
    LoopConfig,
    Rate,
    RetryBudget,
    Status,
)
from agentloop.testing import Chunks, FakeAgent, FakeHTTPError


async def overloaded() -> None:
    await overload(10)


def keyed(limit: int, **settings: Any) -> KeyedLimiter:
    return KeyedLimiter(by_id, lambda _: Limiter(limit), **settings)


def make_keyed(limit: int, **settings: Any) -> AgentLoop:
    return AgentLoop(LoopConfig(**{"max_retries": 0, **settings}), limiter=keyed(limit))


def by_id(invocation: Invocation[Any]) -> str:
    """The key of ``"a/7"`` is ``"a"``."""
    return invocation.agent_id.partition("/")[0]


# -- values


def test_bad_parameters_are_refused() -> None:
    bad: Any = 3
    with pytest.raises(TypeError, match="by must be callable, got 3"):
        KeyedLimiter(bad, Limiter)

    with pytest.raises(TypeError, match="make must be callable, got 3"):
        KeyedLimiter(by_id, bad)

    with pytest.raises(ValueError, match="max_limiters must be at least 1, got 0"):
        keyed(1, max_limiters=0)


def test_limiters_are_made_once_for_each_key_and_can_be_looked_at() -> None:
    made: list[str] = []

    def make(key: str) -> Limiter:
        made.append(key)
        return Limiter(len(made))

    limiters = KeyedLimiter(by_id, make)
    assert limiters
    assert (len(limiters), list(limiters), limiters.max_concurrency) == (0, [], 1)
    assert limiters.statistics() == LimiterStatistics(0, 0, 1, 1)
    assert limiters["a"] is limiters["a"]
    assert limiters["b"] is not limiters["a"]
    assert made == ["a", "b"]
    assert (len(limiters), list(limiters), limiters.max_concurrency) == (2, ["b", "a"], 3)
    assert repr(limiters) == "<KeyedLimiter 0 running, 0 waiting, limit 3>"
    limiters["a"].max_concurrency = 7
    assert limiters.statistics() == LimiterStatistics(0, 0, 9, 9)


@pytest.mark.parametrize("wrong", [None, 3, Limiter, keyed(1)])
def test_what_make_returns_has_to_be_a_plain_limiter(wrong: Any) -> None:
    limiters = KeyedLimiter(by_id, lambda _: wrong)
    with pytest.raises(TypeError, match=r"make must return a Limiter, got .* for the key 'a'"):
        limiters["a"]

    assert len(limiters) == 0
    with pytest.raises(AttributeError, match=r"limiters\[key\]\.max_concurrency = 5"):
        limiters.max_concurrency = 5


# -- keys


async def test_each_key_has_a_limit_of_its_own() -> None:
    loop, starts = watched(KeyedLimiter(by_id, lambda key: Limiter({"a": 1, "b": 3}[key])))
    jobs = [Invocation(f"{'ab'[number % 2]}/{number}", anyio.sleep, (1,)) for number in range(12)]
    results = await loop.run_all(jobs)
    assert all(result.success for result in results)
    assert starts.by_name["a"] == [0, 1, 2, 3, 4, 5]
    # The input is pulled at most four ahead, and those for "a" are waited for.
    assert max(starts.by_name["b"].count(at) for at in starts.by_name["b"]) <= 3
    assert starts.by_name["b"][-1] < 5


async def test_single_invocations_and_streams_go_by_key_too() -> None:
    limiters = keyed(1)
    loop, starts = watched(limiters)
    write = FakeAgent(Chunks([0, 1, 2], after_seconds=1, gap_seconds=1))

    async def read(name: str) -> None:
        async with loop.run_streaming(name, write) as stream:
            assert [chunk async for chunk in stream] == [0, 1, 2]

    async def fan() -> None:
        async with loop.stream_all([Invocation(f"{key}/3", write) for key in "cb"]) as events:
            assert len([event async for event in events]) == 8

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "a/1", anyio.sleep, 3)
        await launch(group, read, "b/1")
        await launch(group, read, "a/2")
        assert (limiters["a"].statistics().running, limiters["a"].statistics().waiting) == (1, 1)
        now = limiters.statistics()
        assert (now.running, now.waiting, now.limit) == (2, 1, 2)
        assert repr(loop) == "<AgentLoop 2 running, 1 waiting, limit 2>"
        group.start_soon(fan)

    assert starts.by_name == {"a": [0, 3], "b": [0, 3], "c": [0]}


async def test_batch_reads_by_key_and_its_reader_may_leave_early() -> None:
    limiters = keyed(2)
    loop = AgentLoop(ONCE, limiter=limiters)
    jobs = [Invocation(f"{number % 3}/{number}", anyio.sleep, (1,)) for number in range(30)]
    async with loop.as_completed(iter(jobs)) as results:
        assert len([result async for result in results]) == 30

    async with loop.as_completed(iter(jobs)) as results:
        async for _ in results:
            break

    assert limiters.statistics() == LimiterStatistics(0, 0, 6, 6)


async def test_rates_and_budget_of_a_key_are_its_own() -> None:
    settings: dict[str, Any] = {
        "rate": {"rates": [Rate(1, per_seconds=5)]},
        "budget": {"retry_budget": RetryBudget(0, 0)},
        "free": {},
    }
    limiters = KeyedLimiter(by_id, lambda key: Limiter(5, **settings[key]))
    config = LoopConfig(max_retries=1, backoff=Backoff(initial_seconds=1, jitter="none"))
    loop, starts = watched(limiters, config)
    async with anyio.create_task_group() as group:
        for key in settings:
            group.start_soon(loop.run_single, key, fail)

    assert starts.by_name == {"rate": [0, 5], "budget": [0], "free": [0, 1]}


async def test_what_key_and_make_raise_is_the_invocations_error() -> None:
    def make(key: str) -> Limiter:
        if key == "make":
            raise LookupError("no such model")

        return Limiter(2) if key != "wrong" else "a limiter"

    def key(invocation: Invocation[Any]) -> Any:
        if invocation.agent_id == "key":
            raise ZeroDivisionError

        return [] if invocation.agent_id == "unhashable" else invocation.agent_id

    loop = AgentLoop(limiter=KeyedLimiter(key, make))
    expected = {
        "key": ZeroDivisionError,
        "make": LookupError,
        "wrong": TypeError,
        "unhashable": TypeError,
        "good": type(None),
    }
    results = [await loop.run_single(name, nothing) for name in expected]
    results += await loop.run_all([Invocation(name, nothing) for name in expected])
    assert [type(result.exception) for result in results] == [*expected.values()] * 2
    assert [result.retries for result in results] == [0] * 10
    snapshot = loop.metrics.snapshot()
    assert (snapshot.counts[Status.ERROR], snapshot.counts[Status.SUCCESS]) == (8, 2)
    with pytest.raises(ZeroDivisionError):
        async with loop.run_streaming("key", one_chunk) as stream:
            await anext(stream)


# -- how many


async def test_one_used_least_recently_is_forgotten_unless_it_is_in_use() -> None:
    limiters = keyed(1, max_limiters=2)
    loop = AgentLoop(ONCE, limiter=limiters)
    for name in ("a", "b", "a", "c"):
        await loop.run_single(name, nothing)

    assert (list(limiters), limiters.max_concurrency) == (["a", "c"], 2)
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "a", anyio.sleep, 5)
        await loop.run_single("c", nothing)
        await loop.run_single("d", nothing)
        assert list(limiters) == ["a", "d"]
        await launch(group, loop.run_single, "d", anyio.sleep, 5)
        result = await loop.run_single("e", nothing)
        assert isinstance(result.exception, RuntimeError)
        assert result.error == (
            "RuntimeError: there are max_limiters=2 limiters, all of them in use: "
            "raise max_limiters, or give fewer different keys"
        )
        with pytest.raises(RuntimeError, match="max_limiters=2"):
            limiters["e"]

    assert (await loop.run_single("e", nothing)).success


async def test_limiter_that_still_holds_back_is_not_forgotten_even_beyond_the_number() -> None:
    def make(key: str) -> Limiter:
        return Limiter(1, rates=[Rate(1, per_seconds=30)] if key == "rate" else [])

    limiters = KeyedLimiter(by_id, make, max_limiters=2)
    loop = AgentLoop(ONCE, limiter=limiters)
    for name, agent in (("told", overloaded), ("rate", nothing), ("a", nothing), ("b", nothing)):
        await loop.run_single(name, agent)

    assert list(limiters) == ["told", "rate", "b"]
    await anyio.sleep(15)
    await loop.run_single("c", nothing)
    assert list(limiters) == ["rate", "c"]
    limiters["rate"].pause()
    limiters["c"].pause()
    result = await loop.run_single("d", nothing)
    assert isinstance(result.exception, RuntimeError), "those that are paused are in use"


async def test_one_that_was_forgotten_is_heard_no_more() -> None:
    limiters = keyed(4, max_limiters=1)
    loop, starts = watched(limiters)
    await loop.run_single("a", nothing)
    forgotten = limiters["a"]
    await loop.run_single("b", nothing)
    starts.told.clear()
    forgotten.max_concurrency = 9
    await AgentLoop(ONCE, limiter=forgotten).run_single("a", overloaded)
    assert (starts.limits, limiters.max_concurrency) == ([], 4)


@one_or_batch
async def test_limiter_of_an_invocation_that_waits_to_be_retried_is_in_use(verb: str) -> None:
    limiters = keyed(1, max_limiters=1)
    config = LoopConfig(backoff=Backoff(initial_seconds=5, max_seconds=5, jitter="none"), max_retries=1)
    loop = AgentLoop(config, limiter=limiters)
    async with anyio.create_task_group() as group:
        group.start_soon(run_one, verb, loop, "a", fail)
        await anyio.sleep(1)
        assert limiters["a"].statistics().waiting == 1
        assert not (await loop.run_single("b", nothing)).success


# -- all of them at once


async def test_all_are_paused_and_resumed_and_those_to_come_too() -> None:
    limiters = keyed(1)
    limiters.pause()
    assert limiters.statistics().paused_until == math.inf
    loop, starts = watched(limiters)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation(name, nothing) for name in "abc"])
        await anyio.sleep(3)
        now = limiters.statistics()
        assert (now.running, now.waiting, now.paused_until) == (0, 3, math.inf)
        limiters["a"].resume()
        assert limiters.statistics().paused_until is None
        await anyio.sleep(3)
        limiters.resume()

    limiters.pause()
    assert limiters["a"].statistics().paused_until == math.inf
    limiters.resume()
    await loop.run_single("a", nothing)
    assert starts.by_name == {"a": [3, 6], "b": [6], "c": [6]}


async def test_statistics_say_when_the_first_of_them_goes_on() -> None:
    limiters = keyed(5)
    loop = AgentLoop(ONCE, limiter=limiters)
    await loop.run_single("a", overloaded)
    until = anyio.current_time() + 10
    assert limiters.statistics() == LimiterStatistics(0, 0, 5, 4, 1, until)
    limiters["b"].pause()
    assert limiters.statistics() == LimiterStatistics(0, 0, 10, 9, 1, until)
    assert repr(limiters) == "<KeyedLimiter 0 running, 0 waiting, limit 9 of 10, held>"
    limiters["b"].resume()
    assert limiters.statistics().paused_until is None


async def test_limit_events_tell_the_sum() -> None:
    limiters = keyed(5)
    loop, starts = watched(limiters)
    await AgentLoop(limiter=limiters["a"]).run_single("a", nothing)
    assert starts.limits == [], "it runs for somebody else only"
    await loop.run_single("a", nothing)
    await loop.run_single("b", overloaded)
    limiters["a"].max_concurrency = 7
    assert starts.limits[-3:] == [10, 9, 11]


@backends
def test_pause_from_another_thread_is_refused_and_changes_nothing(backend: str) -> None:
    limiters = keyed(1)
    limiters["idle"]
    with in_use_elsewhere(AgentLoop(limiter=limiters), backend):
        with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
            limiters.pause()

        assert limiters["idle"].statistics().paused_until is None
        assert limiters["new"].statistics().paused_until is None
        limiters["idle"].pause()
        with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
            limiters.resume()

        assert limiters["idle"].statistics().paused_until == math.inf


# -- how many workers


@pytest.mark.parametrize("as_input", [list, iter])
async def test_running_batch_uses_the_raised_limit_of_a_key(as_input: Callable[[Any], Any]) -> None:
    limiters = keyed(1)
    loop, starts = watched(limiters)
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_all, as_input([Invocation("a", anyio.sleep, (10,))] * 6))
        assert limiters.statistics().running == 1
        limiters["a"].max_concurrency = 4
        await anyio.sleep(1)
        assert limiters.statistics().running == 4

    assert starts.by_name["a"] == [0, 0, 0, 0, 10, 10]


# -- nesting


async def test_slot_is_lent_under_its_own_key_only_and_through_others() -> None:
    loop, starts = watched(keyed(1))

    async def nest(*keys: str) -> None:
        if keys:
            results = await loop.run_all([Invocation(keys[0], nest, keys[1:])] * 2)
            assert all(result.success for result in results)

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "b/hog", anyio.sleep, 5)
        with anyio.fail_after(100):
            assert (await loop.run_single("a", nest, *"aaabbabc")).success

    # Those under "a" are lent slots, and those under "b" have had to wait for a first one.
    assert {*starts.by_name["a"][:4]} == {0}
    assert starts.by_name["b"][:2] == [0, 5]


@pytest.mark.parametrize("verb", ["single", "batch", "stream"])
async def test_agents_that_come_to_wait_for_each_others_key_get_an_error_that_names_both(verb: str) -> None:
    loop = make_keyed(1, timeout_seconds=None)

    async def agent(other: str) -> None:
        await anyio.sleep(1)
        if verb != "stream":
            (await run_one(verb, loop, other, anyio.sleep, 1)).unwrap()
        else:
            async with loop.run_streaming(other, one_chunk) as stream:
                assert [chunk async for chunk in stream] == [1]

    with anyio.fail_after(100):
        results = await loop.run_all([Invocation("a", agent, ("b",)), Invocation("b", agent, ("a",))])

    (failed,) = (result for result in results if not result.success)
    other = "b" if failed.agent_id == "a" else "a"
    assert failed.retries == 0
    assert failed.error is not None
    assert f"an agent under the key {failed.agent_id!r} runs one under {other!r}, whose slots" in failed.error


async def test_agent_that_only_waits_for_a_key_in_a_circle_is_not_refused() -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=None), limiter=KeyedLimiter(by_id, lambda _: Limiter(1)))

    async def agent(other: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        (await loop.run_single(other, anyio.sleep, 1)).unwrap()

    # The one of the third key is the first in the line of "b".
    jobs = [("b", agent, ("a", 1), {}), ("c", agent, ("b", 0), {}), ("a", agent, ("b", 1), {})]
    with anyio.fail_after(100):
        results = await loop.run_all(jobs)

    assert results[1].success
    assert [result.success for result in results].count(False) == 1


async def test_agents_of_two_keys_wait_for_each_other_as_long_as_anything_may_free_a_slot() -> None:
    loop = make_keyed(2, timeout_seconds=None)

    async def agent(other: str) -> None:
        await anyio.sleep(1)
        (await loop.run_single(other, anyio.sleep, 1)).unwrap()

    jobs = [Invocation(name, agent, (other,)) for name, other in ("ab", "ab", "ba")]
    results = await loop.run_all([*jobs, Invocation("b", anyio.sleep, (5,))])
    assert all(result.success for result in results)


@pytest.mark.parametrize("path", ["bab", "abab", "aabba"])
async def test_one_place_is_enough_for_agents_of_any_keys_to_any_depth(path: str) -> None:
    limiters = KeyedLimiter(by_id, lambda _: Limiter(1), max_concurrency=1)
    loop = AgentLoop(LoopConfig(timeout_seconds=None), limiter=limiters)

    async def agent(rest: str) -> str:
        if not rest:
            return "reached"

        result = await loop.run_single(rest[0], agent, rest[1:])
        return result.unwrap()

    with anyio.fail_after(5):
        assert (await loop.run_single(path[0], agent, path[1:])).unwrap() == "reached"


async def test_stream_gives_its_place_back_while_its_reader_runs_something_else() -> None:
    limiters = KeyedLimiter(by_id, lambda _: Limiter(1), max_concurrency=1)
    loop = AgentLoop(LoopConfig(timeout_seconds=None), limiter=limiters)

    async def write() -> Any:
        for number in range(50):
            yield number

    async def agent() -> int:
        total = 0
        async with loop.run_streaming("b", write) as stream:
            async for chunk in stream:
                total += chunk
                (await loop.run_single("c", anyio.sleep, 0)).unwrap()

        return total

    with anyio.fail_after(5):
        assert (await loop.run_single("a", agent)).unwrap() == sum(range(50))


async def test_loop_that_is_left_lets_what_runs_under_a_key_run_others() -> None:
    loop, results = make_keyed(1), []

    async def agent() -> None:
        await anyio.sleep(1)
        assert (await loop.run_single("a", nothing)).success
        assert (await loop.run_single("b", nothing)).success
        # Through a loop that has nothing to do with it, too.
        assert (await AgentLoop().run_single("other", loop.run_single, "a", nothing)).unwrap().success
        assert (await run_stream(loop, one_chunk))[0] == [1]

    async with anyio.create_task_group() as group:
        async with loop:
            await launch(group, into, results, loop.run_single, "a", agent)

        with pytest.raises(RuntimeError, match="takes no new work"):
            await loop.run_single("a", nothing)

    assert results[0].success


# -- one run after the other


@backends
def test_limiters_serve_one_run_after_the_other(backend: str) -> None:
    limiters = keyed(5)
    loop = AgentLoop(ONCE, limiter=limiters)

    async def first() -> None:
        await loop.run_single("a", overloaded)
        assert limiters["a"].statistics().limit == 4

    async def second() -> None:
        jobs = [Invocation("ab"[number % 2], anyio.sleep, (1,)) for number in range(10)]
        assert all(result.success for result in await loop.run_all(jobs))
        assert limiters.statistics() == LimiterStatistics(0, 0, 10, 10)

    for name, main in ((backend, first), ("asyncio", second), ("trio", first), (backend, second)):
        run_scheduled(name, None, main)


@one_or_batch
async def test_limiter_whose_cost_raises_is_in_use_no_more(verb: str) -> None:
    def no_cost(_: object) -> float:
        raise KeyError("tokens")

    # That nothing is left in use is audited at the end of the test.
    loop = AgentLoop(
        limiter=KeyedLimiter(lambda _: "key", lambda _: Limiter(2, rates=[Rate(5, cost=no_cost)]))
    )
    assert (await run_one(verb, loop, "a", anyio.sleep, 1)).error == "KeyError: 'tokens'"


# -- no key holds up another


@pytest.mark.parametrize("as_input", [list, iter])
async def test_keys_run_at_once_however_the_input_is_sorted(as_input: Callable[[Any], Any]) -> None:
    loop, starts = watched(keyed(4))
    jobs = [Invocation(f"{key}/{number}", anyio.sleep, (1,)) for key in "abcde" for number in range(20)]
    assert all(result.success for result in await loop.run_all(as_input(jobs)))
    assert starts.by_name == {key: [at for at in range(5) for _ in range(4)] for key in "abcde"}


@pytest.mark.parametrize("trouble", ["slow", "held", "paused", "rated", "dead"])
@pytest.mark.parametrize("as_input", [list, iter])
async def test_key_in_trouble_costs_the_others_nothing(trouble: str, as_input: Callable[[Any], Any]) -> None:
    agents: dict[str, Any] = {"slow": anyio.sleep_forever, "held": overloaded, "dead": refuse}
    rates = {"a": [Rate(1, per_seconds=100)]} if trouble == "rated" else {}
    limiters = KeyedLimiter(by_id, lambda key: Limiter(3, rates=rates.get(key, ())))
    loop, starts = watched(limiters, LoopConfig(timeout_seconds=None))
    if trouble == "paused":
        limiters["a"].pause()

    jobs = [
        Invocation(
            f"{key}/{number}", *((agents.get(trouble, nothing),) if key == "a" else (anyio.sleep, (1,)))
        )
        for key in "abc"
        for number in range(24)
    ]
    with anyio.move_on_after(20):
        await loop.run_all(as_input(jobs))

    for key in "bc":
        assert starts.by_name[key] == [at for at in range(8) for _ in range(3)]


async def test_key_whose_input_waits_takes_room_of_others_only_beyond_eight_for_each_slot() -> None:
    limiters = keyed(2)
    limiters["a"].pause()
    loop = AgentLoop(ONCE, limiter=limiters)
    pulled = 0

    def inputs() -> Iterator[Invocation[None]]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield Invocation("a", nothing)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, inputs())
        await anyio.sleep(1)
        # Three more are live: as many as there are slots, and one that looks ahead.
        assert limiters.statistics().waiting == pulled == 8 * 2 + 3
        limiters.resume()

    assert pulled == 100


@both_verbs
async def test_fatal_verdict_stops_the_invocations_of_its_key_alone(verb: str) -> None:
    loop = make_keyed(2, max_retries=3, backoff=Backoff(initial_seconds=9, jitter="none"))
    outcomes: dict[str, Exception] = {
        "a/0": LookupError(),
        "a/2": FakeHTTPError(401),
        "a/3": FakeHTTPError(401),
    }

    async def agent(name: str) -> None:
        await anyio.sleep(1)
        if name in outcomes:
            raise outcomes[name]

    names = [f"{key}/{number}" for number in range(8) for key in "ab"]
    results, stopped = await run_until_stopped(
        verb, loop, [Invocation(name, agent, (name,)) for name in names]
    )
    assert re.search(r"'a/[23]' failed with FakeHTTPError", str(stopped))
    by_name = {result.agent_id: result for result in results}
    assert all(by_name[name].success for name in names if name.startswith("b"))
    assert by_name["a/0"].exception is outcomes["a/0"], "it waited to be retried"
    assert by_name["a/6"].status is by_name["a/7"].status is Status.SKIPPED
    assert by_name["a/6"].exception is by_name["a/7"].exception


async def test_budget_that_is_spent_stops_the_invocations_of_its_key_alone() -> None:
    def make(key: str) -> Limiter:
        return Limiter(1, rates=[Rate(3, per_seconds=None)] if key == "a" else [])

    limiters = KeyedLimiter(by_id, make, max_limiters=1)
    loop = AgentLoop(ONCE, limiter=limiters)
    results = await loop.run_all(
        [Invocation(f"{key}/{number}", nothing) for number in range(5) for key in "ab"]
    )
    assert [result.status for result in results if result.agent_id.startswith("b")] == [Status.SUCCESS] * 5
    of_a = [result for result in results if result.agent_id.startswith("a")]
    assert [result.status for result in of_a] == [Status.SUCCESS] * 3 + [Status.SKIPPED] * 2
    assert isinstance(of_a[-1].exception, BatchStopped)
    await loop.run_single("c", nothing)
    assert list(limiters) == ["a", "c"], "a budget that was spent in part is never forgotten"


async def test_budget_of_which_nothing_was_spent_and_a_limiter_that_was_not_used_are_forgotten() -> None:
    rate = Rate(3, per_seconds=None, cost=lambda _: 0)
    limiters = KeyedLimiter(by_id, lambda _: Limiter(1, rates=[rate]), max_limiters=1)
    limiters["unused"]
    for name in "ab":
        await AgentLoop(ONCE, limiter=limiters).run_single(name, nothing)
        assert list(limiters) == [name]


async def test_rate_with_a_burst_binds_until_it_has_filled_again() -> None:
    limiters = KeyedLimiter(
        by_id, lambda _: Limiter(1, rates=[Rate(1, per_seconds=9, burst=2)]), max_limiters=1
    )
    loop = AgentLoop(ONCE, limiter=limiters)
    for name in "ab":
        await loop.run_single(name, nothing)

    assert list(limiters) == ["a", "b"]
    await anyio.sleep(9)
    await loop.run_single("c", nothing)
    assert list(limiters) == ["c"]


# -- a total over all keys


async def test_total_is_shared_by_the_keys_and_can_be_changed() -> None:
    limiters = KeyedLimiter(by_id, lambda _: Limiter(5, rates=[Rate(100)]), max_concurrency=3)
    limiters.max_concurrency = 2  # before it is used
    loop, starts = watched(limiters)
    jobs = [Invocation(f"{key}/{number}", anyio.sleep, (1,)) for key in "ab" for number in range(4)]
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, jobs)
        await anyio.sleep(2.5)
        limiters.max_concurrency = 4
        assert limiters.max_concurrency == limiters.statistics().limit == 4

    # The key that had none running gets the place that becomes free.
    assert starts.by_name["b"][0] == 1
    assert max(starts.by_name["a"] + starts.by_name["b"]) == 2.5
    with pytest.raises(ValueError, match="max_concurrency must be at least 1, got 0"):
        limiters.max_concurrency = 0

    with pytest.raises(ValueError, match="max_concurrency must be the limiter's, 4, or left out, got 7"):
        AgentLoop(LoopConfig(max_concurrency=7), limiter=limiters)


async def test_keys_whose_rates_free_at_once_share_the_places() -> None:
    limiters = KeyedLimiter(by_id, lambda _: Limiter(1, rates=[Rate(1, per_seconds=1)]), max_concurrency=2)
    loop, starts = watched(limiters)
    jobs = [Invocation(f"{key}/{number}", anyio.sleep, (0.1,)) for number in range(3) for key in "ab"]
    assert all(result.success for result in await loop.run_all(jobs))
    assert starts.by_name == {"a": [0, 1, 2], "b": [0, 1, 2]}


async def test_agent_that_reads_streams_runs_another_invocation_of_their_key() -> None:
    loop = AgentLoop(ONCE, limiter=keyed(1))

    async def stream() -> AsyncIterator[int]:
        for number in range(40):
            await anyio.sleep(0.01)
            yield number

    async def read() -> int:
        chunks = 0
        async with loop.stream_all([Invocation("a", stream)] * 3) as events:
            async for event in events:
                chunks += isinstance(event, ChunkEvent)
                # Meanwhile the buffer is full, and a stream without room gets the slot.
                await anyio.sleep(1)
                assert (await loop.run_single("a", anyio.sleep, 1)).success

        return chunks

    with anyio.fail_after(1000):
        assert (await loop.run_single("a", read)).output == 120


async def test_place_is_lent_through_another_limiter() -> None:
    loop = AgentLoop(ONCE, limiter=keyed(1, max_concurrency=1))

    async def agent() -> None:
        between = await AgentLoop().run_single("between", loop.run_single, "b", nothing)
        assert between.unwrap().success

    with anyio.fail_after(100):
        assert (await loop.run_single("a", agent)).success


async def test_place_of_an_agent_that_ends_goes_on_with_what_it_has_started() -> None:
    loop = AgentLoop(ONCE, limiter=keyed(2, max_concurrency=1))
    order = []

    async def last() -> None:
        await anyio.sleep(2)
        order.append("last")

    async def middle(group: TaskGroup) -> None:
        group.start_soon(loop.run_single, "b/last", last)
        await anyio.sleep(1)
        order.append("middle")

    async def first() -> None:
        async with anyio.create_task_group() as group:
            (await loop.run_single("a/middle", middle, group)).unwrap()

        order.append("first")

    with anyio.fail_after(100):
        assert (await loop.run_single("b/first", first)).success
        async with anyio.create_task_group() as group:
            await loop.run_single("a/middle", middle, group)

        assert (await loop.run_single("c", nothing)).success

    assert order == ["middle", "last", "first", "middle", "last"]
