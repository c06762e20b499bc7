"""Bounded lines: how many may wait for a slot, and for how long."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import anyio
import attrs
import pytest
from agents import backends, into, launch, on_asyncio, run_scheduled, run_stream
from hypothesis import given
from hypothesis import strategies as st

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Invocation,
    InvocationResult,
    InvocationTimeout,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    MetricsRecorder,
    QueueFull,
    QueueTimeout,
    Rate,
    Status,
    Verdict,
    VerdictKind,
    classify,
)
from agentloop.testing import Fail, FakeAgent, FakeHTTPError, Reply

Call = Callable[[AgentLoop, float], Awaitable[InvocationResult[Any]]]


async def agent(seconds: float) -> float:
    await anyio.sleep(seconds)
    return seconds


async def chunks(seconds: float) -> AsyncIterator[float]:
    await anyio.sleep(seconds)
    yield seconds


async def single(loop: AgentLoop, seconds: float) -> InvocationResult[Any]:
    return await loop.run_single("single", agent, seconds)


async def stream(loop: AgentLoop, seconds: float) -> InvocationResult[Any]:
    _, error, result = await run_stream(loop, chunks, seconds)
    assert result.exception is error
    return result


async def stream_of_loop(loop: AgentLoop, seconds: float) -> InvocationResult[Any]:
    async with loop:
        return await stream(loop, seconds)


every_call = pytest.mark.parametrize("call", [single, stream])


async def together(
    loop: AgentLoop, calls: Iterable[Call], seconds: float = 10
) -> list[InvocationResult[Any]]:
    """Start calls in one moment, and return their results in the order in which they ended."""
    results: list[InvocationResult[Any]] = []
    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(into, results, call, loop, seconds)

    return results


def statuses(results: Iterable[InvocationResult[Any]]) -> list[str]:
    return [str(result.status) for result in results]


# --- how many may wait


@pytest.mark.parametrize(("bad", "error"), [(-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_bound_that_is_no_whole_number_from_0_on_is_refused(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_waiting must be"):
        Limiter(1, max_waiting=bad)


@every_call
async def test_more_calls_than_may_run_or_wait_are_refused_in_the_same_moment(call: Call) -> None:
    waiting: list[int] = []
    limiter = Limiter(2, max_waiting=3)
    loop = AgentLoop(limiter=limiter, on_event=lambda _: waiting.append(limiter.statistics().waiting))
    for _ in range(2):  # no place is lost in between
        began = anyio.current_time()
        results: list[InvocationResult[Any]] = []
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(into, results, call, loop, 10)

            await anyio.wait_all_tasks_blocked()
            assert anyio.current_time() == began
            assert statuses(results) == ["skipped"] * 5
            assert (limiter.statistics().running, limiter.statistics().waiting) == (2, 3)

        assert statuses(results[5:]) == ["success"] * 5
        full = results[0].exception
        assert isinstance(full, QueueFull)
        assert full.waiting == 3

    assert max(waiting) == 3


async def test_stream_has_its_place_from_entering_on() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=1))
    async with (
        loop.run_streaming("a", chunks, 1) as first,
        loop.run_streaming("b", chunks, 1) as second,
        loop.run_streaming("c", chunks, 1) as third,
    ):
        # Nothing else has run since.
        assert (loop.statistics().running, loop.statistics().waiting) == (1, 1)
        with pytest.raises(QueueFull):
            await anext(third)

        assert [await anext(first), await anext(second)] == [1, 1]


async def test_stream_of_an_entered_loop_is_refused_too() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=0))
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 5)
        assert (await stream_of_loop(loop, 1)).status is Status.SKIPPED


async def test_refused_call_is_recorded_as_skipped_and_has_no_durations() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=0))
    results = await together(loop, [single, stream, single])
    assert statuses(results) == ["skipped", "skipped", "success"]
    assert (results[0].queue_ms, results[0].latency_ms, results[0].failures) == (0, 0, ())
    snapshot = loop.metrics.snapshot()
    assert snapshot.counts[Status.SKIPPED] == 2
    assert (snapshot.latency.count, snapshot.queue.count) == (1, 1)


async def test_place_is_free_in_the_moment_in_which_one_is_granted_its_slot() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=1))
    statuses: list[Status] = []

    async def follow() -> None:
        await single(loop, 1)
        # The one that waited has its slot, and has not run yet.
        statuses.append((await single(loop, 1)).status)

    async with anyio.create_task_group() as group:
        await launch(group, follow)
        group.start_soon(single, loop, 1)

    assert statuses == [Status.SUCCESS]


async def test_nested_work_is_neither_refused_nor_counted() -> None:
    loop = AgentLoop(limiter=Limiter(2, max_waiting=1))

    async def outer() -> list[InvocationResult[Any]]:
        return await together(loop, [single, stream, single], 1)

    async def run(loop: AgentLoop, _: float) -> InvocationResult[Any]:
        return await loop.run_single("outer", outer)

    results = await together(loop, [run] * 5)
    assert sorted(statuses(results)) == ["skipped"] * 2 + ["success"] * 3
    inner = [each for result in results if result.success for each in result.unwrap()]
    assert statuses(inner) == ["success"] * 9


async def test_batches_are_neither_refused_nor_counted() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=1))
    results: list[list[InvocationResult[Any]]] = []
    async with anyio.create_task_group() as group:
        for _ in range(2):
            await launch(group, into, results, loop.run_all, [Invocation("batch", agent, (1,))] * 3)

        assert statuses(await together(loop, [single] * 2, 1)) == ["skipped", "success"]

    assert [statuses(batch) for batch in results] == [["success"] * 3] * 2


async def test_retry_waits_for_its_slot_though_the_line_is_full() -> None:
    loop = AgentLoop(RETRYING, limiter=Limiter(1, max_waiting=1))
    fails_once = FakeAgent(Fail(ValueError(), after_seconds=1), Reply("late", after_seconds=1))
    results: list[InvocationResult[Any]] = []
    async with anyio.create_task_group() as group:
        await launch(group, into, results, loop.run_single, "fails once", fails_once)
        group.start_soon(single, loop, 10)
        await anyio.sleep(1.5)
        group.start_soon(single, loop, 10)
        await anyio.sleep(1)
        assert loop.statistics().waiting == 2

    assert results[0].output == "late"


@every_call
@pytest.mark.parametrize("how", ["cancelled", "drained"])
async def test_one_that_gives_up_waiting_leaves_its_place(call: Call, how: str) -> None:
    limiter = Limiter(1, max_waiting=1)
    loop, drained = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        async with anyio.create_task_group() as waiting:
            await launch(waiting, call, drained, 1)
            assert (await call(loop, 1)).status is Status.SKIPPED
            if how == "cancelled":
                waiting.cancel_scope.cancel()
            else:
                drained.drain()

        assert limiter.statistics().waiting == 0
        assert (await call(loop, 1)).status is Status.SUCCESS


@every_call
@pytest.mark.parametrize("drained_first", [True, False])
@on_asyncio
async def test_native_cancellation_leaves_the_place(call: Call, drained_first: bool) -> None:
    limiter = Limiter(1, max_waiting=1)
    loop, drained = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        task = asyncio.ensure_future(call(drained, 1))
        await anyio.wait_all_tasks_blocked()
        if drained_first:
            drained.drain()

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert limiter.statistics().waiting == 0
        assert statuses(await together(loop, [call] * 2)) == ["skipped", "success"]


async def test_stream_that_is_left_in_the_moment_in_which_it_is_entered_leaves_its_place() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=1))
    for _ in range(3):
        async with loop.run_streaming("a", chunks, 1), loop.run_streaming("b", chunks, 1) as second:
            assert (loop.statistics().running, loop.statistics().waiting) == (1, 1)

        assert second.result.status is Status.SKIPPED
        assert (loop.statistics().running, loop.statistics().waiting) == (0, 0)


@pytest.mark.parametrize("waits", [True, False])
async def test_stream_of_a_loop_that_is_drained_in_the_same_moment_never_begins(waits: bool) -> None:
    limiter = Limiter(1)
    loop, other = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        if waits:
            await launch(group, single, other, 10)

        began = anyio.current_time()
        async with loop.run_streaming("a", chunks, 1) as reading:
            loop.drain()
            with pytest.raises(BatchStopped):
                await anext(reading)

        assert reading.result.status is Status.SKIPPED
        assert anyio.current_time() == began


@every_call
async def test_each_key_has_a_line_of_its_own(call: Call) -> None:
    limiter = KeyedLimiter(lambda invocation: invocation.args[0], lambda _: Limiter(1, max_waiting=1))
    loop, results = AgentLoop(limiter=limiter), []
    async with anyio.create_task_group() as group:
        for seconds in (1, 1, 1, 2, 2, 2):
            group.start_soon(into, results, call, loop, seconds)

    assert statuses(results) == ["skipped"] * 2 + ["success"] * 4


class Interrupted(BaseException):
    """What is no error of an agent's, as KeyboardInterrupt is none."""


