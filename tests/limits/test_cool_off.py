"""The cool-off: a Retry-After holds back all calls of a limiter but one at a time, which tries the server."""

import math
from typing import Any

import anyio
import pytest
from agents import into, launch, nothing, run_stream
from hypothesis import given
from hypothesis import strategies as st
from trouble import ONCE, Starts, fail, one_or_batch, overload, run_one, watched

from agentloop import AgentLoop, Backoff, Invocation, Limiter, LoopConfig, Rate
from agentloop._provider.cool_off import CoolOff
from agentloop._provider.overload import AdaptiveLimit
from agentloop._provider.provider import Provider
from agentloop.testing import Chunks, Fail, FakeAgent, FakeHTTPError, Reply

# -- the rule, without an event loop


def test_probes_go_ahead_after_a_twentieth_and_then_after_twice_the_gap_before() -> None:
    cool_off = CoolOff()
    assert cool_off.ready_at(100.0) == 100.0
    assert cool_off.hold(100.0, 200.0, 4)
    times = []
    while (at := cool_off.ready_at(100.0)) < 300:
        times.append(at)
        cool_off.start(at, at)
        assert cool_off.ready_at(at) == 300, "one at a time"
        assert not cool_off.end("another call")
        assert cool_off.end(at)

    assert times == [110, 130, 170, 250]


@pytest.mark.parametrize(("seconds", "first"), [(0.5, 0.5), (1, 1), (8, 1), (20, 1), (21, 1.05), (300, 15)])
def test_first_probe_comes_after_a_second_at_least(seconds: float, first: float) -> None:
    cool_off = CoolOff()
    cool_off.hold(100.0, seconds, 4)
    assert cool_off.ready_at(100.0) == pytest.approx(100 + first)


def test_probe_that_nobody_was_there_for_may_start_at_any_time() -> None:
    cool_off = CoolOff()
    cool_off.hold(0.0, 100.0, 4)
    assert cool_off.ready_at(60.0) == 60.0
    cool_off.start("late", 60.0)
    cool_off.end("late")
    assert cool_off.ready_at(61.0) == 70.0, "the gap is counted from when it started"


def test_calls_start_one_by_one_when_the_time_is_over() -> None:
    cool_off = CoolOff()
    cool_off.hold(100.0, 8.0, 4)
    times = []
    for _ in range(5):
        times.append(cool_off.ready_at(108.0 if not times else times[-1]))
        cool_off.start(object(), times[-1])

    assert times == [108, 108.5, 109, 109.5, 110]
    assert cool_off.ready_at(110.0) == 110.0
    cool_off.hold(120.0, 4.0, 4)
    cool_off.start(object(), 124.6)
    assert cool_off.ready_at(124.7) == pytest.approx(124.85), "who comes late is followed as late"
    cool_off.start(object(), 124.85)
    assert cool_off.ready_at(124.9) == 125.0, "but nobody waits beyond the quarter"


def test_longer_time_replaces_one_that_runs_and_probes_go_on_as_they_were() -> None:
    cool_off = CoolOff()
    cool_off.hold(0.0, 40.0, 4)
    cool_off.start("probe", 2.0)
    assert not cool_off.hold(3.0, 10.0, 4)
    assert cool_off.until == 40
    assert not cool_off.hold(4.0, 96.0, 4)
    assert cool_off.until == 100
    assert cool_off.end("probe")
    assert cool_off.ready_at(4.0) == 6.0


def test_next_cool_off_has_probes_of_its_own() -> None:
    cool_off = CoolOff()
    cool_off.hold(0.0, 10.0, 4)
    cool_off.start("probe", 1.0)
    assert cool_off.hold(10.0, 10.0, 4), "the time before is just over"
    assert cool_off.ready_at(10.0) == 11.0
    assert not cool_off.end("probe")


def test_cool_off_that_is_lifted_holds_nothing_back_but_makes_nobody_rush_once_it_is_over() -> None:
    cool_off = CoolOff()
    cool_off.hold(0.0, 40.0, 4)
    cool_off.start("probe", 2.0)
    cool_off.lift(3.0)
    assert cool_off.ready_at(3.0) == 3.0
    cool_off.start("next", 3.0)
    assert cool_off.ready_at(3.0) == 3.0
    cool_off.hold(100.0, 40.0, 4)
    cool_off.start("first", 140.0)
    cool_off.lift(141.0)
    assert cool_off.ready_at(141.0) == 142.5


