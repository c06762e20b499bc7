"""run_single: one invocation, in its caller's task."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import anyio
import pytest
from agents import agent_for, count, double, each_verb, make_loop, nothing, run, run_into, stray_cancellation
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Invocation,
    InvocationCancelled,
    InvocationTimeout,
    LoopConfig,
    Status,
    Verdict,
    VerdictKind,
)
from agentloop._limits.limiter import pool_of
from agentloop._runtime.observer import Observer
from agentloop._runtime.options import RunOptions
from agentloop._runtime.single import Single
from agentloop.testing import Fail, FakeAgent, FakeHTTPError, Reply, Stall

PLAIN = Backoff(jitter="none")
SLOW = FakeAgent(Reply("done", after_seconds=10))


async def test_output_is_the_value_that_the_agent_returns() -> None:
    result = await AgentLoop().run_single("a", double, 21)
    assert result.unwrap() == 42
    assert (result.agent_id, result.status, result.success, result.error) == ("a", Status.SUCCESS, True, None)
    assert (result.retries, result.failures, result.index) == (0, (), 0)


async def test_keyword_arguments_may_have_the_names_of_our_own_parameters() -> None:
    async def agent(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    result = await AgentLoop().run_single("a", agent, agent_id=1, fn=2, self=3)
    assert result.unwrap() == {"agent_id": 1, "fn": 2, "self": 3}


async def test_any_callable_that_returns_an_awaitable_is_an_agent() -> None:
    class Agent:
        async def __call__(self, x: int) -> int:
            return await double(x)

    class Awaitable:
        def __await__(self) -> Any:
            yield from checkpoint().__await__()
            return 6

    loop = AgentLoop()
    assert (await loop.run_single("a", partial(double, 3))).output == 6
    assert (await loop.run_single("a", Agent(), 3)).output == 6
    assert (await loop.run_single("a", lambda x: double(x), 3)).output == 6
    assert (await loop.run_single("a", Awaitable)).output == 6


async def test_function_that_is_not_async_is_refused_with_a_hint_and_not_retried() -> None:
    loop, calls = AgentLoop(), []
    result = await loop.run_single("a", lambda: calls.append(1))
    assert isinstance(result.exception, TypeError)
    assert "pass an async function" in str(result.exception)
    assert len(calls) == 1
    assert "run_streaming" in str((await loop.run_single("a", count, 1)).error)
    with pytest.raises(TypeError, match="must be an async function, got 42"):
        await loop.run_single("a", 42)

    with pytest.raises(TypeError, match="not fn\\(x\\) but fn, x"):
        await loop.run_single("a", double(1))


async def test_failure_is_data_and_carries_the_very_exception() -> None:
    error = ValueError("boom")
    result = await make_loop().run_single("a", FakeAgent(error))
    assert result.exception is error
    assert (result.status, result.error, result.failures) == (Status.ERROR, "ValueError: boom", (error,))


@pytest.mark.parametrize("verb", ["run_single", "run_all"])
async def test_traceback_begins_in_the_agent(verb: str) -> None:
    class Awaitable:
        def __await__(self) -> Any:
            raise ValueError

    async def agent() -> None:
        raise ValueError

    for fn, code in ((agent, agent.__code__), (Awaitable, Awaitable.__await__.__code__)):
        [result] = await run(verb, make_loop(), [Invocation("a", fn)])
        assert result.exception is not None
        traceback = result.exception.__traceback__
        assert traceback is not None
        assert traceback.tb_frame.f_code is code


async def test_failures_are_retried_after_a_growing_backoff() -> None:
    agent = FakeAgent(OSError("1"), OSError("2"), OSError("3"), Reply("done"))
    start = anyio.current_time()
    result = await make_loop(max_retries=3).run_single("a", agent)
    assert result.output == "done"
    assert [call.started_at - start for call in agent.calls] == pytest.approx([0, 1, 3, 7])
    assert result.retries == 3
    assert [str(error) for error in result.failures] == ["1", "2", "3"]
    assert result.latency_ms == pytest.approx(7000)


@pytest.mark.parametrize(("retries", "failures"), [(2, 3), (0, 1)])
async def test_retries_end_after_max_retries(retries: int, failures: int) -> None:
    errors = [OSError(), FakeHTTPError(500), OSError()]
    result = await make_loop(max_retries=retries).run_single("a", FakeAgent(*errors, Reply()))
    assert (result.status, result.retries) == (Status.ERROR, retries)
    assert result.failures == tuple(errors[:failures])
    assert result.exception is errors[failures - 1]


@pytest.mark.parametrize("kind", [VerdictKind.PERMANENT, VerdictKind.FATAL])
async def test_permanent_and_fatal_failures_are_not_retried(kind: VerdictKind) -> None:
    agent = FakeAgent(OSError("x"), Reply())
    result = await AgentLoop(LoopConfig(classify=lambda _: Verdict(kind))).run_single("a", agent)
    assert (result.status, result.retries, len(agent.calls)) == (Status.ERROR, 0, 1)


async def test_retry_after_is_a_floor_raised_by_at_most_a_quarter() -> None:
    agent = FakeAgent(*[FakeHTTPError(429, 10)] * 20, Reply())
    await AgentLoop().run_single("a", agent)
    starts = [call.started_at for call in agent.calls]
    waits = [b - a for a, b in itertools.pairwise(starts)]
    assert len(waits) == 20
    assert all(10 <= wait <= 12.5 + 20 for wait in waits)
    assert len(set(waits)) > 1


async def test_overload_retries_do_not_count_towards_max_retries() -> None:
    agent = FakeAgent(*[FakeHTTPError(529)] * 8, OSError(), Reply("done"))
    result = await AgentLoop(LoopConfig(max_retries=1, backoff=PLAIN)).run_single("a", agent)
    assert (result.output, result.retries) == ("done", 9)
    assert (await make_loop().run_single("a", FakeAgent(FakeHTTPError(429), Reply()))).retries == 0


async def test_overload_is_retried_until_its_own_time_is_up() -> None:
    loop = AgentLoop(LoopConfig(backoff=PLAIN, overload_timeout_seconds=100))
    start = anyio.current_time()
    result = await loop.run_single("a", FakeAgent(FakeHTTPError(429)))
    assert result.status is Status.ERROR
    assert 70 <= anyio.current_time() - start <= 100
    assert result.exception is not None
    assert "overload_timeout_seconds=100" in result.exception.__notes__[0]


async def test_attempt_is_timed_out_and_retried() -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=0.5, max_retries=2, backoff=PLAIN))
    result = await loop.run_single("a", SLOW)
    assert (result.status, result.retries, result.error) == (Status.TIMEOUT, 2, "Timeout after 0.5s")
    assert isinstance(result.exception, InvocationTimeout)
    assert isinstance(result.exception, TimeoutError)
    assert result.failures[-1] is result.exception
    assert result.latency_ms == pytest.approx(1500 + 100 + 200)
    result = await loop.with_config(retry_on_timeout=False).run_single("a", SLOW)
    assert (result.status, result.retries, len(result.failures)) == (Status.TIMEOUT, 0, 1)


async def test_time_out_is_visible_inside_the_agent() -> None:
    async def agent() -> float:
        return anyio.current_effective_deadline() - anyio.current_time()

    loop = AgentLoop(LoopConfig(timeout_seconds=7, total_timeout_seconds=9))
    assert (await loop.run_single("a", agent)).output == pytest.approx(7)
    total = loop.with_config(timeout_seconds=None)
    assert (await total.run_single("a", agent)).output == pytest.approx(9)
    unlimited = total.with_config(total_timeout_seconds=None)
    assert (await unlimited.run_single("a", agent)).output == math.inf


@each_verb
async def test_time_out_error_of_the_agent_is_an_error(verb: str) -> None:
    async def agent() -> None:
        with anyio.fail_after(1):
            await anyio.sleep(2)

    loop = make_loop(timeout_seconds=9, total_timeout_seconds=10, idle_timeout_seconds=8)
    [result] = await run(verb, loop, [Invocation("a", agent_for(verb, agent))])
    assert (result.status, type(result.exception)) == (Status.ERROR, TimeoutError)


async def test_error_before_the_deadline_is_the_agents_own() -> None:
    agent = FakeAgent(Fail(ValueError("mine"), after_seconds=0.5))
    assert (await make_loop(timeout_seconds=0.6).run_single("a", agent)).error == "ValueError: mine"


async def wraps() -> None:
    try:
        await anyio.sleep_forever()
    except BaseException as exc:
        raise ConnectionError("lost") from exc


async def fails_in_its_cleanup() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        raise OSError("cleanup")


async def fails_in_a_group() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(fails_in_its_cleanup)
        await anyio.sleep_forever()


CONVERTERS = [(wraps, ConnectionError), (fails_in_its_cleanup, OSError), (fails_in_a_group, Exception)]


@pytest.mark.parametrize(("agent", "cause"), CONVERTERS)
async def test_error_made_out_of_our_time_out_is_a_time_out_chained_to_it(agent: Any, cause: Any) -> None:
    result = await make_loop(timeout_seconds=1).run_single("a", agent)
    assert (result.status, result.error) == (Status.TIMEOUT, "Timeout after 1s")
    assert isinstance(result.exception, InvocationTimeout)
    assert isinstance(result.exception.__cause__, cause)


async def test_result_that_was_ready_is_kept() -> None:
    async def swallows() -> str:
        try:
            await anyio.sleep(10)
        except BaseException:
            return "kept"

        return "never"

    result = await AgentLoop(LoopConfig(timeout_seconds=1)).run_single("a", swallows)
    assert (result.status, result.output) == (Status.SUCCESS, "kept")


async def test_exception_group_of_the_agent_stays_what_it_is() -> None:
    async def agent() -> None:
        async with anyio.create_task_group():
            raise KeyError("k")

    result = await make_loop().run_single("a", agent)
    assert result.status is Status.ERROR
    assert pytest.RaisesGroup(KeyError).matches(result.exception)


@each_verb
async def test_stray_cancellation_is_one_cancelled_result(verb: str) -> None:
    stray = await stray_cancellation()
    agent = FakeAgent(stray)
    [result] = await run(verb, make_loop(max_retries=3), [Invocation("a", agent_for(verb, agent))])
    assert (result.status, result.retries) == (Status.CANCELLED, 0)
    assert isinstance(result.exception, InvocationCancelled)
    assert result.exception.__cause__ is stray


async def test_stray_cancellation_in_a_group_with_errors_is_an_error() -> None:
    mixed = BaseExceptionGroup("mixed", [await stray_cancellation(), ValueError("v")])
    result = await make_loop().run_single("a", FakeAgent(mixed))
    assert result.status is Status.ERROR
    assert pytest.RaisesGroup(ValueError).matches(result.exception)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupts_propagate_and_leave_nothing(kind: type[BaseException]) -> None:
    loop = AgentLoop()
    with pytest.raises(kind):
        await loop.run_single("a", FakeAgent(kind))

    with pytest.RaisesGroup(ValueError, kind):
        await loop.run_single("a", FakeAgent(BaseExceptionGroup("mixed", [ValueError(), kind()])))

    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 2


async def test_total_time_out_covers_attempts_and_waits() -> None:
    start = anyio.current_time()
    loop = make_loop(max_retries=3, total_timeout_seconds=5, timeout_seconds=2)
    result = await loop.run_single("a", SLOW)
    assert anyio.current_time() - start == pytest.approx(5)
    assert (result.status, result.retries) == (Status.TIMEOUT, 1)
    assert result.error == "Timeout after 5s in total"


@pytest.mark.parametrize(
    ("total", "deadline", "note"), [(5, 9, "total_timeout_seconds=5"), (None, 5, "the caller's deadline")]
)
async def test_wait_beyond_the_nearest_deadline_is_not_begun(
    total: float | None, deadline: float, note: str
) -> None:
    config = LoopConfig(total_timeout_seconds=total, backoff=Backoff(initial_seconds=6, jitter="none"))
    start = anyio.current_time()
    with anyio.fail_after(deadline):
        result = await AgentLoop(config).run_single("a", FakeAgent(OSError("x")))

    assert anyio.current_time() == start
    assert (result.status, result.error, result.retries) == (Status.ERROR, "OSError: x", 0)
    assert result.exception is not None
    assert note in result.exception.__notes__[0]


# The slot is free later, or in the moment in which the time is up.
@pytest.mark.parametrize("other", [20, 4.5])
@pytest.mark.parametrize("verb", ["run_single", "run_all"])
async def test_total_time_out_ends_the_wait_for_a_slot(verb: str, other: float) -> None:
    loop = make_loop(max_retries=1, max_concurrency=1, total_timeout_seconds=5)
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(run_into, results, verb, loop, [Invocation("a", FakeAgent(OSError("x")))])
        await anyio.sleep(0.5)
        await loop.with_config(total_timeout_seconds=None).run_single("b", anyio.sleep, other)

    assert (results[0].status, results[0].error) == (Status.TIMEOUT, "Timeout after 5s in total")
    assert results[0].latency_ms == pytest.approx(5000)
    assert isinstance(results[0].exception.__cause__, OSError)
    assert results[0].retries == 0


async def test_too_long_a_retry_after_fails_at_once_and_says_so_once() -> None:
    start = anyio.current_time()
    agent = FakeAgent(FakeHTTPError(429, 301))
    for _ in range(3):
        result = await AgentLoop().run_single("a", agent)
        assert (result.status, result.retries) == (Status.ERROR, 0)
        assert result.exception is not None
        [note] = result.exception.__notes__
        assert "301s, which is more than max_retry_after_seconds=300" in note

    assert anyio.current_time() == start


async def test_queue_time_is_the_wait_for_the_first_slot() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "first", anyio.sleep, 3)
        await anyio.wait_all_tasks_blocked()
        result = await loop.run_single("second", anyio.sleep, 1)

    assert (result.queue_ms, result.latency_ms) == (pytest.approx(3000), pytest.approx(1000))


async def test_slots_are_granted_first_come_first_served() -> None:
    loop, order = AgentLoop(LoopConfig(max_concurrency=1)), []

    async def agent(name: int) -> None:
        order.append(name)
        await anyio.sleep(1)

    async with anyio.create_task_group() as group:
        for name in range(10):
            group.start_soon(loop.run_single, str(name), agent, name)
            await anyio.wait_all_tasks_blocked()

        now = loop.statistics()
        assert (now.running, now.waiting, now.max_concurrency) == (1, 9, 1)
        assert repr(loop) == "<AgentLoop 1 running, 9 waiting, limit 1>"

    assert order == list(range(10))


async def test_invocation_that_waits_to_retry_holds_no_slot() -> None:
    loop = make_loop(max_retries=1, max_concurrency=1, backoff=Backoff(initial_seconds=20, jitter="none"))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "flaky", FakeAgent(OSError(), Reply()))
        await anyio.wait_all_tasks_blocked()
        now = loop.statistics()
        assert (now.running, now.waiting) == (0, 1)
        with anyio.fail_after(1):
            await loop.run_single("other", double, 1)


async def test_every_call_reaches_a_checkpoint() -> None:
    loop, turns = AgentLoop(), 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        for _ in range(10):
            await loop.run_single("a", nothing)

        group.cancel_scope.cancel()

    assert turns >= 5


async def test_nothing_starts_in_a_cancelled_scope() -> None:
    agent = FakeAgent(Reply())
    with anyio.CancelScope() as scope:
        scope.cancel()
        await AgentLoop().run_single("a", agent)

    assert scope.cancelled_caught
    assert agent.calls == []


async def test_cancelling_the_caller_cancels_the_agent_and_propagates() -> None:
    loop, agent = AgentLoop(), FakeAgent(Stall())
    with anyio.move_on_after(1) as scope:
        await loop.run_single("a", agent)

    assert scope.cancelled_caught
    assert [call.cancelled for call in agent.calls] == [True]
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


@pytest.mark.parametrize(("agent", "cause"), CONVERTERS)
async def test_error_made_out_of_the_callers_cancellation_is_that_cancellation(
    agent: Any, cause: Any
) -> None:
    judged: list[Exception] = []

    def classify(exc: Exception) -> Verdict:
        judged.append(exc)
        return Verdict(VerdictKind.TRANSIENT)

    with anyio.move_on_after(1) as scope:
        await AgentLoop(LoopConfig(classify=classify)).run_single("a", agent)

    assert scope.cancelled_caught
    assert not judged


async def test_more_at_once_than_scopes_are_kept_for() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=150))
    outputs: list[Any] = []

    async def call(x: int) -> None:
        outputs.append((await loop.run_single("a", double, x)).output)

    for _ in range(2):
        async with anyio.create_task_group() as group:
            for x in range(150):
                group.start_soon(call, x)

    assert sorted(outputs) == sorted([2 * x for x in range(150)] * 2)


async def test_retry_of_agents_that_never_wait_lets_others_run_once_and_not_again_at_the_end() -> None:
    order: list[str] = []

    async def other() -> None:
        order.append("other")

    async with anyio.create_task_group() as group:

        async def agent() -> None:
            order.append("agent")
            if len(order) == 1:
                raise OSError

            group.start_soon(other)

        result = await make_loop(max_retries=1, backoff=PLAIN).run_single("a", agent)
        order.append("result")

    assert result.retries == 1
    assert order == ["agent", "agent", "result", "other"]


async def test_single_that_has_ended_leaves_its_scope_to_the_next_one() -> None:
    loop = AgentLoop()
    options = RunOptions(loop.config, Observer(None, None))
    single = Single(Invocation("a", nothing), loop.limiter, options)
    await single.run()
    scope = pool_of(loop.limiter).loop.spare[-1]
    until = anyio.current_time() + 100
    scope.begin(until)
    single.wind_down(BatchStopped("drained"), until - 50)
    assert scope.scope is not None
    assert scope.scope.deadline == until
    scope.leave()
