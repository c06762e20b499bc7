"""The retry budget: how many retries there may be for each success."""

import math
from typing import Any

import anyio
import pytest
from agents import nothing, run_stream
from hypothesis import given
from hypothesis import strategies as st
from trouble import ONCE, fail, one_or_batch, overload, run_one

from agentloop import AgentLoop, Backoff, Invocation, InvocationResult, Limiter, LoopConfig, RetryBudget
from agentloop._limits.retry_budget import SLICES, RetryLedger
from agentloop.testing import Chunks, FakeAgent, FakeHTTPError

NOTE = "not retried: the retry budget of the limiter is used up, since too many attempts fail"
AT_ONCE = Backoff(initial_seconds=0, jitter="none")


def notes(result: InvocationResult[Any]) -> list[str]:
    return list(getattr(result.exception, "__notes__", ()))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ratio": -0.1}, ValueError, "ratio must be at least 0, got -0.1"),
        ({"ratio": math.inf}, ValueError, "ratio must be finite"),
        ({"ratio": "1"}, TypeError, "ratio must be a number, got '1'"),
        ({"min_per_second": -1}, ValueError, "min_per_second must be at least 0, got -1"),
        ({"window_seconds": 0}, ValueError, "window_seconds must be greater than 0, got 0"),
        ({"window_seconds": True}, TypeError, "window_seconds must be a number, got True"),
    ],
)
def test_bad_budget_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        RetryBudget(**arguments)


def test_other_things_as_a_budget_are_refused() -> None:
    with pytest.raises(TypeError, match=r"retry_budget must be of type RetryBudget, got 0\.2"):
        Limiter(1, retry_budget=0.2)


# -- the ledger, without an event loop


@given(
    st.sampled_from([0, 0.25, 0.5, 1, 3]),
    st.sampled_from([0, 0.1, 0.5]),
    st.sampled_from([1.0, 10.0, 80.0]),
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=80),
)
def test_ledger_allows_what_a_model_that_forgets_nothing_allows(
    ratio: float, minimum: float, seconds: float, steps: list[tuple[int, bool]]
) -> None:
    ledger = RetryLedger(RetryBudget(ratio, minimum, seconds))
    successes: list[int] = []
    retries: list[int] = []
    tenth = 0
    for wait, succeeds in steps:
        tenth += wait
        now = (tenth + 0.5) * seconds / SLICES
        if succeeds:
            ledger.succeeded(now)
            successes.append(tenth)
            continue

        # This tenth of the window, and the nine before it.
        recent = [sum(then > tenth - SLICES for then in times) for times in (successes, retries)]
        allowed = recent[1] + 1 <= ratio * recent[0] + minimum * seconds
        assert ledger.may_retry(now) == allowed
        if allowed:
            retries.append(tenth)

    assert len(ledger._slices) <= SLICES


def test_what_is_older_than_the_window_counts_no_more() -> None:
    ledger = RetryLedger(RetryBudget(ratio=0.5, min_per_second=0.1, window_seconds=10))
    assert [ledger.may_retry(0.0) for _ in range(2)] == [True, False]
    for _ in range(4):
        ledger.succeeded(5.0)

    assert [ledger.may_retry(9.9) for _ in range(3)] == [True, True, False]
    # The one at the beginning is over, and after a while the successes are.
    assert [ledger.may_retry(10.0) for _ in range(2)] == [True, False]
    assert [ledger.may_retry(15.0) for _ in range(2)] == [False, False]
    assert [ledger.may_retry(20.0) for _ in range(2)] == [True, False]


# -- through a loop


async def test_without_a_budget_every_retry_is_made() -> None:
    loop = AgentLoop(LoopConfig(max_retries=20, backoff=AT_ONCE))
    results = await loop.run_all([Invocation("a", fail)] * 20)
    assert [result.retries for result in results] == [20] * 20