async def test_interrupt_by_a_key_function_leaves_no_stream_behind() -> None:
    def by(invocation: Invocation[Any]) -> str:
        raise Interrupted

    loop = AgentLoop(limiter=KeyedLimiter(by, lambda _: Limiter(1)))
    with pytest.raises(Interrupted):
        async with loop.run_streaming("a", chunks, 1):
            pass

    async with loop:
        with pytest.raises(Interrupted):
            async with loop.run_streaming("a", chunks, 1):
                pass


async def test_key_function_that_fails_or_drains_ends_the_stream() -> None:
    def by(invocation: Invocation[Any]) -> str:
        if invocation.args[0] == 1:
            raise LookupError("no key")

        if invocation.args[0] == 2:
            loop.drain("enough", grace_seconds=1)

        return "key"

    limiter = KeyedLimiter(by, lambda _: Limiter(1))
    loop = AgentLoop(limiter=limiter)
    async with loop.run_streaming("a", chunks, 1) as failing:
        with pytest.raises(LookupError):
            await anext(failing)

    assert failing.result.status is Status.ERROR
    async with anyio.create_task_group() as group:
        await launch(group, single, AgentLoop(limiter=limiter), 10)
        began = anyio.current_time()
        assert str((await stream(loop, 2)).exception) == "the batch was stopped: enough"
        assert anyio.current_time() == began


