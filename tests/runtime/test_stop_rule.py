"""Batches that stop by a rule: what counts, what still ends, and what is said."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from agents import agent_for, each_batch, run_until_stopped, stray_cancellation

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    Invocation,
    InvocationCancelled,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Status,
    StopEvent,
    StopRule,
)
from agentloop.testing import Fail, FakeAgent, Reply


async def agent(outcome: str, seconds: float = 1) -> str:
    await anyio.sleep(seconds)
    if outcome == "f":
        raise LookupError

    if outcome == "c":
        raise await stray_cancellation()

    return outcome


def make_loop(rule: StopRule, limit: int = 1, **options: Any) -> AgentLoop:
    return AgentLoop(LoopConfig(stop=rule, max_concurrency=limit, max_retries=0), **options)


def made_of(outcomes: str, verb: str = "run_all") -> list[Any]:
    return [Invocation("a", agent_for(verb, agent), (outcome,)) for outcome in outcomes]


def statuses(results: list[Any]) -> str:
    letters = {Status.SUCCESS: "s", Status.ERROR: "f", Status.CANCELLED: "c", Status.SKIPPED: "-"}
    return "".join(letters[result.status] for result in results)


@each_batch
@pytest.mark.parametrize(
    ("rule", "outcomes", "ended", "reason"),
    [
        (StopRule(failures=1), "ssfss", "ssf", "1 failed"),
        (StopRule(failures=2), "fsfss", "fsf", "2 failed"),
        (StopRule(in_a_row=2), "fsfsffss", "fsfsff", "2 failed in a row"),
        (StopRule(in_a_row=2), "fcfss", "fcf", "2 failed in a row"),
        (StopRule(share=0.5, at_least=4), "fffss", "fffs", "3 of 4 failed, more than 0.5 of all"),
        (StopRule(share=0.5, at_least=2), "fsfss", "fsf", "2 of 3 failed, more than 0.5 of all"),
        (StopRule(share=0, at_least=1), "ssfs", "ssf", "1 of 3 failed, more than 0 of all"),
        (StopRule(share=0.5, at_least=2), "cfcss", "cfcss", ""),
        (StopRule(failures=3, in_a_row=2), "fsffs", "fsff", "3 failed"),
        (StopRule(seconds=2.5), "ssssss", "sss", "2.5s have passed"),
        (StopRule(seconds=9), "ssss", "ssss", ""),
        (StopRule(failures=2), "ssfcs", "ssfcs", ""),
    ],
    ids=lambda value: repr(value) if isinstance(value, StopRule) else str(value),
)
async def test_batch_stops_when_a_condition_holds(
    rule: StopRule, outcomes: str, ended: str, reason: str, verb: str
) -> None:
    results, stopped = await run_until_stopped(verb, make_loop(rule), made_of(outcomes, verb))
    assert statuses(results).rstrip("-") == ended
    assert len(results) == len(outcomes) or verb != "run_all"
    assert (stopped.reason if stopped else "") == reason
    if stopped is not None:
        assert str(stopped) == f"the batch was stopped: {reason} (as LoopConfig(stop=...) has it)"
        assert isinstance(stopped.__cause__, LookupError) is (rule.seconds is None)


@each_batch
@pytest.mark.parametrize(("grace", "expected", "took"), [(None, "fss", 9), (3, "fsc", 4), (0, "fcc", 1)])
async def test_running_agents_end_within_the_grace(
    verb: str, grace: float | None, expected: str, took: float
) -> None:
    fn = agent_for(verb, agent)
    inputs = [Invocation("a", fn, (o, s)) for o, s in [("f", 1), ("s", 3), ("s", 9), ("s", 1)]]
    begin = anyio.current_time()
    loop = make_loop(StopRule(failures=1, grace_seconds=grace), 3)
    results, stopped = await run_until_stopped(verb, loop, inputs)
    assert stopped is not None
    assert statuses(results).rstrip("-") == expected
    assert anyio.current_time() == begin + took
    for result in results[:3]:
        if result.status is Status.CANCELLED:
            assert isinstance(result.exception, InvocationCancelled)
            assert result.error == "InvocationCancelled: 1 failed"


async def test_grace_of_a_batch_that_is_done_leaves_no_timer() -> None:
    begin = anyio.current_time()
    rule = StopRule(failures=1, seconds=1000, grace_seconds=500)
    await make_loop(rule, 2).run_all(made_of("fs"))
    assert anyio.current_time() == begin + 1


@each_batch
async def test_async_input_is_closed_and_the_batch_looks_cut_short(verb: str) -> None:
    closed = False

    async def inputs() -> AsyncIterator[Any]:
        nonlocal closed
        try:
            for invocation in made_of("fssss", verb):
                yield invocation
        finally:
            closed = True

    results, stopped = await run_until_stopped(verb, make_loop(StopRule(failures=1)), inputs())
    assert stopped is not None
    assert closed
    assert statuses(results).rstrip("-") == "f"


async def test_rule_judges_what_is_final_and_not_each_attempt() -> None:
    flaky = FakeAgent(Fail(OSError("x")), Reply("y"))
    backoff = Backoff(initial_seconds=0.1, max_seconds=0.1)
    loop = AgentLoop(LoopConfig(stop=StopRule(failures=1), max_concurrency=1, backoff=backoff))
    results = await loop.run_all([Invocation("a", flaky)] * 2)
    assert [result.status for result in results] == [Status.SUCCESS] * 2


async def test_invocation_that_waits_to_be_retried_ends_with_its_failure_and_a_note() -> None:
    config = LoopConfig(stop=StopRule(failures=1), backoff=Backoff(initial_seconds=20, jitter="none"))
    agents = FakeAgent(OSError("again")), FakeAgent(TypeError("bug"))
    results = await AgentLoop(config).run_all([Invocation("a", agent) for agent in agents])
    assert [result.error for result in results] == ["OSError: again", "TypeError: bug"]
    assert results[0].exception is not None
    assert results[0].exception.__notes__ == ["not retried: the batch was stopped: 1 failed"]


async def test_rule_is_of_one_batch_over_all_its_keys() -> None:
    limiters = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: Limiter(1))
    loop = AgentLoop(LoopConfig(stop=StopRule(failures=2), max_retries=0), limiter=limiters)
    for _ in range(2):
        results = await loop.run_all([Invocation(str(i % 3), agent, ("f",)) for i in range(9)])
        assert statuses(results).count("f") >= 2
        assert "-" in statuses(results)


async def test_stop_event_tells_the_reason_and_comes_once() -> None:
    events: list[Event] = []
    loop = make_loop(StopRule(failures=1, in_a_row=1), 3, on_event=events.append)
    await loop.run_all(made_of("fffff"))
    assert [event.reason for event in events if isinstance(event, StopEvent)] == ["1 failed"]


async def test_nested_batch_has_a_rule_of_its_own() -> None:
    loop = make_loop(StopRule(failures=1))

    async def outer() -> str:
        return statuses(await loop.run_all(made_of("fs")))

    results = await loop.run_all([Invocation("outer", outer)] * 2)
    assert [result.output for result in results] == ["f-", "f-"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "a StopRule needs one of failures, in_a_row, share and seconds"),
        ({"grace_seconds": 5}, ValueError, "a StopRule needs one of"),
        ({"failures": 0}, ValueError, "failures must be at least 1, got 0"),
        ({"failures": True}, TypeError, "failures must be an int, got True"),
        ({"in_a_row": 0}, ValueError, "in_a_row must be at least 1"),
        ({"share": 1}, ValueError, "share must be less than 1"),
        ({"share": -0.1}, ValueError, "share must be at least 0"),
        ({"share": 0.1, "at_least": 0}, ValueError, "at_least must be at least 1"),
        ({"failures": 1, "at_least": 5}, ValueError, "at_least is about share, which is not given, got 5"),
        ({"seconds": 0}, ValueError, "seconds must be greater than 0"),
        ({"seconds": float("inf")}, ValueError, "seconds must be finite"),
        ({"failures": 1, "grace_seconds": -1}, ValueError, "grace_seconds must be at least 0"),
        ({"max_failures": 1}, TypeError, "unexpected keyword argument 'max_failures'"),
    ],
    ids=str,
)
def test_rule_that_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StopRule(**options)


def test_config_takes_no_other_rule() -> None:
    with pytest.raises(TypeError, match="stop must be of type StopRule"):
        LoopConfig(stop=lambda: True)