@one_or_batch
async def test_invocation_fails_with_its_own_error_and_a_note_when_the_budget_is_used_up(verb: str) -> None:
    limiter = Limiter(1, retry_budget=RetryBudget(ratio=0.5, min_per_second=0, window_seconds=60))
    loop = AgentLoop(LoopConfig(max_retries=3, backoff=AT_ONCE), limiter=limiter)
    assert all(result.success for result in await loop.run_all([Invocation("a", nothing)] * 4))
    results = [await run_one(verb, loop, "a", fail) for _ in range(3)]
    # Two for the four successes.
    assert [result.retries for result in results] == [2, 0, 0]
    for result in results:
        assert isinstance(result.exception, LookupError)
        assert result.error == "LookupError"
        assert notes(result) == [NOTE]
        assert result.exception is result.failures[-1]


async def test_stream_is_bound_by_the_budget_too() -> None:
    limiter = Limiter(1, retry_budget=RetryBudget(ratio=0, min_per_second=0))
    _, error, result = await run_stream(AgentLoop(limiter=limiter), FakeAgent(Chunks(then=LookupError)))
    assert isinstance(error, LookupError)
    assert (error.__notes__, result.retries) == ([NOTE], 0)


async def test_retries_through_overload_do_not_draw_on_the_budget() -> None:
    limiter = Limiter(5, retry_budget=RetryBudget(ratio=0, min_per_second=0.1, window_seconds=50))
    loop = AgentLoop(LoopConfig(max_retries=1, backoff=AT_ONCE, overload_timeout_seconds=30), limiter=limiter)
    results = await loop.run_all([Invocation("a", overload)] * 5)
    assert sum(result.retries for result in results) > 5
    assert not any(NOTE in notes(result) for result in results)
    assert [(await loop.run_single("a", fail)).retries for _ in range(6)] == [1] * 5 + [0]


async def test_retry_that_is_not_made_for_another_reason_costs_nothing() -> None:
    limiter = Limiter(1, retry_budget=RetryBudget(ratio=0, min_per_second=0.1, window_seconds=10))
    loop = AgentLoop(LoopConfig(max_retries=1, backoff=AT_ONCE), limiter=limiter)
    late = LoopConfig(total_timeout_seconds=5, backoff=Backoff(initial_seconds=9, jitter="none"))
    for config, agent in ((ONCE, fail), (late, fail), (LoopConfig(), FakeAgent(FakeHTTPError(400)))):
        result = await AgentLoop(config, limiter=limiter).run_single("a", agent)
        assert (result.success, result.retries) == (False, 0)
        assert NOTE not in notes(result)

    assert [(await loop.run_single("a", fail)).retries for _ in range(2)] == [1, 0]


async def test_budget_is_one_for_all_loops_that_share_the_limiter_and_fills_again() -> None:
    limiter = Limiter(5, retry_budget=RetryBudget(ratio=0, min_per_second=0.2, window_seconds=10))
    config = LoopConfig(max_retries=1, backoff=AT_ONCE)
    one, two = AgentLoop(config, limiter=limiter), AgentLoop(config, limiter=limiter)
    # From the beginning of a tenth of the window.
    await anyio.sleep_until(2000)
    retries = [(await loop.run_single("a", fail)).retries for loop in (one, two, one, two)]
    assert retries == [1, 1, 0, 0]
    await anyio.sleep_until(2009)
    assert (await one.run_single("a", fail)).retries == 0
    await anyio.sleep_until(2010)
    assert (await one.run_single("a", fail)).retries == 1


async def test_cancelled_invocations_do_not_count_as_successes() -> None:
    limiter = Limiter(5, retry_budget=RetryBudget(ratio=1, min_per_second=0))
    loop = AgentLoop(LoopConfig(backoff=AT_ONCE, timeout_seconds=5, retry_on_timeout=False), limiter=limiter)
    with anyio.move_on_after(1):
        await loop.run_all([Invocation("a", anyio.sleep, (9,))] * 5)

    await loop.run_all([Invocation("a", anyio.sleep, (9,))] * 5)
    assert notes(await loop.run_single("a", fail)) == [NOTE]