# --- what the error says


def test_error_says_how_many_wait_and_when_to_come_back() -> None:
    assert str(QueueFull(3)) == "max_waiting=3 invocations are waiting already"
    full = QueueFull(3, 2.5)
    assert str(full) == "max_waiting=3 invocations are waiting already, try again in 2.5s"
    copy = pickle.loads(pickle.dumps(full))
    assert (type(copy), copy.waiting, copy.retry_after_seconds) == (QueueFull, 3, 2.5)
    assert classify(full) == Verdict(VerdictKind.TRANSIENT, 2.5)
    assert classify(QueueFull(3)) == classify(QueueTimeout(3)) == Verdict(VerdictKind.TRANSIENT)


async def estimate(loop: AgentLoop) -> float | None:
    full = (await single(loop, 1)).exception
    assert isinstance(full, QueueFull)
    return full.retry_after_seconds


async def test_estimate_is_that_of_the_attempts_which_have_ended_lately() -> None:
    limiter = Limiter(2, max_waiting=3)
    loop = AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        await launch(group, together, loop, [single] * 5, 10)
        assert await estimate(loop) is None
        await anyio.sleep(15)
        # Two have ended, two run, and one waits.
        await launch(group, together, loop, [stream] * 2, 20)
        assert await estimate(loop) == 4 * 10 / 2
        limiter.pause()
        assert await estimate(loop) is None
        limiter.resume()


@pytest.mark.parametrize("adaptive", [True, False])
async def test_estimate_follows_what_has_changed(adaptive: bool) -> None:
    loop = AgentLoop(limiter=Limiter(1, adaptive=adaptive, max_waiting=0))
    for seconds in (*[1] * 100, *[3] * 100):
        await single(loop, seconds)

    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        assert await estimate(loop) == pytest.approx(3, rel=0.01)


async def test_idle_time_and_nested_attempts_do_not_count() -> None:
    loop = AgentLoop(limiter=Limiter(1, max_waiting=0))

    async def outer() -> None:
        for _ in range(10):
            await single(loop, 1)

    await loop.run_single("outer", outer)
    await anyio.sleep(1000)
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 5)
        assert await estimate(loop) == 10


async def test_estimate_lasts_until_a_cool_off_ends_and_a_rate_lets_it_start() -> None:
    config = LoopConfig(max_retries=0)
    loop = AgentLoop(config, limiter=Limiter(1, max_waiting=0))
    await loop.run_single("told", FakeAgent(Fail(FakeHTTPError(429, retry_after=60), after_seconds=1)))
    assert await estimate(loop) == 60
    rated = AgentLoop(config, limiter=Limiter(9, rates=[Rate(1, per_seconds=50)], max_waiting=0))
    await single(rated, 20)
    assert await estimate(rated) == 30


