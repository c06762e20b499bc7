"""Rates: what may start in a time, to the moment, first come, first served."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import pytest
import trio.testing
from agents import agent_for, backends, launch, run_scheduled, run_stream
from fuzz import Account
from hypothesis import given
from hypothesis import strategies as st
from trouble import one_or_batch, passed, run_one, watched

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    Invocation,
    InvocationResult,
    Limiter,
    LoopConfig,
    Rate,
    StartedEvent,
    Status,
    Verdict,
    VerdictKind,
)
from agentloop._limits.rates import Charge, Meter, make_meter
from agentloop.testing import Fail, FakeAgent, Reply


async def nothing(*_: object) -> None:
    pass


def weight(invocation: Invocation[Any]) -> float:
    return invocation.args[0]


# -- bad values


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"limit": 0}, ValueError, "limit must be greater than 0, got 0"),
        ({"limit": math.inf}, ValueError, "limit must be finite"),
        ({"limit": math.nan}, ValueError, "limit must be a number, got nan"),
        ({"limit": True}, TypeError, "limit must be a number, got True"),
        ({"limit": "60"}, TypeError, "limit must be a number, got '60'"),
        ({"limit": 0.5}, ValueError, r"limit must be at least 1 where each .* Rate\(1, per_seconds=2\)"),
        ({"limit": 5, "per_seconds": 0}, ValueError, "per_seconds must be greater than 0, got 0"),
        ({"limit": 5, "per_seconds": -1}, ValueError, "per_seconds must be greater than 0, got -1"),
        ({"limit": 5, "burst": 0}, ValueError, "burst must be greater than 0, got 0"),
        ({"limit": 5, "burst": 0.5}, ValueError, "burst must be at least 1 where each attempt costs 1"),
        ({"limit": 5, "cost": 3}, TypeError, "cost must be callable, got 3"),
        ({"limit": 5, "settle": 3}, TypeError, "settle must be callable, got 3"),
    ],
)
def test_bad_rate_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Rate(**arguments)


@pytest.mark.parametrize("bad", [Rate(5), 5, None])
def test_rates_that_are_no_iterable_of_rates_are_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"rates must be an iterable of Rate, such as \[Rate\(60\)\]"):
        Limiter(1, rates=bad)

    with pytest.raises(TypeError, match="rates must be of type Rate, got 5"):
        Limiter(1, rates=[Rate(5), 5])

    assert Limiter(1, rates=iter([Rate(5)])).rates == (Rate(5),)


@pytest.mark.parametrize(
    ("cost", "burst", "error", "text"),
    [
        (lambda _: 11, None, ValueError, "the cost of 'a' is 11, which can never be paid with limit=10"),
        (lambda _: 6, 5, ValueError, "is 6, which can never be paid with burst=5: split the inv"),
        (lambda _: -1, None, ValueError, "the cost of 'a' must be at least 0, got -1"),
        (lambda _: math.nan, None, ValueError, "the cost of 'a' must be a number, got nan"),
        (lambda _: "3", None, TypeError, "the cost of 'a' must be a number, got '3'"),
        (lambda invocation: invocation.args[7], None, IndexError, "tuple index out of range"),
    ],
)
async def test_cost_that_cannot_be_paid_is_the_invocations_error_at_once(
    cost: Callable[[Any], Any], burst: int | None, error: type[Exception], text: str
) -> None:
    def priced(invocation: Invocation[Any]) -> Any:
        return 5 if invocation.agent_id == "b" else cost(invocation)

    agent, began = FakeAgent(Reply()), anyio.current_time()
    loop = AgentLoop(limiter=Limiter(1, rates=[Rate(10, burst=burst, cost=priced)]))
    result = await loop.run_single("a", agent)
    assert result.status is Status.ERROR
    assert isinstance(result.exception, error)
    results = await loop.run_all([Invocation("a", agent), Invocation("b", agent)])
    assert [result.status for result in results] == [Status.ERROR, Status.SUCCESS]
    assert len(agent.calls) == 1
    assert passed(began) == 0
    with pytest.raises(error, match=text):
        results[0].unwrap()

    snapshot = loop.metrics.snapshot()
    assert (snapshot.counts[Status.ERROR], snapshot.in_flight) == (2, 0)


# -- when attempts start


async def starts(
    rates: list[Rate], invocations: list[Invocation[Any]], limit: int = 100, **config: Any
) -> Any:
    loop, starts = watched(Limiter(limit, rates=rates), LoopConfig(**config))
    await loop.run_all(invocations)
    return starts.by_name["a"]


@pytest.mark.parametrize(
    ("burst", "expected"),
    [(None, [0] * 10 + [1] * 10 + [2] * 5), (5, [0] * 5 + [0.1, 0.2, 0.3, 0.4]), (1, [0, 0.1, 0.2, 0.3])],
)
async def test_whole_limit_starts_at_once_and_the_rest_later_or_a_burst_and_the_rest_evenly(
    burst: int | None, expected: list[float]
) -> None:
    rate = Rate(10, per_seconds=1, burst=burst)
    assert await starts([rate], [Invocation("a", nothing)] * len(expected)) == expected


async def test_all_rates_hold_and_heavy_ones_are_not_overtaken() -> None:
    rates = [Rate(2, per_seconds=1), Rate(100, per_seconds=10, cost=weight)]
    jobs = [Invocation("a", nothing, (cost,)) for cost in (10, 80, 20, 5, 5)]
    assert await starts(rates, jobs) == [0, 0, 10, 10, 11]


async def test_slot_is_waited_for_before_the_rate() -> None:
    # A rate that is paid by those who then wait for a slot lets them all start in one moment.
    times = await starts([Rate(10, per_seconds=1)], [Invocation("a", anyio.sleep, (0.95,))] * 40, limit=10)
    assert most_within(times, 1) <= 10
    assert times[-1] == 3


async def test_retry_pays_like_any_other_attempt() -> None:
    settings: Any = {"max_retries": 2, "backoff": Backoff(initial_seconds=0, jitter="none")}
    jobs = [Invocation("a", FakeAgent(OSError))]
    assert await starts([Rate(1, per_seconds=5)], jobs, limit=1, **settings) == [0, 5, 10]


async def test_nested_invocations_pay_although_they_are_lent_their_slot() -> None:
    loop, starts = watched(Limiter(1, rates=[Rate(2, per_seconds=1)]))
    assert (await loop.run_single("parent", loop.run_all, [Invocation("child", nothing)] * 3)).success
    assert starts.by_name["child"] == [0, 1, 1]


@pytest.mark.parametrize("seconds", [1, 4])
async def test_cancelled_waiter_has_taken_nothing_and_the_next_one_starts_then(seconds: float) -> None:
    loop, starts = watched(Limiter(5, rates=[Rate(3, per_seconds=10, cost=weight)]))
    await loop.run_single("a", nothing, 2)
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as inner:
                await launch(inner, loop.run_single, "heavy", nothing, 3)
                if seconds == 4:
                    group.start_soon(loop.run_single, "light", nothing, 1)

        if seconds == 1:
            assert loop.limiter.statistics().waiting == 0
            await loop.run_single("light", nothing, 1)

    assert starts.by_name == {"a": [0], "light": [seconds]}


async def test_what_was_paid_in_the_moment_of_a_cancellation_is_given_back() -> None:
    for steps in range(6):
        limiter = Limiter(1, rates=[Rate(1, per_seconds=100)])
        loop = AgentLoop(limiter=limiter)
        limiter.pause()
        async with anyio.create_task_group() as group:
            await launch(group, loop.run_single, "a", nothing)
            limiter.resume()
            assert limiter.statistics().running == 1
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()

            group.cancel_scope.cancel()

        if loop.metrics.snapshot().latency.count:
            break

        begin = anyio.current_time()
        await loop.run_single("b", nothing)
        assert anyio.current_time() == begin, f"cancelled after {steps} steps"

    assert steps > 0


async def test_what_was_reserved_in_the_moment_in_which_the_batch_is_stopped_is_given_back() -> None:
    limiter = Limiter(2, rates=[Rate(3, per_seconds=100)])
    loop = AgentLoop(LoopConfig(classify=lambda _: Verdict(VerdictKind.FATAL)), limiter=limiter)
    fails = Invocation("fails", FakeAgent(Fail(OSError, after_seconds=1)))
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "before", anyio.sleep, 1)
        failed, granted = await loop.run_all([fails, Invocation("waits", nothing)])

    assert (failed.status, granted.status) == (Status.ERROR, Status.SKIPPED)
    began = anyio.current_time()
    await loop.run_single("after", nothing)
    assert passed(began) == 0


@one_or_batch
async def test_time_that_a_cost_takes_to_tell_is_not_the_agents(verb: str) -> None:
    def slow(_: object) -> int:
        compute(5)
        return 1

    result = await run_one(verb, AgentLoop(limiter=Limiter(1, rates=[Rate(10, cost=slow)])), "a", nothing)
    assert (result.queue_ms, result.latency_ms) == (5000, 0)


async def test_loan_of_a_waiter_that_is_cancelled_goes_to_the_next() -> None:
    loop, starts = watched(Limiter(1, rates=[Rate(1, per_seconds=5, cost=weight)]))

    async def outer(_: float) -> None:
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(1):
                async with anyio.create_task_group() as inner:
                    # The first one has the loan, and waits for the rate; the second one could pay.
                    await launch(inner, loop.run_single, "first", nothing, 1)
                    group.start_soon(loop.run_single, "second", nothing, 0)

    await loop.run_single("outer", outer, 1)
    assert starts.by_name == {"outer": [0], "second": [1]}


# -- settling


async def test_difference_to_the_real_cost_is_given_back_or_charged() -> None:
    real = {"less": 1, "more": 9}
    rate = Rate(10, per_seconds=10, cost=weight, settle=lambda result: real[result.agent_id])
    loop, starts = watched(Limiter(1, rates=[rate]))
    for name, estimate in (("less", 10), ("more", 5), ("less", 1)):
        await loop.run_single(name, nothing, estimate)

    assert starts.by_name == {"less": [0, 10], "more": [0]}


async def test_those_who_wait_start_as_soon_as_enough_is_given_back() -> None:
    rate = Rate(10, per_seconds=100, cost=lambda _: 10, settle=lambda _: 0)
    assert await starts([rate], [Invocation("a", anyio.sleep, (2,))] * 3) == [0, 2, 4]


async def test_settle_is_told_of_failures_and_its_error_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Status] = []

    def settle(result: InvocationResult[Any]) -> float:
        seen.append(result.status)
        raise KeyError("usage")

    loop, starts = watched(Limiter(1, rates=[Rate(2, per_seconds=10, settle=settle)]))
    with caplog.at_level(logging.ERROR, "agentloop"):
        await loop.run_single("a", FakeAgent(TypeError))
        with anyio.move_on_after(1):
            await loop.run_single("a", anyio.sleep, 5)

        await loop.run_all([Invocation("a", nothing)])

    assert seen == [Status.ERROR, Status.CANCELLED, Status.SUCCESS]
    assert (starts.by_name["a"], len(caplog.records)) == ([0, 0, 10], 1)
    assert "settle=" in caplog.text


@pytest.mark.parametrize("bad", [-1, math.inf, "3"])
async def test_bad_real_cost_changes_nothing(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    rate = Rate(1, per_seconds=10, settle=lambda _: bad)
    assert await starts([rate], [Invocation("a", nothing)] * 2, limit=1) == [0, 10]
    assert "the return value of settle must be" in caplog.text


# -- against a model


@attrs.frozen
class Arrival:
    at: float
    weight: int
    seconds: float
    patience: float


@attrs.frozen
class Started:
    at: float
    ends: float
    arrival: Arrival


def cost_of(rate: Rate, arrival: Arrival) -> float:
    return 1 if rate.cost is None else arrival.weight


def earliest(rate: Rate, before: list[Started], arrival: Arrival, at: float) -> float:
    """Return when an arrival can start, by looking at every window that it would end."""
    cost = cost_of(rate, arrival)
    if rate.burst is None:
        while True:
            inside = [one for one in before if one.at + rate.per_seconds > at]
            if sum(cost_of(rate, one.arrival) for one in inside) + cost <= rate.limit:
                return at

            at = inside[0].at + rate.per_seconds

    total = cost
    for one in reversed(before):
        total += cost_of(rate, one.arrival)
        at = max(at, one.at + (total - rate.burst) * rate.per_seconds / rate.limit)

    return at


def model(limit: int, rates: list[Rate], arrivals: list[Arrival]) -> list[Started]:
    started: list[Started] = []
    free_from = 0.0
    for arrival in arrivals:
        at = max(arrival.at, free_from)
        while True:
            running = sorted(one.ends for one in started if one.ends > at)
            then = running[len(running) - limit] if len(running) >= limit else at
            for rate in rates:
                then = max(then, earliest(rate, started, arrival, then))

            if then == at:
                break

            at = then

        gives_up = arrival.at + arrival.patience
        free_from = max(free_from, min(at, gives_up))
        if at < gives_up:
            started.append(Started(at, min(at + arrival.seconds, gives_up), arrival))

    return started


arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 24).map(lambda n: n / 8),
        st.integers(1, 4),
        st.sampled_from([1 / 64, 0.25 + 1 / 64, 1 + 1 / 64, 3 + 1 / 64]),
        st.one_of(st.just(1e6), st.integers(1, 40).map(lambda n: n / 8 + 1 / 1021)),
    ),
    min_size=1,
    max_size=30,
).map(lambda found: sorted(found, key=lambda arrival: arrival.at))
rates = st.lists(
    st.builds(
        Rate,
        st.integers(4, 9),
        st.sampled_from([0.5, 1.0, 3.0]),
        st.one_of(st.none(), st.integers(4, 9)),
        st.sampled_from([None, weight]),
    ),
    max_size=3,
)


@pytest.mark.long
@backends
@given(limit=st.integers(1, 5), rates=rates, arrivals=arrivals, seed=st.integers(0, 2**16))
def test_attempts_start_in_order_and_as_early_as_slots_and_rates_allow(
    backend: str, limit: int, rates: list[Rate], arrivals: list[Arrival], seed: int
) -> None:
    async def main() -> dict[str, list[float]]:
        limiter = Limiter(limit, rates=rates)
        loop, starts = watched(limiter, LoopConfig(timeout_seconds=None))

        async def call(number: int, arrival: Arrival) -> None:
            with anyio.move_on_after(arrival.patience):
                agent = FakeAgent(Reply(after_seconds=arrival.seconds))
                await loop.run_single(str(number), agent, arrival.weight)

        async with anyio.create_task_group() as group:
            for number, arrival in enumerate(arrivals):
                await anyio.sleep_until(starts.began + arrival.at)
                await launch(group, call, number, arrival)

        now = limiter.statistics()
        assert (now.running, now.waiting) == (0, 0)
        return starts.by_name

    times = run_scheduled(backend, seed, main)
    expected = model(limit, rates, arrivals)
    # Those that start in the same moment do so in whatever order the scheduler wakes them.
    in_order = sorted(times, key=int)
    assert [times[name] for name in in_order] == [[pytest.approx(one.at, abs=2e-6)] for one in expected]
    assert [arrivals[int(name)] for name in in_order] == [one.arrival for one in expected]


def pay(meter: Meter, cost: float, now: float) -> Charge:
    charge = meter.reserve(cost)
    meter.pay(charge, now)
    return charge


@given(
    st.builds(
        Rate, st.integers(3, 9), st.just(4.0), st.one_of(st.none(), st.integers(3, 9)), st.just(weight)
    ),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 9), st.integers(0, 3))),
)
def test_no_window_holds_more_than_is_allowed_however_costs_are_corrected(
    rate: Rate, steps: list[tuple[int, int, int, int]]
) -> None:
    meter, now = make_meter(rate), 0.0
    paid: list[tuple[float, float]] = []
    open_charges: list[tuple[int, Any]] = []
    for wait, cost, which, real in steps:
        now = max(now + wait / 4, meter.ready_at(cost, now))
        assert meter.ready_at(cost, now) == now, "it is not ready when it said that it would be"
        open_charges.append((len(paid), pay(meter, cost, now)))
        paid.append((now, cost))
        if which < len(open_charges):
            index, charge = open_charges.pop(which)
            real = min(real, paid[index][1])
            meter.correct(charge, real, now)
            paid[index] = (paid[index][0], real)

        for first in range(len(paid)):
            at = paid[first][0]
            if rate.burst is None:
                total = sum(cost for then, cost in paid[first:] if then < at + rate.per_seconds)
                assert total <= rate.limit
            else:
                for last in range(first, len(paid)):
                    total = sum(cost for _, cost in paid[first : last + 1])
                    allowed = rate.burst + (paid[last][0] - at) * rate.limit / rate.per_seconds
                    assert total <= allowed + 1e-9


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=20))
def test_what_is_given_back_at_once_leaves_no_trace(burst: int, steps: list[tuple[int, int]]) -> None:
    for rate in (Rate(5, 4.0, burst, weight), Rate(5, 4.0, None, weight)):
        meter, other, now = make_meter(rate), make_meter(rate), 0.0
        for wait, cost in steps:
            cost = min(cost, burst)
            now = max(now + wait / 4, meter.ready_at(cost, now))
            pay(meter, cost, now)
            pay(other, cost, now)
            now = max(now, other.ready_at(1, now), meter.ready_at(1, now))
            other.correct(pay(other, 1, now), 0, now)
            assert other.ready_at(burst, now) == pytest.approx(meter.ready_at(burst, now))


@given(
    st.one_of(st.none(), st.integers(3, 9)),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 9), st.integers(0, 6))),
)
def test_corrected_costs_count_as_if_they_had_been_known_or_were_paid_when_they_were(
    burst: int | None, steps: list[tuple[int, int, int, int]]
) -> None:
    rate = Rate(5, 4.0, burst, weight)
    meter, account, now = make_meter(rate), Account(rate), 0.0
    open_charges: list[tuple[Any, Any]] = []
    for wait, cost, which, real in steps:
        now = max(now + wait / 4, meter.ready_at(cost, now))
        open_charges.append((pay(meter, cost, now), account.pay(cost, now)))
        if which < len(open_charges):
            charge, payment = open_charges.pop(which)
            meter.correct(charge, real, now)
            account.correct(payment, real, now)

        assert meter.ready_at(1, now) == pytest.approx(account.ready_at(1, now))
        assert meter.ready_at(3, now) == pytest.approx(account.ready_at(3, now))


def test_settling_one_charge_takes_nothing_from_the_settling_of_another() -> None:
    meter = make_meter(Rate(1, 1.0, burst=10))
    charges = [pay(meter, 2, 0.0), pay(meter, 5, 2.0), pay(meter, 3, 2.0)]
    for charge, real in zip(charges, (2, 0, 0), strict=True):
        meter.correct(charge, real, 2.0)

    assert meter.ready_at(10, 2.0) == 2.0


def test_what_has_flowed_back_is_not_given_back_from_what_was_charged_since() -> None:
    meter = make_meter(Rate(1, 1.0, burst=10))
    first, second = pay(meter, 0, 0.0), pay(meter, 5, 0.0)
    meter.correct(first, 3, 5.0)
    meter.correct(second, 0, 5.0)
    assert meter.ready_at(10, 5.0) == 8.0


def test_charge_is_corrected_until_it_is_long_past() -> None:
    meter = make_meter(Rate(5, 1.0))
    charge = pay(meter, 5, 0.0)
    assert meter.ready_at(5, 1.0) == 1.0
    pay(meter, 5, 1.0)
    meter.correct(charge, 0, 1.0)
    assert meter.ready_at(1, 1.0) == 2.0
    meter = make_meter(Rate(5, 1.0, cost=weight))
    # A cost that turns out not to be nothing.
    meter.correct(pay(meter, 0, 0.0), 5, 0.5)
    assert meter.ready_at(1, 0.5) == 1.5


def test_fractions_leave_nothing_behind() -> None:
    meter, now = make_meter(Rate(1, 1.0, cost=weight)), 0.0
    for cost in [0.1, 0.2, 0.7, 0.3, 0.6, 0.1, 1.0] * 50:
        now = meter.ready_at(cost, now)
        pay(meter, cost, now)

    assert meter.ready_at(1.0, now + 1) == now + 1
    assert now < 350


# -- with an event loop that is busy


def most_within(starts: list[float], seconds: float) -> int:
    """Return how many starts there were at most in a time that begins with one of them."""
    return max(sum(first <= start < first + seconds for start in starts) for first in starts)


def compute(seconds: float = 0.004) -> None:
    """Keep the event loop busy for a time of its virtual clock."""
    try:
        asyncio_loop = asyncio.get_running_loop()
    except RuntimeError:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        vars(asyncio_loop)["_virtual_time"] += seconds


async def singles(loop: AgentLoop, agent: Any) -> None:
    async def client() -> None:
        compute()
        await loop.run_single("a", agent)

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(client)


async def batches(loop: AgentLoop, agent: Any) -> None:
    other = AgentLoop(limiter=loop.limiter)
    async with anyio.create_task_group() as group:
        for one in (loop, other):
            group.start_soon(one.run_all, [Invocation("a", agent)] * 30)


async def streams(loop: AgentLoop, agent: Any) -> None:
    stream = agent_for("run_streaming", agent)
    async with anyio.create_task_group() as group, loop.stream_all([Invocation("a", stream)] * 30) as events:
        for _ in range(30):
            group.start_soon(run_stream, loop, stream)

        [_ async for _ in events]


async def nested(loop: AgentLoop, agent: Any) -> None:
    await loop.run_single("outer", lambda: batches(loop, agent))


@pytest.mark.parametrize("way", [singles, batches, streams, nested])
@pytest.mark.parametrize("rate", [Rate(10, per_seconds=0.05), Rate(20, per_seconds=0.05, burst=2)], ids=repr)
async def test_rate_holds_where_agents_are_called_in_a_busy_event_loop(rate: Rate, way: Any) -> None:
    starts: list[float] = []

    async def agent() -> None:
        starts.append(anyio.current_time())
        # By turns, so that ten that were let in together start apart, and the next ten together.
        if len(starts) % 20 < 10:
            compute()

        await anyio.sleep(0)

    await way(AgentLoop(limiter=Limiter(1000, rates=[rate])), agent)
    # The outer one of nested invocations starts too, before all others.
    assert len(starts) == 60
    assert most_within(starts, rate.per_seconds - 1e-9) <= rate.limit + (rate.burst or 0)


async def test_sink_that_is_slow_moves_no_start_closer_to_the_next() -> None:
    starts: list[float] = []

    async def agent() -> None:
        starts.append(anyio.current_time())

    def slow(event: Event) -> None:
        if isinstance(event, StartedEvent):
            compute()

    loop = AgentLoop(limiter=Limiter(1000, rates=[Rate(5, per_seconds=0.03)]), on_event=slow)
    await loop.run_all([Invocation("a", agent)] * 20)
    assert most_within(starts, 0.03 - 1e-9) <= 5


@pytest.mark.parametrize("rate", [Rate(2, 1.0), Rate(1, 1.0, burst=2)], ids=["window", "bucket"])
def test_reservation_does_not_flow_back_before_it_is_paid(rate: Rate) -> None:
    meter = make_meter(rate)
    first, second = meter.reserve(1), meter.reserve(1)
    assert meter.ready_at(1, 50.0) == math.inf
    meter.pay(first, 60.0)
    assert meter.ready_at(1, 60.0) == 61
    meter.release(second)
    assert meter.ready_at(1, 60.0) == 60