def test_success_of_a_call_from_between_the_cut_and_the_cool_off_ends_nothing() -> None:
    provider = Provider(AdaptiveLimit(10))
    provider.reject(0, 5, None, 0.0)
    # A call begins in the next epoch, and one of the same burst is told to wait.
    provider.reject(0, 5, 60.0, 1.0)
    provider.answered(1, 2.0)
    assert provider.held_until(2.0) == 61.0


@given(
    st.lists(st.tuples(st.sampled_from(["hold", "start", "end", "lift"]), st.integers(0, 60)), max_size=60)
)
def test_probes_go_one_at_a_time_and_never_earlier_than_the_rule_allows(steps: list[tuple[str, int]]) -> None:
    cool_off, now = CoolOff(), 0.0
    until = next_at = -math.inf
    gap, probe = 0.0, None
    for what, number in steps:
        now += number / 4
        match what:
            case "hold":
                if now >= until:
                    gap, probe = max(1.0, (number + 1) / 20), None
                    next_at = now + gap

                until = max(until, now + number + 1)
                cool_off.hold(now, number + 1.0, 3)
            case "start" if cool_off.ready_at(now) <= now:
                call = object()
                if now < until:
                    assert probe is None
                    assert now >= next_at
                    gap *= 2
                    probe, next_at = call, now + gap

                cool_off.start(call, now)
            case "end" if probe is not None:
                assert cool_off.end(probe)
                probe = None
            case "lift":
                until = -math.inf if now < until else until
                cool_off.lift(now)
            case _:
                pass

        assert (cool_off.until > now) == (until > now)
        if now < until:
            assert cool_off.ready_at(now) == (until if probe is not None else max(now, min(next_at, until)))
        else:
            assert now <= cool_off.ready_at(now) <= now + 61 / 4


# -- through a limiter: who is held back


async def test_retry_after_holds_back_every_caller_and_lets_one_at_a_time_try() -> None:
    limiter = Limiter(8)
    loop, starts = watched(limiter)
    stream = FakeAgent(Chunks(then=LookupError))

    async def parent() -> None:
        await anyio.sleep(1)
        await loop.run_single("child", fail)

    async def fan() -> None:
        async with loop.stream_all([Invocation("fan", stream)]) as events:
            assert len([event async for event in events]) == 1

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "parent", parent)
        await loop.run_single("told", overload, 100)
        assert limiter.statistics().paused_until == starts.began + 100
        assert repr(limiter) == "<Limiter 1 running, 0 waiting, limit 6 of 8, held>"
        assert starts.told[-1].held_until == starts.began + 100
        await launch(group, loop.run_single, "single", fail)
        await launch(group, loop.run_all, [Invocation("batch", fail)] * 2)
        await launch(group, run_stream, loop, stream)
        await launch(group, fan)
        await anyio.sleep(101)
        assert limiter.statistics().paused_until is None

    assert starts.order[2:] == ["single", "batch", "a", "fan", "child", "batch"]
    times = [at for times in starts.by_name.values() for at in times]
    # When the time is over, one by one in a quarter of it, for the six that there are slots for.
    assert sorted(times) == pytest.approx([0, 0, 5, 15, 35, 75, 100, 100 + 25 / 6])


async def test_all_start_at_once_again_when_the_quarter_is_over() -> None:
    loop, starts = watched(Limiter(4))
    await loop.run_single("told", overload, 8)
    async with anyio.create_task_group() as group:
        # A probe that takes its time.
        await launch(group, loop.run_single, "probe", anyio.sleep, 17)
        await loop.run_all([Invocation("a", anyio.sleep, (0.1,))] * 7)

    # One every two thirds of a second, for the three that there are slots for, and then as slots get free.
    assert starts.by_name["a"] == pytest.approx([8, 8 + 2 / 3, 8 + 4 / 3, 10, 10, 10.1, 10.1])


async def test_retry_of_the_one_that_was_told_comes_after_its_time() -> None:
    for seconds in (10, 60):
        agent = FakeAgent(FakeHTTPError(429, seconds), Reply())
        assert (await AgentLoop(limiter=Limiter(4)).run_single("a", agent)).success
        first, second = (call.started_at for call in agent.calls)
        assert seconds <= second - first <= seconds * 1.25


async def test_fresh_input_is_the_probe_while_the_one_that_was_told_waits() -> None:
    starts = Starts()
    loop = AgentLoop(limiter=Limiter(1), on_event=starts)
    told = FakeAgent(FakeHTTPError(429, 60), Reply())
    jobs = [Invocation("told", told), *[Invocation("fresh", anyio.sleep, (2,))] * 3]
    assert all(result.success for result in await loop.run_all(jobs))
    assert starts.by_name["fresh"] == [3, 5, 7]
    first, second = starts.by_name["told"]
    assert first == 0
    assert 60 <= second <= 75