async def test_outer_agent_that_is_refused_comes_back_when_it_is_told() -> None:
    inner = AgentLoop(limiter=Limiter(1, max_waiting=0))
    outer = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=0.01)))
    await single(inner, 8)

    async def ask() -> Any:
        return (await inner.run_single("inner", agent, 1)).unwrap()

    async with anyio.create_task_group() as group:
        await launch(group, single, inner, 7)
        began = anyio.current_time()
        result = await outer.run_single("outer", ask)

    assert (result.output, result.retries) == (1, 1)
    assert 9 <= anyio.current_time() - began <= 9 + 8 / 4


# --- against an independent account


@attrs.define(eq=False)
class Held:
    """A call, and what became of it by what its agent and its caller say."""

    scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)
    go: anyio.Event = attrs.field(factory=anyio.Event)
    state: str = "waiting"

    async def agent(self) -> None:
        self.state = "running"
        await self.go.wait()

    async def chunks(self) -> AsyncIterator[int]:
        await self.agent()
        yield 1

    async def call(self, loop: AgentLoop, as_stream: bool) -> None:
        state = "cancelled"
        with self.scope:
            if not as_stream:
                result = await loop.run_single("single", self.agent)
            else:
                async with loop.run_streaming("stream", self.chunks) as reading:
                    with suppress(QueueFull):
                        assert [chunk async for chunk in reading] == [1]

                result = reading.result

            state = "refused" if isinstance(result.exception, QueueFull) else str(result.status)

        self.state = state


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["single", "stream"]), st.integers(1, 6)),
        st.tuples(st.sampled_from(["end", "cancel"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["pause", "resume"]), st.just(0)),
        st.tuples(st.just("resize"), st.integers(1, 4)),
    ),
    max_size=15,
)


async def take(steps: list[tuple[str, int]], max_waiting: int) -> None:
    limit, paused = 2, False
    limiter = Limiter(limit, max_waiting=max_waiting)
    loop = AgentLoop(LoopConfig(timeout_seconds=None), limiter=limiter)
    calls: list[Held] = []

    def those(*states: str) -> list[Held]:
        return [call for call in calls if call.state in states]

    async with anyio.create_task_group() as group:
        for verb, number in [*steps, ("resume", 0)]:
            refused = len(those("refused"))
            live = those("waiting", "running")
            if verb in ("single", "stream"):
                waiting = len(those("waiting"))
                free = 0 if waiting or paused else max(0, limit - len(those("running")))
                refused += max(0, number - free - (max_waiting - waiting))
                for _ in range(number):
                    calls.append(Held())
                    group.start_soon(calls[-1].call, loop, verb == "stream")
            elif verb == "resize":
                limit = limiter.max_concurrency = number
            elif verb in ("pause", "resume"):
                paused = verb == "pause"
                (limiter.pause if paused else limiter.resume)()
            elif verb == "cancel" and live:
                live[number % len(live)].scope.cancel()
            elif verb == "end" and (running := those("running")):
                running[number % len(running)].go.set()

            await anyio.wait_all_tasks_blocked()
            now = limiter.statistics()
            assert (now.running, now.waiting) == (len(those("running")), len(those("waiting")))
            assert now.waiting <= max_waiting
            assert paused or not now.waiting or now.running >= limit
            assert len(those("refused")) == refused

        while live := those("waiting", "running"):
            for call in live:
                call.go.set()

            await anyio.wait_all_tasks_blocked()

    assert not limiter.statistics().running
    assert {call.state for call in calls} <= {"success", "refused", "cancelled"}


@pytest.mark.long
@backends
@given(steps=steps, max_waiting=st.integers(0, 3))
def test_calls_are_refused_as_an_account_says(
    backend: str, steps: list[tuple[str, int]], max_waiting: int
) -> None:
    run_scheduled(backend, None, take, steps, max_waiting)


# --- for how long one may wait


TIMED = LoopConfig(queue_timeout_seconds=3)
RETRYING = LoopConfig(queue_timeout_seconds=3, backoff=Backoff(initial_seconds=1, jitter="none"))


@every_call
async def test_call_waits_no_longer_than_it_may(call: Call) -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(1))
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        began = anyio.current_time()
        result = await call(loop, 1)
        assert anyio.current_time() == began + 3
        assert (result.status, type(result.exception)) == (Status.TIMEOUT, QueueTimeout)
        assert isinstance(result.exception, InvocationTimeout)
        assert result.error == "No slot after 3s"
        assert (result.queue_ms, result.latency_ms, result.retries, result.failures) == (3000, 0, 0, ())

    assert anyio.current_time() == began + 10


