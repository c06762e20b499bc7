"""Overload control: one cut for a burst, deeper cuts while nothing is taken, and growth to be earned."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import pytest
from agents import backends, launch, nothing, run_scheduled, stray_cancellation
from hypothesis import given
from hypothesis import strategies as st
from trouble import ONCE, overload, refuse, watched

from agentloop import AgentLoop, Backoff, Invocation, Limiter, LoopConfig, Status
from agentloop._provider.overload import AdaptiveLimit
from agentloop.testing import Fail, FakeAgent, FakeHTTPError, Reply

# -- the rule, without an event loop


def cut(limit: AdaptiveLimit, times: int = 1, now: float = 0.0) -> None:
    """Reject calls, each of which began after the last cut, while others run on."""
    for _ in range(times):
        limit.reject(limit.epoch, limit.limit, now)


def grow(limit: AdaptiveLimit, completions: int) -> None:
    for _ in range(completions):
        limit.begin(limit.limit)
        limit.complete(limit.epoch, limit.limit - 1)


def test_one_burst_of_rejections_cuts_once() -> None:
    limit = AdaptiveLimit(64)
    for in_use in range(49, -1, -1):
        limit.reject(0, in_use, 0.0)

    assert (limit.limit, limit.cuts, limit.epoch) == (51, 1, 1)
    limit.reject(1, 50, 0.0)
    assert (limit.cuts, limit.epoch) == (2, 2)


def test_limit_never_falls_below_one() -> None:
    limit = AdaptiveLimit(64)
    limits = []
    for _ in range(20):
        limits.append(limit.limit)
        cut(limit)

    assert limits[:15] == [64, 51, 40, 32, 25, 20, 16, 12, 9, 7, 5, 4, 3, 2, 1]
    assert (set(limits[14:]), limit.cuts) == ({1}, 14)


def test_provider_that_takes_nothing_costs_three_cuts() -> None:
    limit, limits = AdaptiveLimit(64), [64]
    while limit.limit > 1:
        epoch = limit.epoch
        for in_use in range(limit.limit - 1, -1, -1):
            limit.reject(epoch, in_use, 0.0)

        limits.append(limit.limit)

    assert limits == [64, 51, 25, 1]


def test_cut_is_no_deep_one_while_a_call_from_before_the_last_runs() -> None:
    limit = AdaptiveLimit(64)
    limit.reject(0, 2, 0.0)
    limit.reject(0, 1, 0.0)
    limit.reject(1, 1, 0.0)
    assert limit.limit == 40
    # Whether that call succeeds or is rejected too, it has ended.
    limit.complete(1, 0)
    limit.reject(2, 0, 0.0)
    assert limit.limit == 20


def test_cut_is_no_deep_one_once_a_call_that_began_since_the_last_has_succeeded() -> None:
    limit = AdaptiveLimit(64)
    limit.reject(0, 0, 0.0)
    limit.complete(1, 0)
    limit.reject(1, 0, 0.0)
    assert limit.limit == 40
    limit.reject(2, 0, 0.0)
    limit.answered(3)  # the first chunk of a stream
    limit.reject(3, 0, 0.0)
    assert limit.limit == 16, "a half, and then a fifth less again"
    limit = AdaptiveLimit(64)
    limit.reject(0, 1, 0.0)
    limit.complete(0, 0)  # a call from before the cut
    limit.reject(1, 0, 0.0)
    assert limit.limit == 25


def test_limit_grows_after_as_many_clean_completions_in_a_row_as_it_is() -> None:
    limit = AdaptiveLimit(64)
    cut(limit)
    grow(limit, 50)
    assert limit.limit == 51
    grow(limit, 1)
    assert limit.limit == 53
    grow(limit, 52)
    limit.reject(0, 10, 0.0)  # of a call that began before the cut: it cuts nothing, but was not clean
    grow(limit, 52)
    assert limit.limit == 53
    grow(limit, 1)
    assert limit.limit == 55


@pytest.mark.parametrize(("in_use", "expected"), [(40, 51), (41, 53)])
def test_limit_grows_only_if_four_fifths_of_it_were_in_use(in_use: int, expected: int) -> None:
    limit = AdaptiveLimit(64)
    cut(limit)
    limit.begin(in_use)
    for _ in range(51):
        limit.complete(1, 0)

    assert limit.limit == expected


def test_use_counts_for_one_round_only() -> None:
    limit = AdaptiveLimit(64)
    cut(limit)
    grow(limit, 51)
    assert limit.limit == 53
    for _ in range(53 * 3):
        limit.complete(1, 3)

    # What still ran as the round began counts for it.
    assert limit.limit == 55


def test_steps_are_a_twentieth_and_larger_after_six_of_them_up_to_a_quarter() -> None:
    limit = AdaptiveLimit(10_000)
    cut(limit, 10)
    shares = []
    while limit.limit < 8000:
        before = limit.limit
        grow(limit, before)
        shares.append(round(limit.limit / before - 1, 2))

    assert shares == [0.05] * 6 + [0.1, 0.15, 0.2] + [0.25] * (len(shares) - 9)
    assert len(shares) > 10
    while limit.limit < 10_000:
        grow(limit, limit.limit)

    assert limit.limit == 10_000
    cut(limit)
    grow(limit, 8000)
    assert limit.limit == 8400, "the first step after a cut is a small one again"


def test_calls_at_a_limit_of_one_wait_twice_as_long_each_time_up_to_half_a_minute() -> None:
    limit = AdaptiveLimit(1)
    waits = []
    for _ in range(14):
        cut(limit, now=50.0 + sum(waits))
        waits.append(limit.next_at - 50.0 - sum(waits))

    for number, seconds in enumerate(waits):
        longest = min(0.1 * 2**number, 30)
        assert longest / 2 <= seconds <= longest

    assert limit.cuts == 0
    assert limit.recovers
    limit.complete(limit.epoch, 0)
    assert (limit.next_at, limit.recovers) == (-math.inf, False)
    cut(limit, now=5000.0)
    assert limit.next_at <= 5000.1


def test_limit_doubles_in_each_round_after_the_provider_was_gone_up_to_where_it_was() -> None:
    limit = AdaptiveLimit(64)
    cut(limit, 3)
    assert limit.limit == 32
    grow(limit, 32 + 33)
    assert limit.limit == 34
    cut(limit, 30)
    assert limit.limit == 1
    limits = []
    while limit.limit < 34:
        limits.append(limit.limit)
        grow(limit, limit.limit)

    assert limits == [1, 2, 4, 8, 16, 32]
    # The round in which it got there counts already for the next step.
    assert limit.limit == 34
    grow(limit, 3)
    assert limit.limit == 34
    grow(limit, 1)
    assert limit.limit == 35


def test_first_chunk_finds_a_provider_that_was_gone_as_a_completion_does() -> None:
    limit = AdaptiveLimit(64)
    cut(limit, 30)
    limit.answered(limit.epoch)
    assert limit.next_at == -math.inf
    grow(limit, 7)
    assert limit.limit == 8


def test_two_refused_calls_are_no_provider_that_is_gone() -> None:
    limit = AdaptiveLimit(64)
    cut(limit, 14 + 2)
    grow(limit, 1 + 1)
    assert limit.limit == 2
    grow(limit, 1)
    assert limit.limit == 3


def test_cut_ends_the_fast_growth() -> None:
    limit = AdaptiveLimit(64)
    cut(limit, 30)
    grow(limit, 19)
    assert limit.limit == 20
    cut(limit)
    grow(limit, 15)
    assert limit.limit == 16
    grow(limit, 1)
    assert limit.limit == 17


def test_ceiling_that_is_changed_moves_the_limit_unless_that_was_cut() -> None:
    limit = AdaptiveLimit(10)
    limit.resize(20)
    assert limit.limit == 20
    cut(limit)
    limit.resize(40)
    assert limit.limit == 16
    limit.resize(5)
    assert limit.limit == 5
    cut(limit, 30)
    limit.resize(3)
    grow(limit, 20)
    assert limit.limit == 3, "nothing grows above the ceiling, not even fast"


@given(
    st.integers(1, 70),
    st.lists(
        st.one_of(
            st.tuples(st.just("reject"), st.integers(0, 3), st.integers(0, 3)),
            st.tuples(st.just("complete"), st.integers(0, 3), st.integers(1, 200)),
            st.tuples(st.just("resize"), st.just(0), st.integers(1, 70)),
        ),
        max_size=60,
    ),
)
def test_limit_stays_up_to_its_ceiling_and_falls_by_cuts(
    ceiling: int, steps: list[tuple[str, int, int]]
) -> None:
    limit = AdaptiveLimit(ceiling)
    for what, age, number in steps:
        before, cuts = limit.limit, limit.cuts
        if what == "reject":
            limit.reject(limit.epoch - age, number, 0.0)
            assert limit.limit in ({max(1, before * 4 // 5), before // 2 or 1, 1} if age == 0 else {before})
            assert limit.cuts == cuts + (limit.limit < before)
        elif what == "complete":
            for _ in range(number):
                limit.begin(limit.limit)
                limit.complete(limit.epoch - age, limit.limit - 1)

            assert before <= limit.limit <= before * max(2, 2**number)
        else:
            limit.resize(number)
            assert limit.limit <= max(before, number)

        assert 1 <= limit.limit <= limit.ceiling
        assert limit.recovers or limit.limit == limit.ceiling


# -- through a limiter


async def test_burst_of_rejections_is_one_cut_and_the_next_burst_another() -> None:
    limiter = Limiter(10)
    loop, starts = watched(limiter)
    agent = FakeAgent(Fail(FakeHTTPError(429), after_seconds=1))
    await loop.run_all([Invocation("a", agent)] * 10)
    assert (limiter.statistics().limit, limiter.statistics().cuts) == (8, 1)
    await loop.run_all([Invocation("a", agent)] * 8)
    now = limiter.statistics()
    assert (now.limit, now.cuts, now.max_concurrency, now.paused_until) == (4, 2, 10, None)
    assert (starts.by_name["a"], starts.limits) == ([0] * 10 + [1] * 8, [10, 8, 4])
    assert repr(limiter) == "<Limiter 0 running, 0 waiting, limit 4 of 10>"


async def time_out() -> None:
    await anyio.sleep(100)


async def make_overload_of_cancellation() -> None:
    try:
        await anyio.sleep(100)
    finally:
        await overload(30)


async def stray() -> None:
    raise await stray_cancellation()


@pytest.mark.parametrize(
    ("agent", "status"),
    [
        (time_out, Status.TIMEOUT),
        (make_overload_of_cancellation, Status.TIMEOUT),
        (refuse, Status.ERROR),
        (FakeAgent(FakeHTTPError(400, 30)), Status.ERROR),
        (stray, Status.CANCELLED),
        (nothing, Status.SUCCESS),
    ],
)
async def test_what_is_no_overload_never_cuts(agent: Callable[[], Any], status: Status) -> None:
    loop = AgentLoop(attrs.evolve(ONCE, timeout_seconds=5), limiter=Limiter(10))
    # One more that speaks of the provider would be an outage.
    results = await loop.run_all([Invocation("a", agent)] * 9)
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
    assert (now.limit, now.cuts, now.paused_until, now.outage_since) == (10, 0, None, None)


async def test_limit_grows_back_under_load_and_never_above_the_ceiling() -> None:
    loop, starts = watched(Limiter(20))
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 100)
    assert starts.limits == [20], "nothing to grow before the first overload"
    await loop.run_single("a", overload)
    for _ in range(100):
        await loop.run_single("a", nothing)

    assert starts.limits == [20, 16], "it is not used"
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 200)
    assert starts.limits == [20, 16, 17, 18, 19, 20]


@backends
def test_each_run_begins_anew(backend: str) -> None:
    limiter = Limiter(10)
    loop = AgentLoop(ONCE, limiter=limiter)
    outcomes: list[Any] = []

    async def first(agent: Callable[..., Any], *args: Any) -> None:
        await loop.run_single("a", agent, *args)
        now = limiter.statistics()
        outcomes.append((now.limit, now.cuts, now.paused_until is None))

    run_scheduled(backend, None, first, overload, 5)
    run_scheduled(backend, None, first, nothing)
    assert outcomes == [(8, 1, False), (10, 0, True)]


async def test_calls_at_a_limit_of_one_try_ever_less_often() -> None:
    config = LoopConfig(backoff=Backoff(initial_seconds=0, jitter="none"), overload_timeout_seconds=None)
    agent = FakeAgent(*[FakeHTTPError(429)] * 11, Reply())
    assert (await AgentLoop(config, limiter=Limiter(1)).run_single("a", agent)).retries == 11
    times = [call.started_at for call in agent.calls]
    for number, (first, second) in enumerate(itertools.pairwise(times)):
        longest = min(0.1 * 2**number, 30)
        assert longest / 2 - 1e-6 <= second - first <= longest + 1e-6


def test_adaptive_that_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="adaptive must be of type bool, got 1"):
        Limiter(1, adaptive=1)


# -- resizing while the limit is cut


async def test_ceiling_may_be_raised_and_lowered_while_the_limit_is_cut() -> None:
    limiter = Limiter(10)
    loop, starts = watched(limiter)
    await loop.run_single("told", overload)
    limiter.max_concurrency = 12
    assert (limiter.statistics().limit, limiter.statistics().max_concurrency) == (8, 12)
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_all, [Invocation("a", anyio.sleep, (10,))] * 11)
        assert limiter.statistics().running == 8
        limiter.max_concurrency = 3
        assert (limiter.statistics().running, limiter.statistics().limit) == (8, 3)
        await anyio.sleep(11)
        assert limiter.statistics().running == 3

    assert loop.metrics.snapshot().counts[Status.SUCCESS] == 11
    assert (starts.by_name["a"], starts.limits) == ([0] * 8 + [10] * 3, [10, 8, 3])


async def test_limit_goes_on_growing_up_to_a_ceiling_that_was_raised() -> None:
    loop, starts = watched(Limiter(5))
    await loop.run_single("told", overload)
    loop.limiter.max_concurrency = 7
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 100)
    assert starts.limits == [5, 4, 5, 6, 7]