@pytest.mark.parametrize(("longest", "starts_at"), [(99.9, 0), (100, 5)])
async def test_what_will_not_be_waited_for_holds_nobody(longest: float, starts_at: float) -> None:
    starts = Starts()
    config = LoopConfig(backoff=Backoff(max_retry_after_seconds=longest), overload_timeout_seconds=60)
    loop = AgentLoop(config, limiter=Limiter(4), on_event=starts)
    told = await loop.run_single("told", overload, 100)
    assert told.retries == 0
    await loop.run_single("a", nothing)
    assert starts.by_name["a"] == [starts_at]
    assert loop.limiter.statistics().cuts == 1, "it is an overload all the same"


async def overload_after(seconds: float, retry_after: float) -> None:
    await anyio.sleep(seconds)
    await overload(retry_after)


async def test_longer_cool_off_replaces_one_that_runs_and_a_shorter_one_does_not() -> None:
    loop, starts = watched(Limiter(4))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "longer", overload_after, 0.5, 20)
        await launch(group, loop.run_single, "shorter", overload_after, 0.7, 1)
        await loop.run_single("told", overload, 4)
        await launch(group, loop.run_single, "probe", anyio.sleep, 50)
        group.start_soon(loop.run_single, "a", nothing)

    assert [event.held_until for event in starts.told[1:3]] == [starts.began + 4, starts.began + 20.5]
    assert (starts.by_name["probe"], starts.by_name["a"]) == ([1], [20.5])


async def test_who_is_woken_at_the_end_of_a_cool_off_that_became_longer_waits_on() -> None:
    loop, starts = watched(Limiter(4))

    async def parent() -> None:
        # In its own slot, so that no slot gets free when it ends.
        await loop.run_single("longer", overload_after, 2, 20)
        await anyio.sleep(50)

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "parent", parent)
        await loop.run_single("told", overload, 4)
        await launch(group, loop.run_single, "probe", anyio.sleep, 50)
        group.start_soon(loop.run_single, "a", nothing)

    assert (starts.by_name["probe"], starts.by_name["a"]) == ([1], [22])


@pytest.mark.parametrize(
    ("limit", "seconds", "agent", "expected"),
    [
        # The probe, and then what the rate allows.
        (2, 8, nothing, [1, 9, 10, 18]),
        # Each is a probe, which waits for the rate as any other does.
        (1, 40, fail, [9, 18]),
    ],
)
async def test_cool_off_and_rates_hold_together(
    limit: int, seconds: float, agent: Any, expected: list[float]
) -> None:
    loop, starts = watched(Limiter(4, rates=[Rate(limit, per_seconds=9)]))
    await loop.run_single("told", overload, seconds)
    await loop.run_all([Invocation("a", agent)] * len(expected))
    assert starts.by_name["a"] == expected


async def test_pause_holds_probes_too() -> None:
    starts = Starts()
    limiter = Limiter(4)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload, 100)
    limiter.pause()
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", fail)] * 2)
        await anyio.sleep(20)
        assert limiter.statistics().paused_until == math.inf
        limiter.resume()
        assert limiter.statistics().paused_until == starts.began + 100

    assert starts.by_name["a"] == [20, 30]


@one_or_batch
async def test_without_adaptation_an_overload_concerns_nobody_else(verb: str) -> None:
    limiter = Limiter(10, adaptive=False)
    loop, starts = watched(limiter)
    await loop.run_all([Invocation("told", overload, (10,))] * 20)
    now = limiter.statistics()
    assert (now.limit, now.cuts, now.paused_until, now.probing) == (10, 0, None, False)
    for _ in range(3):
        await run_one(verb, loop, "a", nothing)

    assert (starts.by_name["a"], starts.limits) == ([0, 0, 0], [10])
    limiter.max_concurrency = 3
    assert starts.limits == [10, 3]
    rated, starts = watched(Limiter(10, rates=[Rate(2)], adaptive=False))
    await rated.run_all([Invocation("rated", overload, (10,))] * 3)
    assert starts.by_name["rated"] == [0, 0, 60]


# -- through a limiter: what becomes of a probe


async def test_success_of_the_probe_lets_all_go() -> None:
    starts = Starts()
    limiter = Limiter(10)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload, 60)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", anyio.sleep, (2,))] * 6)
        assert not limiter.statistics().probing
        await anyio.sleep(4)
        now = limiter.statistics()
        assert (now.running, now.probing, now.paused_until) == (1, True, starts.began + 60)
        await anyio.sleep(1.5)
        now = limiter.statistics()
        assert (now.running, now.probing, now.paused_until) == (5, False, None)

    assert starts.by_name["a"] == [3, 5, 5, 5, 5, 5]
    assert starts.told[-1].held_until is None