async def test_time_in_vain_is_recorded_as_queued_and_not_as_latency() -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(1))
    await together(loop, [single] * 3, 10)
    snapshot = loop.metrics.snapshot()
    assert snapshot.counts[Status.TIMEOUT] == 2
    assert (snapshot.latency.count, snapshot.latency.mean_ms) == (1, 10_000)
    assert (snapshot.queue.count, snapshot.queue.mean_ms, snapshot.queue.min_ms) == (3, 2000, 0)
    merged = MetricsRecorder()
    merged.merge(pickle.loads(pickle.dumps(loop.metrics)))
    assert merged.snapshot() == attrs.evolve(snapshot, in_flight=0)
    loop.reset_metrics()
    assert loop.metrics.snapshot().queue.count == 0


@every_call
async def test_slot_that_is_granted_in_the_last_moment_is_used(call: Call) -> None:
    for _ in range(10):
        loop = AgentLoop(TIMED, limiter=Limiter(1))
        results = await together(loop, [call] * 2, 3)
        assert statuses(results) == ["success"] * 2
        assert [result.queue_ms for result in results] == [0, 3000]


@every_call
async def test_call_that_waits_in_vain_leaves_its_place(call: Call) -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(1, max_waiting=1))
    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        for _ in range(3):
            assert statuses(await together(loop, [call] * 2)) == ["skipped", "timeout"]


@every_call
@pytest.mark.parametrize(("seconds", "status"), [(2, Status.SUCCESS), (60, Status.TIMEOUT)])
async def test_wait_for_a_rate_is_bound_too(call: Call, seconds: float, status: Status) -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(9, rates=[Rate(1, per_seconds=seconds)]))
    began = anyio.current_time()
    await call(loop, 0)
    assert (await call(loop, 0)).status is status
    assert anyio.current_time() == began + min(seconds, 3)


async def test_wait_in_a_paused_limiter_is_bound_too() -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(1))
    loop.limiter.pause()
    assert statuses(await together(loop, [single, stream])) == ["timeout"] * 2


async def test_batches_and_nested_work_wait_as_long_as_it_takes() -> None:
    loop = AgentLoop(TIMED, limiter=Limiter(1))

    async def outer() -> list[InvocationResult[Any]]:
        return await together(loop, [single, stream, single], 10)

    async with anyio.create_task_group() as group:
        await launch(group, single, loop, 10)
        results = await loop.run_all([Invocation("outer", outer)] * 2)

    for result in results:
        assert statuses(result.unwrap()) == ["success"] * 3


@pytest.mark.parametrize("drained", [False, True])
async def test_retry_waits_as_long_as_it_takes_and_keeps_its_failure_if_drained(drained: bool) -> None:
    loop, results = AgentLoop(RETRYING, limiter=Limiter(1)), []
    fails_once = FakeAgent(Fail(ValueError("once"), after_seconds=1), Reply("late"))
    async with anyio.create_task_group() as group:
        group.start_soon(into, results, loop.run_single, "fails once", fails_once)
        await anyio.sleep(1.5)
        group.start_soon(single, AgentLoop(limiter=loop.limiter), 10)
        await anyio.sleep(5)
        if drained:
            loop.drain()

    (result,) = results
    if drained:
        assert (result.status, result.error) == (Status.ERROR, "ValueError: once")
    else:
        assert (result.output, result.latency_ms) == ("late", 11_500)


async def test_total_time_counts_from_the_start_and_the_queue_until_then() -> None:
    config = LoopConfig(queue_timeout_seconds=3, timeout_seconds=None, total_timeout_seconds=2)
    first, second, third = await together(AgentLoop(config, limiter=Limiter(1)), [single] * 3, 10)
    assert statuses([first, second, third]) == ["timeout"] * 3
    assert type(first.exception) is type(third.exception) is InvocationTimeout
    assert type(second.exception) is QueueTimeout
    assert (second.queue_ms, third.queue_ms, third.latency_ms) == (3000, 2000, 2000)


@every_call
async def test_drain_ends_a_wait_before_its_time(call: Call) -> None:
    limiter = Limiter(1)
    loop, other = AgentLoop(TIMED, limiter=limiter), AgentLoop(limiter=limiter)
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        await launch(group, single, other, 10)
        group.start_soon(into, results, call, loop, 1)
        await anyio.sleep(1)
        loop.drain()

    (result,) = results
    assert (result.status, result.queue_ms) == (Status.SKIPPED, 1000)
    assert isinstance(result.exception, BatchStopped)
    assert loop.metrics.snapshot().queue.count == 0
