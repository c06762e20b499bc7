"""Overload control: one cut for a burst, growth that has to be earned, and a cool-off for everybody."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from elsewhere import in_use_elsewhere
from hypothesis import given
from hypothesis import strategies as st

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    Invocation,
    Limiter,
    LimitEvent,
    LoopConfig,
    Rate,
    StartedEvent,
    Status,
)
from agentloop._limits.overload import AdaptiveLimit

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
ONCE = LoopConfig(max_retries=0)


class Overloaded(Exception):
    """HTTP 429."""

    status_code = 429

    def __init__(self, retry_after: float | None = None) -> None:
        super().__init__(retry_after)
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}


async def overload(retry_after: float | None = None) -> None:
    raise Overloaded(retry_after)


async def nothing(*_: object) -> None:
    pass


class Starts:
    """When each attempt began, in seconds from now on, and what the limit was meanwhile."""

    def __init__(self) -> None:
        self.began = anyio.current_time()
        self.by_name: dict[str, list[float]] = {}
        self.limits: list[int] = []
        self.order: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartedEvent):
            at = round(event.at - self.began, 6)
            self.by_name.setdefault(event.invocation.agent_id, []).append(at)
            self.order.append(event.invocation.agent_id)
        elif isinstance(event, LimitEvent):
            self.limits.append(event.limit)


def passed(since: float) -> float:
    return round(anyio.current_time() - since, 6)


# -- the rule, without an event loop


def cut(governor: AdaptiveLimit, times: int = 1, now: float = 0.0) -> None:
    for _ in range(times):
        governor.reject(governor.epoch, now)


def grow(governor: AdaptiveLimit, completions: int, in_use: float = 1.0) -> None:
    for _ in range(completions):
        governor.begin(math.ceil(governor.limit * in_use))
        governor.complete(math.ceil(governor.limit * in_use) - 1)


def test_one_burst_of_rejections_cuts_once() -> None:
    governor = AdaptiveLimit(64)
    for _ in range(50):
        governor.reject(0, 0.0)

    assert (governor.limit, governor.cuts, governor.epoch) == (51, 1, 1)
    governor.reject(1, 0.0)
    assert (governor.limit, governor.cuts) == (40, 2)


def test_limit_never_falls_below_one() -> None:
    governor = AdaptiveLimit(64)
    limits = []
    for _ in range(20):
        limits.append(governor.limit)
        cut(governor)

    assert limits[:15] == [64, 51, 40, 32, 25, 20, 16, 12, 9, 7, 5, 4, 3, 2, 1]
    assert set(limits[14:]) == {1}
    assert governor.cuts == 14


def test_limit_grows_after_as_many_clean_completions_in_a_row_as_it_is() -> None:
    governor = AdaptiveLimit(64)
    cut(governor)
    grow(governor, 50)
    assert governor.limit == 51
    grow(governor, 1)
    assert governor.limit == 53
    grow(governor, 52)
    governor.reject(0, 0.0)  # of a call that began before the cut: it cuts nothing, but was not clean
    grow(governor, 52)
    assert governor.limit == 53
    grow(governor, 1)
    assert governor.limit == 55


@pytest.mark.parametrize(("in_use", "limit"), [(40, 51), (41, 53)])
def test_limit_grows_only_if_four_fifths_of_it_were_in_use(in_use: int, limit: int) -> None:
    governor = AdaptiveLimit(64)
    cut(governor)
    governor.begin(in_use)
    for _ in range(51):
        governor.complete(0)

    assert governor.limit == limit


def test_use_counts_for_one_round_only() -> None:
    governor = AdaptiveLimit(64)
    cut(governor)
    grow(governor, 51)
    assert governor.limit == 53
    for _ in range(53 * 3):
        governor.complete(3)

    # What still ran as the round began counts for it.
    assert governor.limit == 55


def test_steps_are_a_twentieth_and_larger_after_six_of_them_up_to_a_quarter() -> None:
    governor = AdaptiveLimit(10_000)
    cut(governor, 10)
    shares = []
    while governor.limit < 8000:
        before = governor.limit
        grow(governor, before)
        shares.append(round(governor.limit / before - 1, 2))

    assert shares == [0.05] * 6 + [0.1, 0.15, 0.2] + [0.25] * (len(shares) - 9)
    assert len(shares) > 10
    while governor.limit < 10_000:
        grow(governor, governor.limit)

    assert governor.limit == 10_000
    cut(governor)
    grow(governor, 8000)
    assert governor.limit == 8400, "the first step after a cut is a small one again"


def test_probes_at_a_limit_of_one_wait_twice_as_long_each_time_up_to_half_a_minute() -> None:
    governor = AdaptiveLimit(1)
    waits = []
    for _ in range(14):
        cut(governor, now=50.0 + sum(waits))
        waits.append(governor.held_until - 50.0 - sum(waits))

    for number, seconds in enumerate(waits):
        longest = min(0.1 * 2**number, 30)
        assert longest / 2 <= seconds <= longest

    assert governor.cuts == 0
    governor.complete(0)
    cut(governor, now=5000.0)
    assert governor.held_until <= 5000.1


def test_limit_doubles_in_each_round_after_an_outage_up_to_where_it_was() -> None:
    governor = AdaptiveLimit(64)
    cut(governor, 3)
    assert governor.limit == 32
    grow(governor, 32 + 33)
    assert governor.limit == 34
    cut(governor, 30)
    assert governor.limit == 1
    limits = []
    while governor.limit < 34:
        limits.append(governor.limit)
        grow(governor, governor.limit)

    assert limits == [1, 2, 4, 8, 16, 32]
    # The round in which it got there counts already for the next step.
    assert governor.limit == 34
    grow(governor, 3)
    assert governor.limit == 34
    grow(governor, 1)
    assert governor.limit == 35


def test_two_refused_probes_are_no_outage() -> None:
    governor = AdaptiveLimit(64)
    cut(governor, 14 + 2)
    grow(governor, 1 + 1)
    assert governor.limit == 2
    grow(governor, 1)
    assert governor.limit == 3


def test_cut_ends_the_fast_growth_after_an_outage() -> None:
    governor = AdaptiveLimit(64)
    cut(governor, 30)
    grow(governor, 19)
    assert governor.limit == 20
    cut(governor)
    grow(governor, 15)
    assert governor.limit == 16
    grow(governor, 1)
    assert governor.limit == 17


def test_ceiling_that_is_changed_moves_the_limit_unless_that_was_cut() -> None:
    governor = AdaptiveLimit(10)
    governor.resize(20)
    assert governor.limit == 20
    cut(governor)
    governor.resize(40)
    assert governor.limit == 16
    governor.resize(5)
    assert governor.limit == 5
    cut(governor, 30)
    governor.resize(3)
    grow(governor, 20)
    assert governor.limit == 3, "nothing grows above the ceiling, after an outage neither"


def test_nothing_starts_during_a_hold_and_then_one_after_the_other() -> None:
    governor = AdaptiveLimit(4)
    assert governor.ready_at(100.0) == 100.0
    governor.hold(100.0, 8.0)
    governor.hold(101.0, 2.0)  # asks for less than there is already
    assert governor.ready_at(100.0) == 108.0
    times = []
    for _ in range(5):
        times.append(governor.ready_at(100.0))
        governor.start(times[-1])

    assert times == [108.0, 108.5, 109.0, 109.5, 110.0]
    assert governor.ready_at(110.0) == 110.0
    governor.hold(120.0, 4.0)
    governor.start(124.6)
    assert governor.ready_at(124.7) == pytest.approx(124.85), "who comes late is followed as late"
    governor.start(124.85)
    assert governor.ready_at(124.9) == 125.0, "but nobody waits beyond the quarter"


@given(
    st.integers(1, 70),
    st.lists(
        st.one_of(
            st.tuples(st.just("reject"), st.integers(0, 3)),
            st.tuples(st.just("complete"), st.integers(1, 200)),
            st.tuples(st.just("resize"), st.integers(1, 70)),
        ),
        max_size=60,
    ),
)
def test_limit_stays_between_one_and_the_ceiling_and_falls_only_by_a_cut(
    ceiling: int, steps: list[tuple[str, int]]
) -> None:
    governor = AdaptiveLimit(ceiling)
    for what, number in steps:
        before, cuts = governor.limit, governor.cuts
        if what == "reject":
            governor.reject(governor.epoch - number, 0.0)
            assert governor.limit == before or (number == 0 and governor.limit == max(1, before * 4 // 5))
            assert governor.cuts == cuts + (governor.limit < before)
        elif what == "complete":
            for _ in range(number):
                governor.begin(governor.limit)
                governor.complete(governor.limit - 1)

            assert before <= governor.limit <= before * max(2, 2**number)
        else:
            governor.resize(number)
            assert governor.limit <= max(before, number)

        assert 1 <= governor.limit <= governor.ceiling
        assert governor.recovers or governor.limit == governor.ceiling


# -- through a limiter: cuts and growth


async def test_burst_of_rejections_is_one_cut_and_the_next_burst_another() -> None:
    limiter = Limiter(10)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def together(count: int) -> None:
        release = anyio.Event()

        async def agent() -> None:
            await release.wait()
            raise Overloaded

        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_all, [Invocation("a", agent)] * count)
            await anyio.wait_all_tasks_blocked()
            assert limiter.statistics().running == count
            release.set()

    await together(10)
    assert (limiter.statistics().limit, limiter.statistics().cuts) == (8, 1)
    await together(8)
    now = limiter.statistics()
    assert (now.limit, now.cuts, now.max_concurrency, now.paused_until) == (6, 2, 10, None)
    assert starts.limits == [10, 8, 6]
    assert repr(limiter) == "<Limiter 0 running, 0 waiting, limit 6 of 10>"


async def time_out() -> None:
    await anyio.sleep(100)


async def make_overload_of_cancellation() -> None:
    try:
        await anyio.sleep(100)
    finally:
        raise Overloaded(30)


async def fail() -> None:
    raise OSError


async def refuse() -> None:
    error = Overloaded()
    error.status_code = 400
    raise error


async def stray() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep(1)
        except anyio.get_cancelled_exc_class() as exc:
            stored = exc
            raise

    raise stored


@pytest.mark.parametrize(
    ("agent", "status"),
    [
        (time_out, Status.TIMEOUT),
        (make_overload_of_cancellation, Status.TIMEOUT),
        (fail, Status.ERROR),
        (refuse, Status.ERROR),
        (stray, Status.CANCELLED),
        (nothing, Status.SUCCESS),
    ],
)
async def test_what_is_no_overload_never_cuts(agent: Callable[[], Any], status: Status) -> None:
    loop = AgentLoop(attrs.evolve(ONCE, timeout_seconds=5), limiter=Limiter(10))
    results = await loop.run_all([Invocation("a", agent)] * 30)
    assert {result.status for result in results} == {status}
    now = loop.limiter.statistics()
    assert (now.limit, now.cuts, now.paused_until) == (10, 0, None)


@pytest.mark.parametrize("agent", [time_out, make_overload_of_cancellation])
async def test_cancelled_calls_never_count(agent: Callable[[], Any]) -> None:
    loop = AgentLoop(ONCE, limiter=Limiter(10))
    with anyio.move_on_after(1):
        await loop.run_all([Invocation("a", agent)] * 30)

    with anyio.move_on_after(1):
        await loop.run_single("a", agent)

    now = loop.limiter.statistics()
    assert (now.limit, now.cuts, now.paused_until) == (10, 0, None)


async def test_limit_grows_back_under_load_and_never_above_the_ceiling() -> None:
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=Limiter(20), on_event=starts)
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 100)
    assert starts.limits == [20], "nothing to grow before the first overload"
    await loop.run_single("a", overload)
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 200)
    assert starts.limits == [20, 16, 17, 18, 19, 20]


async def test_limit_that_is_not_used_does_not_grow() -> None:
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=Limiter(20), on_event=starts)
    await loop.run_single("a", overload)
    for _ in range(100):
        await loop.run_single("a", nothing)

    assert starts.limits == [20, 16]


async def test_each_run_begins_anew() -> None:
    limiter = Limiter(10)
    loop = AgentLoop(ONCE, limiter=limiter)
    await loop.run_single("a", overload, 5)
    assert limiter.statistics().limit == 8
    outcome: list[Any] = []

    async def other_run() -> None:
        await loop.run_single("a", nothing)
        outcome.append(limiter.statistics())

    thread = threading.Thread(target=anyio.run, args=(other_run,))
    thread.start()
    thread.join()
    assert (outcome[0].limit, outcome[0].cuts, outcome[0].paused_until) == (10, 0, None)


async def test_calls_at_a_limit_of_one_try_ever_less_often() -> None:
    starts = Starts()
    backoff = Backoff(initial_seconds=0, jitter="none")
    config = LoopConfig(backoff=backoff, overload_timeout_seconds=None)
    loop = AgentLoop(config, limiter=Limiter(1), on_event=starts)

    async def agent() -> None:
        if len(starts.by_name["a"]) < 12:
            raise Overloaded

    assert (await loop.run_single("a", agent)).retries == 11
    times = starts.by_name["a"]
    for number, (first, second) in enumerate(itertools.pairwise(times)):
        longest = min(0.1 * 2**number, 30)
        assert longest / 2 - 1e-6 <= second - first <= longest + 1e-6


# -- the cool-off


async def test_retry_after_holds_back_every_caller_and_lets_them_go_one_by_one() -> None:
    limiter = Limiter(8)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    interrupted = True

    async def parent() -> None:
        nonlocal interrupted
        await anyio.sleep(1)
        await loop.run_single("child", nothing)
        interrupted = False

    async def stream(*_: object) -> AsyncIterator[int]:
        yield 1

    async def read() -> None:
        async with loop.run_streaming("stream", stream) as chunks:
            assert [chunk async for chunk in chunks] == [1]

    async def fan() -> None:
        async with loop.stream_all([Invocation("fan", stream)]) as events:
            assert len([event async for event in events]) == 2

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "parent", parent)
        await anyio.wait_all_tasks_blocked()
        await loop.run_single("told", overload, 10)
        assert limiter.statistics().paused_until == starts.began + 10
        assert repr(limiter) == "<Limiter 1 running, 0 waiting, limit 6 of 8, paused>"
        for task in (
            lambda: loop.run_single("single", nothing),
            lambda: loop.run_all([Invocation("batch", nothing)]),
            read,
            fan,
        ):
            group.start_soon(task)
            await anyio.wait_all_tasks_blocked()

        await anyio.sleep(11)
        assert limiter.statistics().paused_until is None

    assert not interrupted
    assert starts.by_name.pop("parent") == starts.by_name.pop("told") == [0]
    # A quarter of ten seconds, for the eight that there were slots for.
    expected = [10 + 2.5 / 8 * number for number in range(5)]
    assert starts.order[2:] == ["single", "batch", "stream", "fan", "child"]
    assert [at for (at,) in starts.by_name.values()] == pytest.approx(expected)


async def test_all_start_at_once_again_when_the_quarter_is_over() -> None:
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=Limiter(4), on_event=starts)
    await loop.run_single("told", overload, 8)
    await loop.run_all([Invocation("a", anyio.sleep, (1.9,))] * 9)
    # One every half second, then as slots get free; after three of them there is one more.
    assert starts.by_name["a"] == pytest.approx([8, 8.5, 9, 9.9, 10.4, 10.9, 10.9, 11.8, 12.3])
    assert repr(loop.limiter) == "<Limiter 0 running, 0 waiting, limit 4>"


async def test_cool_off_is_no_longer_than_the_invocation_itself_would_wait() -> None:
    starts = Starts()
    config = LoopConfig(backoff=Backoff(max_retry_after_seconds=3))
    loop = AgentLoop(config, limiter=Limiter(4), on_event=starts)
    told = await loop.run_single("told", overload, 100)
    assert told.retries == 0
    await loop.run_single("a", nothing)
    assert starts.by_name["a"] == [3]


async def test_longer_cool_off_replaces_one_that_runs_and_a_shorter_one_does_not() -> None:
    starts = Starts()
    limiter = Limiter(4)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def later(seconds: float, retry_after: float) -> None:
        await anyio.sleep(seconds)
        raise Overloaded(retry_after)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "longer", later, 2, 20)
        group.start_soon(loop.run_single, "shorter", later, 3, 1)
        await anyio.wait_all_tasks_blocked()
        await loop.run_single("told", overload, 4)
        group.start_soon(loop.run_single, "a", nothing)

    assert starts.by_name["a"] == [22]


async def test_who_is_woken_at_the_end_of_a_cool_off_that_became_longer_waits_on() -> None:
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=Limiter(4), on_event=starts)

    async def later() -> None:
        await anyio.sleep(2)
        raise Overloaded(20)

    async def parent() -> None:
        # In its own slot, so that no slot gets free when it ends.
        await loop.run_single("longer", later)
        await anyio.sleep(50)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "parent", parent)
        await anyio.wait_all_tasks_blocked()
        await loop.run_single("told", overload, 4)
        group.start_soon(loop.run_single, "a", nothing)

    assert starts.by_name["a"] == [22]


async def test_retry_of_the_one_that_was_told_comes_after_the_cool_off_too() -> None:
    starts = Starts()
    loop = AgentLoop(limiter=Limiter(4), on_event=starts)

    async def agent() -> None:
        if len(starts.by_name["a"]) == 1:
            raise Overloaded(10)

    assert (await loop.run_single("a", agent)).success
    first, second = starts.by_name["a"]
    assert first == 0
    assert 10 <= second <= 12.5


async def test_those_who_are_cancelled_during_a_cool_off_leave_the_line_to_the_others() -> None:
    starts = Starts()
    limiter = Limiter(1)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload, 8)
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(3):
            group.start_soon(loop.run_single, "b", nothing)
            await loop.run_single("a", nothing)

        assert limiter.statistics().waiting == 1

    assert starts.by_name == {"told": [0], "b": [8]}


async def test_cool_off_and_rates_hold_together() -> None:
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=Limiter(4, rates=[Rate(2, per_seconds=9)]), on_event=starts)
    await loop.run_single("told", overload, 8)
    await loop.run_all([Invocation("a", nothing)] * 4)
    assert starts.by_name["a"] == pytest.approx([8, 9, 17, 18])


@pytest.mark.parametrize("rates", [(), (Rate(4, per_seconds=1000),)])
@pytest.mark.parametrize("how", ["cool-off", "pause"])
async def test_stream_that_waits_for_its_reader_is_neither_charged_nor_held(
    how: str, rates: tuple[Rate, ...]
) -> None:
    limiter = Limiter(1, rates=rates)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def write() -> AsyncIterator[int]:
        for number in range(100):
            yield number

    async def parent() -> int:
        async with loop.run_streaming("stream", write) as stream:
            assert await anext(stream) == 0
            # The stream waits for its reader, who has the slot back meanwhile.
            if how == "pause":
                await loop.run_single("child", nothing)
                limiter.pause()
            else:
                await loop.run_single("child", overload, 50)

            return 1 + len([chunk async for chunk in stream])

    assert (await loop.run_single("parent", parent)).unwrap() == 100
    assert passed(starts.began) == 0
    limiter.resume()
    await loop.run_single("fourth", nothing)
    assert passed(starts.began) == (0 if how == "pause" else 50), "the stream has paid twice"


@pytest.mark.parametrize("verb", ["single", "batch"])
async def test_without_adaptation_an_overload_concerns_nobody_else(verb: str) -> None:
    starts = Starts()
    limiter = Limiter(10, adaptive=False)
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_all([Invocation("told", overload, (10,))] * 20)
    now = limiter.statistics()
    assert (now.limit, now.cuts, now.paused_until) == (10, 0, None)
    if verb == "single":
        await loop.run_single("a", nothing)
    else:
        await loop.run_all([Invocation("a", nothing)] * 3)

    assert {*starts.by_name["a"]} == {0}
    assert starts.limits == [10]
    rated = AgentLoop(ONCE, limiter=Limiter(10, rates=[Rate(2)], adaptive=False), on_event=starts)
    await rated.run_all([Invocation("rated", overload, (10,))] * 3)
    assert starts.by_name["rated"] == [0, 0, 60]
    starts.limits[1:] = []
    limiter.max_concurrency = 3
    assert starts.limits == [10, 3]


def test_adaptive_that_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="adaptive must be of type bool, got 1"):
        Limiter(1, adaptive=1)


# -- resizing while the limit is cut


async def test_ceiling_may_be_raised_and_lowered_while_the_limit_is_cut() -> None:
    limiter = Limiter(10)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload)
    limiter.max_concurrency = 12
    assert (limiter.statistics().limit, limiter.statistics().max_concurrency) == (8, 12)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", anyio.sleep, (10,))] * 11)
        await anyio.wait_all_tasks_blocked()
        assert limiter.statistics().running == 8
        limiter.max_concurrency = 3
        assert (limiter.statistics().running, limiter.statistics().limit) == (8, 3)
        await anyio.sleep(11)
        assert limiter.statistics().running == 3

    assert loop.metrics.snapshot().counts[Status.SUCCESS] == 11
    assert starts.by_name["a"] == [0] * 8 + [10] * 3
    assert starts.limits == [10, 8, 3]


async def test_limit_goes_on_growing_up_to_a_ceiling_that_was_raised() -> None:
    limiter = Limiter(5)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    await loop.run_single("told", overload)
    limiter.max_concurrency = 7
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 100)
    assert starts.limits == [5, 4, 5, 6, 7]


async def test_loan_of_a_waiter_that_is_cancelled_goes_to_the_next() -> None:
    rate = Rate(1, per_seconds=5, cost=lambda invocation: invocation.args[0])
    loop = AgentLoop(ONCE, limiter=Limiter(1, rates=[rate]))
    begin = anyio.current_time()
    times: list[float] = []

    async def second(_: float) -> None:
        times.append(anyio.current_time() - begin)

    async def outer(_: float) -> None:
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(1):
                async with anyio.create_task_group() as inner:
                    # The first one has the loan, and waits for the rate; the second one could pay.
                    inner.start_soon(loop.run_single, "first", second, 1)
                    await anyio.wait_all_tasks_blocked()
                    group.start_soon(loop.run_single, "second", second, 0)

    await loop.run_single("outer", outer, 1)
    assert times == [1]


# -- pausing


async def test_pause_lets_nothing_new_start_and_what_runs_go_on() -> None:
    limiter = Limiter(2)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def stream() -> AsyncIterator[int]:
        yield 1

    async def read() -> None:
        async with loop.run_streaming("stream", stream) as chunks:
            assert [chunk async for chunk in chunks] == [1]

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", anyio.sleep, (2,))] * 4)
        await anyio.wait_all_tasks_blocked()
        limiter.pause()
        limiter.pause()
        group.start_soon(loop.run_single, "b", nothing)
        group.start_soon(read)
        await anyio.sleep(5)
        now = limiter.statistics()
        assert (now.running, now.waiting, now.paused_until) == (0, 4, math.inf)
        assert repr(limiter) == "<Limiter 0 running, 4 waiting, limit 2, paused>"
        limiter.resume()
        limiter.resume()
        assert limiter.statistics().paused_until is None

    assert starts.by_name == {"a": [0, 0, 5, 5], "b": [5], "stream": [5]}


@pytest.mark.parametrize("rates", [(), (Rate(100),)])
async def test_pause_before_the_first_run_holds(rates: tuple[Rate, ...]) -> None:
    limiter = Limiter(2, rates=rates)
    limiter.pause()
    assert limiter.statistics().paused_until == math.inf
    assert repr(limiter) == "<Limiter 0 running, 0 waiting, limit 2, paused>"
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", nothing)] * 3)
        await anyio.sleep(4)
        assert limiter.statistics().waiting == 3
        limiter.resume()

    assert starts.by_name == {"a": [4, 4, 4]}


async def test_resume_before_the_first_run_undoes_a_pause() -> None:
    limiter = Limiter(2)
    limiter.pause()
    limiter.resume()
    assert (await AgentLoop(limiter=limiter).run_single("a", nothing)).success


@pytest.mark.parametrize("rates", [(), (Rate(1000, per_seconds=1),)])
async def test_agent_that_runs_goes_on_running_others_while_paused(rates: tuple[Rate, ...]) -> None:
    limiter = Limiter(3, rates=rates)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def parent() -> None:
        await anyio.sleep(1)
        await loop.run_all([Invocation("child", anyio.sleep, (1,))] * 3)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "parent", parent)
        await anyio.wait_all_tasks_blocked()
        limiter.pause()
        group.start_soon(loop.run_single, "other", nothing)
        await anyio.sleep(10)
        limiter.resume()

    # One at a time, in the slot of their parent, though there are others.
    assert starts.by_name == {"parent": [0], "child": [1, 2, 3], "other": [10]}


async def test_nested_agent_that_waits_for_a_rate_starts_on_time_while_paused() -> None:
    limiter = Limiter(2, rates=[Rate(2, per_seconds=4)])
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)

    async def parent() -> None:
        await loop.run_single("first", anyio.sleep, 1)
        await loop.run_single("second", nothing)

    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "parent", parent)
        await anyio.wait_all_tasks_blocked()
        # First in line, and the one that the clock is set for.
        group.start_soon(loop.run_single, "other", nothing)
        await anyio.sleep(2)
        limiter.pause()
        await anyio.sleep(18)
        limiter.resume()

    assert starts.by_name == {"parent": [0], "first": [0], "second": [4], "other": [20]}


async def test_waiters_that_are_cancelled_while_paused_leave_the_line() -> None:
    limiter = Limiter(1)
    starts = Starts()
    loop = AgentLoop(ONCE, limiter=limiter, on_event=starts)
    limiter.pause()
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(2):
            await loop.run_single("a", nothing)

        assert limiter.statistics().waiting == 0
        with anyio.move_on_after(2):
            group.start_soon(loop.run_single, "b", nothing)
            await loop.run_all([Invocation("c", nothing)] * 3)

        assert limiter.statistics().waiting == 1
        limiter.resume()

    assert starts.by_name == {"b": [4]}


async def test_total_time_runs_out_while_a_retry_waits_for_the_end_of_a_pause() -> None:
    limiter = Limiter(1)
    config = LoopConfig(total_timeout_seconds=5, backoff=Backoff(initial_seconds=1, jitter="none"))
    loop = AgentLoop(config, limiter=limiter)

    async def agent() -> None:
        limiter.pause()
        raise OSError

    begin = anyio.current_time()
    single = await loop.run_single("a", agent)
    limiter.resume()
    (batched,) = await loop.run_all([Invocation("a", agent)])
    assert [single.status, batched.status] == [Status.TIMEOUT] * 2
    assert passed(begin) == 10
    limiter.resume()


@backends
def test_limiter_in_use_is_paused_and_resumed_only_in_its_own_thread(backend: str) -> None:
    limiter = Limiter(1)
    with in_use_elsewhere(AgentLoop(limiter=limiter), backend):
        with pytest.raises(RuntimeError, match="a limiter in use can be paused only in the thread of its ev"):
            limiter.pause()

        with pytest.raises(RuntimeError, match="a limiter in use can be resumed only in the thread of its"):
            limiter.resume()

        assert limiter.statistics().paused_until is None

    limiter.pause()
    assert limiter.statistics().paused_until == math.inf
    limiter.resume()


# -- a simulated provider that has too much to do

_spec = importlib.util.spec_from_file_location(
    "overload", Path(__file__).parents[2] / "benchmarks" / "overload.py"
)
assert _spec is not None
assert _spec.loader is not None
simulation = importlib.util.module_from_spec(_spec)
sys.modules["overload"] = simulation
_spec.loader.exec_module(simulation)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ceiling", "calls", "backend", "rejections"), [(64, 3500, "asyncio", 5), (200, 4500, "trio", 12)]
)
def test_brown_out_loses_nothing_and_little_time(
    ceiling: int, calls: int, backend: str, rejections: float
) -> None:
    capacity = simulation.steps((-1, 1), (60, 0.3), (120, 1))
    scenario = attrs.evolve(simulation.SCENARIOS["brown-out"], calls=calls, capacity=capacity)
    outcome = simulation.simulate(scenario, ceiling, AdaptiveLimit, backend)
    assert all(result.success for result in outcome.results)
    assert outcome.ideal_seconds / outcome.seconds >= 0.85
    assert len(outcome.provider.rejected) / calls * 100 <= rejections


@pytest.mark.long
@backends
def test_outage_is_probed_now_and_then_and_over_soon_when_it_is_over(backend: str) -> None:
    capacity = simulation.steps((-1, 1), (10, 0), (310, 1))
    scenario = attrs.evolve(simulation.SCENARIOS["outage"], calls=2000, capacity=capacity)
    outcome = simulation.simulate(scenario, 64, AdaptiveLimit, backend)
    assert all(result.success for result in outcome.results)
    assert outcome.ideal_seconds / outcome.seconds >= 0.85
    assert sum(20 < at < 310 for at in outcome.provider.started) <= 30
    assert simulation.recovery(outcome, 310) <= 60
