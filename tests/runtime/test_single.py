"""run_single: one invocation, in its caller's task."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Backoff,
    InvocationCancelled,
    InvocationTimeout,
    LoopConfig,
    Status,
    Verdict,
    VerdictKind,
)

PLAIN = Backoff(jitter="none")


async def double(x: int) -> int:
    await checkpoint()
    return 2 * x


class HttpError(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status_code = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Flaky:
    """Raises the given errors, one at each call, and then returns."""

    def __init__(self, *errors: Exception, seconds: float = 0) -> None:
        self.errors = list(errors)
        self.seconds = seconds
        self.calls: list[float] = []

    async def __call__(self) -> str:
        self.calls.append(anyio.current_time())
        await anyio.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)

        return "done"


async def test_what_the_agent_returns_is_the_output() -> None:
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


async def test_what_is_no_async_callable_is_refused_with_a_hint_and_not_retried() -> None:
    loop, calls = AgentLoop(), []

    def plain() -> int:
        calls.append(1)
        return 1

    async def generator() -> Any:
        yield 1

    result = await loop.run_single("a", plain)
    assert isinstance(result.exception, TypeError)
    assert "pass an async function" in str(result.exception)
    assert len(calls) == 1
    result = await loop.run_single("a", generator)
    assert "run_streaming" in str(result.error)
    with pytest.raises(TypeError, match="must be an async function, got 42"):
        await loop.run_single("a", 42)

    with pytest.raises(TypeError, match="not fn\\(x\\) but fn, x"):
        await loop.run_single("a", double(1))


async def test_failure_is_data_and_carries_the_very_exception() -> None:
    error = ValueError("boom")
    result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", Flaky(error))
    assert result.exception is error
    assert (result.status, result.error, result.failures) == (Status.ERROR, "ValueError: boom", (error,))


async def test_traceback_begins_in_the_agent() -> None:
    class Awaitable:
        def __await__(self) -> Any:
            raise ValueError

    async def agent() -> None:
        raise ValueError

    for fn, code in ((agent, agent.__code__), (Awaitable, Awaitable.__await__.__code__)):
        result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", fn)
        assert result.exception is not None
        traceback = result.exception.__traceback__
        assert traceback is not None
        assert traceback.tb_frame.f_code is code


async def test_failures_are_retried_after_a_growing_backoff() -> None:
    agent = Flaky(OSError("1"), OSError("2"), OSError("3"))
    loop = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=1, jitter="none")))
    start = anyio.current_time()
    result = await loop.run_single("a", agent)
    assert result.output == "done"
    assert [at - start for at in agent.calls] == pytest.approx([0, 1, 3, 7])
    assert result.retries == 3
    assert [str(error) for error in result.failures] == ["1", "2", "3"]
    assert result.latency_ms == pytest.approx(7000)


async def test_retries_end_after_max_retries() -> None:
    errors = [OSError(str(i)) for i in range(9)]
    result = await AgentLoop(LoopConfig(max_retries=2)).run_single("a", Flaky(*errors))
    assert (result.status, result.retries) == (Status.ERROR, 2)
    assert result.failures == tuple(errors[:3])
    assert result.exception is errors[2]


@pytest.mark.parametrize("kind", [VerdictKind.PERMANENT, VerdictKind.FATAL])
async def test_permanent_and_fatal_failures_are_not_retried(kind: VerdictKind) -> None:
    agent = Flaky(OSError("x"))
    result = await AgentLoop(LoopConfig(classify=lambda _: Verdict(kind))).run_single("a", agent)
    assert (result.status, result.retries, len(agent.calls)) == (Status.ERROR, 0, 1)


async def test_retry_after_is_a_floor_raised_by_at_most_a_quarter() -> None:
    agent = Flaky(*(HttpError(429, retry_after="10") for _ in range(20)))
    await AgentLoop().run_single("a", agent)
    waits = [b - a for a, b in zip(agent.calls, agent.calls[1:], strict=False)]
    assert len(waits) == 20
    assert all(10 <= wait <= 12.5 + 20 for wait in waits)
    assert len(set(waits)) > 1


async def test_too_long_a_retry_after_fails_at_once_and_says_so() -> None:
    start = anyio.current_time()
    result = await AgentLoop().run_single("a", Flaky(HttpError(429, retry_after="301")))
    assert (result.status, result.retries) == (Status.ERROR, 0)
    assert anyio.current_time() == start
    assert result.exception is not None
    assert "301s, which is more than max_retry_after_seconds=300" in result.exception.__notes__[0]


async def test_overload_retries_do_not_count_towards_max_retries() -> None:
    agent = Flaky(*(HttpError(529) for _ in range(8)), OSError(), seconds=0)
    result = await AgentLoop(LoopConfig(max_retries=1, backoff=PLAIN)).run_single("a", agent)
    assert (result.output, result.retries) == ("done", 9)


async def test_overload_is_retried_until_its_own_time_is_up() -> None:
    agent = Flaky(*(HttpError(429) for _ in range(1000)))
    loop = AgentLoop(LoopConfig(backoff=PLAIN, overload_timeout_seconds=100))
    start = anyio.current_time()
    result = await loop.run_single("a", agent)
    assert result.status is Status.ERROR
    assert 70 <= anyio.current_time() - start <= 100
    assert result.exception is not None
    assert "overload_timeout_seconds=100" in result.exception.__notes__[0]


async def test_zero_max_retries_means_none_of_any_kind() -> None:
    for error in (OSError(), HttpError(429), HttpError(500)):
        agent = Flaky(error)
        assert (await AgentLoop(LoopConfig(max_retries=0)).run_single("a", agent)).retries == 0
        assert len(agent.calls) == 1


async def test_attempt_is_timed_out_and_retried() -> None:
    agent = Flaky(seconds=10)
    loop = AgentLoop(LoopConfig(timeout_seconds=0.5, max_retries=2, backoff=PLAIN))
    result = await loop.run_single("a", agent)
    assert (result.status, result.retries, result.error) == (Status.TIMEOUT, 2, "Timeout after 0.5s")
    assert isinstance(result.exception, InvocationTimeout)
    assert isinstance(result.exception, TimeoutError)
    assert result.failures[-1] is result.exception
    assert result.latency_ms == pytest.approx(1500 + 100 + 200)


async def test_time_outs_are_not_retried_where_that_is_switched_off() -> None:
    agent = Flaky(seconds=10)
    result = await AgentLoop(LoopConfig(timeout_seconds=1, retry_on_timeout=False)).run_single("a", agent)
    assert (result.status, len(agent.calls)) == (Status.TIMEOUT, 1)


async def test_time_out_is_visible_inside_the_agent() -> None:
    async def agent() -> float:
        return anyio.current_effective_deadline() - anyio.current_time()

    loop = AgentLoop(LoopConfig(timeout_seconds=7, total_timeout_seconds=9))
    assert (await loop.run_single("a", agent)).output == pytest.approx(7)
    total = loop.with_config(timeout_seconds=None)
    assert (await total.run_single("a", agent)).output == pytest.approx(9)
    unlimited = total.with_config(total_timeout_seconds=None)
    assert (await unlimited.run_single("a", agent)).output == math.inf


async def test_time_out_error_of_the_agent_is_an_error() -> None:
    async def agent() -> None:
        with anyio.fail_after(1):
            await anyio.sleep(2)

    result = await AgentLoop(LoopConfig(timeout_seconds=10, max_retries=0)).run_single("a", agent)
    assert result.status is Status.ERROR
    assert type(result.exception) is TimeoutError


async def test_error_before_the_deadline_is_the_agents_own() -> None:
    async def agent() -> None:
        await anyio.sleep(0.5)
        raise ValueError("mine")

    result = await AgentLoop(LoopConfig(timeout_seconds=0.6, max_retries=0)).run_single("a", agent)
    assert result.error == "ValueError: mine"


async def test_error_made_out_of_our_time_out_is_a_time_out_chained_to_it() -> None:
    async def wraps() -> None:
        try:
            await anyio.sleep(10)
        except BaseException as exc:
            raise ConnectionError("lost") from exc

    async def fails_in_finally() -> None:
        try:
            await anyio.sleep(10)
        finally:
            raise OSError("cleanup")

    async def fails_in_a_group() -> None:
        async def child() -> None:
            try:
                await anyio.sleep(10)
            finally:
                raise OSError("child")

        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await anyio.sleep(10)

    loop = AgentLoop(LoopConfig(timeout_seconds=1, max_retries=0))
    for agent, cause in (
        (wraps, ConnectionError),
        (fails_in_finally, OSError),
        (fails_in_a_group, Exception),
    ):
        result = await loop.run_single("a", agent)
        assert result.status is Status.TIMEOUT, agent
        assert result.error == "Timeout after 1s"
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

    result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", agent)
    assert result.status is Status.ERROR
    assert pytest.RaisesGroup(KeyError).matches(result.exception)


async def test_stray_cancellation_is_one_cancelled_result() -> None:
    async def agent() -> None:
        raise anyio.get_cancelled_exc_class()("stray") if is_asyncio() else await stored_cancellation()

    result = await AgentLoop().run_single("a", agent)
    assert result.status is Status.CANCELLED
    assert result.retries == 0
    assert isinstance(result.exception, InvocationCancelled)
    assert isinstance(result.exception.__cause__, anyio.get_cancelled_exc_class())


def is_asyncio() -> bool:
    return anyio.get_cancelled_exc_class() is asyncio.CancelledError


async def stored_cancellation() -> BaseException:
    """Return a cancellation that has been caught, and is over."""
    stored: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except BaseException as exc:
            stored = exc
            raise

    assert stored is not None
    return stored


async def test_stray_cancellation_in_a_group_with_errors_is_an_error() -> None:
    cancellation = asyncio.CancelledError() if is_asyncio() else await stored_cancellation()

    async def agent() -> None:
        raise BaseExceptionGroup("mixed", [cancellation, ValueError("v")])

    result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", agent)
    assert result.status is Status.ERROR
    assert pytest.RaisesGroup(ValueError).matches(result.exception)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupts_propagate_and_leave_nothing(kind: type[BaseException]) -> None:
    async def agent() -> None:
        await checkpoint()
        raise kind

    async def raises_a_group() -> None:
        raise BaseExceptionGroup("mixed", [ValueError(), kind()])

    loop = AgentLoop()
    with pytest.raises(kind):
        await loop.run_single("a", agent)

    with pytest.RaisesGroup(ValueError, kind):
        await loop.run_single("a", raises_a_group)

    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 2


async def test_total_time_out_covers_attempts_and_waits() -> None:
    loop = AgentLoop(
        LoopConfig(
            total_timeout_seconds=5, timeout_seconds=2, backoff=Backoff(initial_seconds=1, jitter="none")
        )
    )
    start = anyio.current_time()
    result = await loop.run_single("a", Flaky(seconds=10))
    assert anyio.current_time() - start == pytest.approx(5)
    assert (result.status, result.retries) == (Status.TIMEOUT, 1)
    assert result.error == "Timeout after 5s in total"


async def test_wait_beyond_the_total_time_out_is_not_begun() -> None:
    config = LoopConfig(total_timeout_seconds=5, backoff=Backoff(initial_seconds=6, jitter="none"))
    start = anyio.current_time()
    result = await AgentLoop(config).run_single("a", Flaky(OSError("x")))
    assert anyio.current_time() == start
    assert (result.status, result.error, result.retries) == (Status.ERROR, "OSError: x", 0)
    assert result.exception is not None
    assert "total_timeout_seconds=5" in result.exception.__notes__[0]


async def test_wait_beyond_the_callers_deadline_is_not_begun() -> None:
    loop = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=10, jitter="none")))
    with anyio.fail_after(5):
        result = await loop.run_single("a", Flaky(OSError("x")))

    assert result.error == "OSError: x"
    assert result.exception is not None
    assert "the caller's deadline" in result.exception.__notes__[0]


async def test_total_time_out_ends_the_wait_for_a_slot() -> None:
    loop = AgentLoop(
        LoopConfig(
            max_concurrency=1, total_timeout_seconds=5, backoff=Backoff(initial_seconds=1, jitter="none")
        )
    )
    results: list[Any] = []

    async def first() -> None:
        results.append(await loop.run_single("a", Flaky(OSError("x"))))

    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await anyio.sleep(0.5)
        await loop.with_config(total_timeout_seconds=None).run_single("b", anyio.sleep, 20)

    assert results[0].status is Status.TIMEOUT
    assert results[0].latency_ms == pytest.approx(5000)
    assert isinstance(results[0].exception.__cause__, OSError)
    assert results[0].retries == 0


async def test_classify_that_fails_makes_the_failure_permanent_and_says_so() -> None:
    def broken(exc: Exception) -> Verdict:
        raise RuntimeError("in classify")

    for classify in (broken, lambda _: None):
        agent = Flaky(OSError("x"))
        result = await AgentLoop(LoopConfig(classify=classify)).run_single("a", agent)
        assert (result.error, len(agent.calls)) == ("OSError: x", 1)
        assert result.exception is not None
        assert "classify failed" in result.exception.__notes__[0]


async def test_notes_are_not_repeated_on_a_shared_exception() -> None:
    error = HttpError(429, retry_after="1000")
    loop = AgentLoop()
    for _ in range(3):
        await loop.run_single("a", Flaky(error))

    assert len(error.__notes__) == 1


async def test_queue_time_is_the_wait_for_the_first_slot() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "first", anyio.sleep, 3)
        await anyio.wait_all_tasks_blocked()
        result = await loop.run_single("second", anyio.sleep, 1)

    assert result.queue_ms == pytest.approx(3000)
    assert result.latency_ms == pytest.approx(1000)


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
    loop = AgentLoop(LoopConfig(max_concurrency=1, backoff=Backoff(initial_seconds=20, jitter="none")))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "flaky", Flaky(OSError()))
        await anyio.wait_all_tasks_blocked()
        now = loop.statistics()
        assert (now.running, now.waiting) == (0, 1)
        with anyio.fail_after(1):
            await loop.run_single("other", double, 1)


async def test_every_call_reaches_a_checkpoint() -> None:
    async def never_waits() -> int:
        return 1

    loop, turns = AgentLoop(), 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        for _ in range(10):
            await loop.run_single("a", never_waits)

        group.cancel_scope.cancel()

    assert turns >= 5


async def test_nothing_starts_in_a_cancelled_scope() -> None:
    agent = Flaky()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await AgentLoop().run_single("a", agent)

    assert scope.cancelled_caught
    assert agent.calls == []


async def test_cancelling_the_caller_cancels_the_agent_and_propagates() -> None:
    cleaned = False

    async def agent() -> None:
        nonlocal cleaned
        try:
            await anyio.sleep_forever()
        finally:
            cleaned = True

    loop = AgentLoop()
    with anyio.move_on_after(1) as scope:
        await loop.run_single("a", agent)

    assert scope.cancelled_caught
    assert cleaned
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


async def test_error_made_out_of_the_callers_cancellation_is_that_cancellation() -> None:
    async def agent() -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as exc:
            raise ConnectionError from exc

    calls = 0

    def classify(exc: Exception) -> Verdict:
        nonlocal calls
        calls += 1
        return Verdict(VerdictKind.TRANSIENT)

    with anyio.move_on_after(1) as scope:
        await AgentLoop(LoopConfig(classify=classify)).run_single("a", agent)

    assert scope.cancelled_caught
    assert calls == 0


async def test_group_of_cancellation_and_error_under_the_callers_cancellation_is_that_cancellation() -> None:
    async def agent() -> None:
        async def child() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError

        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await anyio.sleep_forever()

    with anyio.move_on_after(1) as scope:
        await AgentLoop().run_single("a", agent)

    assert scope.cancelled_caught


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