async def test_first_chunk_of_a_probe_ends_the_cool_off() -> None:
    loop, starts = watched(Limiter(10))
    stream = FakeAgent(Chunks([1, 2], after_seconds=1, gap_seconds=50))
    await loop.run_single("told", overload, 60)
    async with anyio.create_task_group() as group:
        await launch(group, run_stream, loop, stream)
        group.start_soon(loop.run_single, "b", nothing)

    assert starts.by_name == {"told": [0], "a": [3], "b": [4]}


async def test_success_of_a_call_that_began_before_ends_nothing() -> None:
    loop, starts = watched(Limiter(10))
    stream, results = FakeAgent(Chunks([1], after_seconds=5)), []
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "before", anyio.sleep, 4)
        await launch(group, into, results, run_stream, loop, stream)
        await loop.run_single("told", overload, 60)
        await loop.run_all([Invocation("b", anyio.sleep, (10,))] * 2)

    assert results[0][0] == [1]
    assert starts.by_name["b"] == [3, 13]


async def test_rejected_probe_leaves_the_next_one_twice_the_gap() -> None:
    loop, starts = watched(Limiter(64))
    await loop.run_single("told", overload, 100)
    await loop.run_all([Invocation("a", overload, (10,))] * 4)
    assert starts.by_name["a"] == [5, 15, 35, 75]


@pytest.mark.parametrize("after_seconds", [5, 6, 40])
async def test_probe_that_is_cancelled_leaves_its_turn_to_the_next(after_seconds: float) -> None:
    starts = Starts()
    limiter = Limiter(4)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload, 100)
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(after_seconds):
            await loop.run_single("a", anyio.sleep, 50)

        assert not limiter.statistics().probing
        group.start_soon(loop.run_single, "b", nothing)

    # In the moment in which it is time for the probe, either may come first.
    assert starts.by_name["b"][0] in ({5, 15} if after_seconds == 5 else {max(15, after_seconds)})


async def test_those_who_are_cancelled_during_a_cool_off_leave_the_line_to_the_others() -> None:
    starts = Starts()
    limiter = Limiter(1)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload, 100)
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(3):
            group.start_soon(loop.run_single, "b", nothing)
            await loop.run_single("a", nothing)

        assert limiter.statistics().waiting == 1

    assert starts.by_name == {"told": [0], "b": [5]}


@pytest.mark.parametrize("rates", [(), (Rate(1000),)])
async def test_probes_with_slots_on_loan_go_one_at_a_time_too(rates: tuple[Rate, ...]) -> None:
    loop, starts = watched(Limiter(10, rates=rates))
    fails_slowly = FakeAgent(Fail(LookupError, after_seconds=20))

    async def parent() -> None:
        await anyio.sleep(0.5)
        await loop.run_single("child", fails_slowly)
        # So that no slot gets free as the probe ends.
        await anyio.sleep(100)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            await launch(group, loop.run_single, "parent", parent)

        await loop.run_single("told", overload, 100)

    # The second one could have begun at 15.
    assert starts.by_name["child"] == [5, 25, 45]


async def test_success_of_a_probe_on_loan_lets_all_go() -> None:
    starts = Starts()
    limiter = Limiter(4)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def parent() -> None:
        await anyio.sleep(0.5)
        await loop.run_single("child", anyio.sleep, 1)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(loop.run_single, "parent", parent)

        await anyio.wait_all_tasks_blocked()
        await loop.run_single("told", overload, 100)
        await anyio.sleep(5.5)
        group.start_soon(loop.run_single, "other", anyio.sleep, 1)
        await anyio.sleep(1)
        assert limiter.statistics().running == 3, "two in their parents' slots, and the other in one more"

    assert starts.by_name["child"] == [5, 6, 6]
    assert starts.by_name["other"] == [6]


async def test_probe_of_an_earlier_cool_off_ends_no_later_one() -> None:
    loop, starts = watched(Limiter(10))
    await loop.run_single("told", overload, 20)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "probe", anyio.sleep, 25)
        await anyio.sleep(21)
        await loop.run_single("told", overload, 100)
        group.start_soon(loop.run_all, [Invocation("a", fail)] * 3)

    # The first one ends at 26, the second cool-off began at 21.
    assert (starts.by_name["probe"], starts.by_name["a"]) == ([1], [26, 36, 56])
