"""run_all and as_completed: many invocations at once."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import trio
from agents import (
    agent_for,
    backends,
    both_verbs,
    double,
    each_batch,
    entered_or_not,
    make_loop,
    one_a_second,
    run,
    run_into,
    run_scheduled,
    run_until_stopped,
    stray_cancellation,
    within,
)
from anyio.lowlevel import checkpoint
from trouble import fail

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Invocation,
    InvocationCancelled,
    Limiter,
    LoopConfig,
    Status,
    Verdict,
)
from agentloop._batch.inputs import ASLEEP_PER_SLOT
from agentloop.testing import Fail, FakeAgent, FakeHTTPError, Reply, Stall

# The verbs whose results are read while the batch runs.
each_reader = pytest.mark.parametrize("verb", ["as_completed", "stream_all"])


async def instant(x: int) -> int:
    return x


class Unauthorized(Exception):
    status_code = 401


@both_verbs
@pytest.mark.parametrize("agent", [double, instant])
@pytest.mark.parametrize("limit", [1, 2, 7, 100])
async def test_every_input_has_exactly_one_result(verb: str, agent: Any, limit: int) -> None:
    loop = make_loop(max_concurrency=limit)
    results = await run(verb, loop, [Invocation(f"q{i}", agent, (i,)) for i in range(50)])
    assert [result.agent_id for result in results] == [f"q{i}" for i in range(50)]
    assert [result.index for result in results] == list(range(50))
    assert [result.output for result in results] == [i * (2 if agent is double else 1) for i in range(50)]


@each_batch
async def test_all_kinds_of_input_are_accepted(verb: str) -> None:
    agent = agent_for(verb, double)

    def generator() -> Iterator[Any]:
        yield ("t0", agent, (0,), {})
        yield ("t1", agent, [], {"x": 1})
        yield Invocation("t2", agent, (2,))

    async def async_generator() -> AsyncIterator[Any]:
        for item in generator():
            await checkpoint()
            yield item

    loop, outputs = AgentLoop(), [None] * 3 if verb == "stream_all" else [0, 2, 4]
    for inputs in (list(generator()), generator(), async_generator(), iter(tuple(generator()))):
        results = await run(verb, loop, inputs)
        assert [result.agent_id for result in results] == ["t0", "t1", "t2"]
        assert [result.output for result in results] == outputs

    assert await run(verb, loop, []) == []
    assert [result.output for result in await run(verb, loop, Invocation.map(agent, range(3)))] == outputs


@each_batch
@pytest.mark.parametrize("bad", [None, 3, "text", {"a": 1}, Invocation("a", double)])
async def test_input_that_is_no_iterable_of_invocations_is_refused(verb: str, bad: Any) -> None:
    with pytest.raises(TypeError, match="expected a sync or async iterable of invocations"):
        await run(verb, AgentLoop(), bad)


@both_verbs
async def test_failed_invocation_leaves_its_siblings_running(verb: str) -> None:
    async def agent(x: int) -> int:
        await checkpoint()
        if x % 2:
            raise ValueError(x)

        return x

    results = await run(verb, make_loop(), Invocation.map(agent, range(10)))
    assert [result.output for result in results] == [0, None, 2, None, 4, None, 6, None, 8, None]
    assert [result.error for result in results[1::2]] == [f"ValueError: {i}" for i in range(1, 10, 2)]


@each_batch
async def test_no_more_than_the_limit_run_and_all_of_it_is_used(verb: str) -> None:
    agent, start = FakeAgent(Reply(after_seconds=1)), anyio.current_time()
    await run(verb, make_loop(max_concurrency=5), Invocation.map(agent_for(verb, agent), range(50)))
    assert agent.peak == 5
    assert anyio.current_time() - start == pytest.approx(10)


async def test_completion_order_is_the_order_of_delivery() -> None:
    results: list[Any] = []
    jobs = [Invocation(str(i), anyio.sleep, (5 - i,)) for i in range(5)]
    await run_into(results, "as_completed", AgentLoop(), jobs)
    assert [result.index for result in results] == [4, 3, 2, 1, 0]


@each_reader
@pytest.mark.parametrize("agent", [double, instant])
async def test_input_is_pulled_as_results_are_read(verb: str, agent: Any) -> None:
    pulled = results = 0

    def inputs() -> Iterator[Any]:
        nonlocal pulled
        for i in range(20):
            pulled += 1
            yield Invocation("a", agent_for(verb, agent), (i,))

    async with getattr(make_loop(max_concurrency=3), verb)(inputs()) as items:
        await anyio.sleep(1)
        assert pulled == 3
        async for item in items:
            assert pulled <= results + 3
            results += not isinstance(item, ChunkEvent)
            await anyio.sleep(1)
            assert pulled == min(20, results + 3)

    assert results == 20


async def test_unread_results_hold_no_slot() -> None:
    limiter = Limiter(2)
    async with AgentLoop(limiter=limiter).as_completed(Invocation.map(double, range(9))) as results:
        await anyio.sleep(1)
        assert limiter.statistics().running == 0
        with anyio.fail_after(1):
            await AgentLoop(limiter=limiter).run_single("other", double, 1)

        assert [result.output async for result in results] == [0, 2, 4, 6, 8, 10, 12, 14, 16]


@each_reader
@entered_or_not
@pytest.mark.parametrize("how", ["leave", "raise", "cancel"])
async def test_leaving_early_cancels_what_is_left_and_waits_for_it(
    how: str, entered: bool, verb: str
) -> None:
    cleaned = []

    async def agent(x: int) -> int:
        if x == 0:
            return x

        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)

            cleaned.append(x)

        return x

    loop, start = make_loop(max_concurrency=4), anyio.current_time()
    async with within(loop, entered):
        raises = pytest.raises(KeyError) if how == "raise" else nullcontext()
        with anyio.move_on_after(2 if how == "cancel" else None) as scope, raises:
            async with getattr(loop, verb)(Invocation.map(agent_for(verb, agent), range(100))) as items:
                await anyio.sleep(1)
                await anext(items)
                if how == "raise":
                    raise KeyError

                if how == "cancel":
                    await anyio.sleep_forever()

        assert scope.cancelled_caught == (how == "cancel")
        # Another one begins when the first result was taken.
        assert sorted(cleaned) == [1, 2, 3] + [4] * (how == "cancel" and verb == "as_completed")
        assert anyio.current_time() - start == pytest.approx(3 if how == "cancel" else 2)
        assert loop.metrics.snapshot().counts[Status.CANCELLED] == len(cleaned)


@each_reader
@entered_or_not
async def test_batch_that_was_left_early_does_not_look_complete(verb: str, entered: bool) -> None:
    loop = make_loop()
    async with within(loop, entered):
        async with getattr(loop, verb)([Invocation("a", agent_for(verb, anyio.sleep_forever))]) as items:
            pass

        with pytest.raises(BatchStopped, match="the block that reads the results was left"):
            await anext(items)


@each_reader
async def test_cancellation_while_waiting_for_an_item_loses_none(verb: str) -> None:
    agent = one_a_second if verb == "stream_all" else anyio.sleep
    items: list[Any] = []
    async with getattr(make_loop(max_concurrency=3), verb)(Invocation.map(agent, [10] * 6)) as reader:
        while True:
            with anyio.move_on_after(0.3):
                try:
                    items.append(await anext(reader))
                except StopAsyncIteration:
                    break

    chunks = sorted((item.index, item.chunk) for item in items if isinstance(item, ChunkEvent))
    assert chunks == [(x, i) for x in range(6) for i in range(10)] * (verb == "stream_all")
    results = [getattr(item, "result", item) for item in items if not isinstance(item, ChunkEvent)]
    assert sorted(result.index for result in results) == list(range(6))


@pytest.mark.parametrize(
    "error",
    [ValueError(), KeyboardInterrupt(), SystemExit(), ExceptionGroup("own", [ValueError()])],
    ids=type,
)
async def test_error_of_the_body_leaves_as_the_object_that_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with AgentLoop().as_completed(Invocation.map(double, range(100))) as results:
            async for _ in results:
                raise error

    assert caught.value is error


@each_reader
async def test_iterating_without_the_block_says_what_to_write(verb: str) -> None:
    items = getattr(AgentLoop(), verb)([])
    with pytest.raises(RuntimeError, match=rf"write `async with loop.{verb}\(...\) as results:`"):
        await anext(aiter(items))

    async with items:
        with pytest.raises(RuntimeError, match="in one `async with` block only"):
            await items.__aenter__()

    with pytest.raises(RuntimeError, match="in one `async with` block only"):
        await items.__aenter__()


async def test_end_is_the_end_for_every_later_read() -> None:
    async with AgentLoop().as_completed(Invocation.map(double, range(2))) as results:
        assert len([result async for result in results]) == 2
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(results)


async def test_several_readers_share_the_results() -> None:
    seen: list[int] = []

    async with AgentLoop(LoopConfig(max_concurrency=3)).as_completed(
        Invocation.map(double, range(30))
    ) as results:

        async def read() -> None:
            async for result in results:
                seen.append(result.index)
                await checkpoint()

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(read)

    assert sorted(seen) == list(range(30))


async def test_inputs_that_are_there_from_the_start_wait_from_the_start() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with anyio.create_task_group() as group:

        async def look() -> None:
            await anyio.sleep(1.5)
            now = loop.statistics()
            assert (now.running, now.waiting) == (1, 2)

        group.start_soon(look)
        results = await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 4)

    assert [result.queue_ms for result in results] == pytest.approx([0, 1000, 2000, 3000])
    results = await loop.run_all(Invocation("a", anyio.sleep, (1,)) for _ in range(4))
    assert [result.queue_ms for result in results] == [0, 0, 0, 0]


@both_verbs
async def test_no_exception_of_an_agent_is_too_odd_to_be_data(verb: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        pass

    class Mute(Exception):
        __notes__ = None

        def __str__(self) -> str:
            raise ValueError

    def classify(exc: Exception) -> Verdict:
        raise Mute

    async def agent(kind: type[Exception]) -> None:
        raise kind

    loop = AgentLoop(LoopConfig(classify=classify))
    results = await run(verb, loop, Invocation.map(agent, [Frozen, Mute, ValueError]))
    assert [result.error for result in results] == ["Frozen", "Mute", "ValueError"]


@both_verbs
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_input_that_is_cancelled_from_within_does_not_look_complete(
    verb: str, asynchronous: bool
) -> None:
    inputs = failing_input(await stray_cancellation(), instant)[asynchronous]
    with pytest.raises(InvocationCancelled, match="the input was cancelled"):
        await run(verb, AgentLoop(), inputs)


async def test_end_that_is_raised_by_mistake_does_not_look_like_the_end() -> None:
    names = iter(["a", "b"])
    with pytest.raises(RuntimeError):
        await AgentLoop().run_all(Invocation.map(instant, range(4), lambda _: next(names)))

    with pytest.raises(RuntimeError, match="the input raised StopAsyncIteration"):
        await run("as_completed", AgentLoop(), failing_input(StopAsyncIteration(), instant)[0])


@both_verbs
async def test_input_that_fails_to_close_lets_what_runs_finish(verb: str) -> None:
    done = []

    async def agent(x: int) -> None:
        await anyio.sleep(x)
        done.append(x)
        if x == 1:
            raise FakeHTTPError(401)

    async def inputs() -> AsyncIterator[Any]:
        try:
            for x in range(1, 9):
                yield Invocation("a", agent, (x,))
        finally:
            raise ValueError("cleanup")

    with pytest.raises(ValueError, match="cleanup"):
        await run(verb, make_loop(max_concurrency=3), inputs())

    assert done == [1, 2, 3]


@pytest.mark.parametrize("leave", ["sleep", "error", "cancelled"])
async def test_interrupt_from_an_agent_is_not_lost_with_the_body(leave: str) -> None:
    agent, start = FakeAgent(Fail(KeyboardInterrupt, after_seconds=1)), anyio.current_time()
    with pytest.raises(KeyboardInterrupt), anyio.move_on_after(2):
        async with AgentLoop().as_completed([Invocation("a", agent)]):
            try:
                with anyio.CancelScope(shield=leave == "cancelled"):
                    await anyio.sleep(3)
            finally:
                if leave == "error":
                    raise ValueError("body")

            await checkpoint()

    assert anyio.current_time() - start == pytest.approx(3 if leave == "cancelled" else 1)


# -- retries


@both_verbs
async def test_waiting_to_retry_holds_no_slot_and_stops_nobody(verb: str) -> None:
    failed: set[int] = set()
    done_at: dict[int, float] = {}

    async def agent(x: int) -> int:
        await anyio.sleep(1)
        if x < 4 and x not in failed:
            failed.add(x)
            raise OSError(x)

        done_at[x] = anyio.current_time() - start
        return x

    start = anyio.current_time()
    backoff = Backoff(initial_seconds=100, max_seconds=100, jitter="none")
    loop = make_loop(max_concurrency=1, max_retries=1, backoff=backoff)
    results = await run(verb, loop, Invocation.map(agent, range(10)))
    assert [result.output for result in results] == list(range(10))
    assert [result.retries for result in results] == [1] * 4 + [0] * 6
    assert max(done_at[x] for x in range(4, 10)) == pytest.approx(10)
    assert max(done_at.values()) == pytest.approx(105)


@both_verbs
async def test_waiting_to_retry_is_bounded_by_a_multiple_of_the_limit(verb: str) -> None:
    pulled: list[int] = []

    def inputs() -> Iterator[Invocation[None]]:
        for x in range(1000):
            pulled.append(x)
            yield Invocation("a", fail)

    loop = make_loop(max_concurrency=3, max_retries=1, backoff=Backoff(initial_seconds=9, jitter="none"))
    async with anyio.create_task_group() as group:
        group.start_soon(run, verb, loop, inputs())
        await anyio.sleep(1)
        tasks = len(anyio.get_running_tasks())
        now = loop.statistics()
        assert now.running == 0
        assert now.waiting == len(pulled) == ASLEEP_PER_SLOT * 3
        group.cancel_scope.cancel()

    assert tasks <= 3 + 6


async def test_input_is_pulled_again_once_those_that_wait_have_been_retried() -> None:
    agent = FakeAgent(*[LookupError()] * 2 * ASLEEP_PER_SLOT, Reply())
    with anyio.fail_after(3600):
        loop = make_loop(max_concurrency=1, max_retries=100)
        results = await loop.run_all(Invocation("a", agent) for _ in range(20))

    assert [result.status for result in results] == [Status.SUCCESS] * 20


@pytest.mark.parametrize("attempts", [1, 2, 9, 16, 17, 18, 30])
async def test_total_time_passes_in_line_however_often_an_invocation_was_retried(attempts: int) -> None:
    backoff = Backoff(initial_seconds=0.1, multiplier=1, jitter="none")
    loop = make_loop(max_concurrency=1, max_retries=100, backoff=backoff)
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == attempts:
            # It takes the only slot during the wait for the next attempt.
            group.start_soon(loop.run_single, "b", anyio.sleep, 60)

        raise LookupError

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        [result] = await loop.with_config(total_timeout_seconds=5).run_all([Invocation("a", fail)])
        group.cancel_scope.cancel()

    assert (result.status, result.error) == (Status.TIMEOUT, "Timeout after 5s in total")
    assert calls == attempts
    assert anyio.current_time() - start == pytest.approx(5)


async def test_total_time_out_ends_a_job_that_is_due_but_finds_no_worker() -> None:
    loop = make_loop(max_concurrency=1, max_retries=1, total_timeout_seconds=200)
    ended: dict[int, Any] = {}
    start = anyio.current_time()
    jobs = [Invocation("a", FakeAgent(OSError(), Stall())), Invocation("b", anyio.sleep, (4.9,))]
    async with (
        loop.with_config(total_timeout_seconds=5).as_completed(jobs) as results,
        anyio.create_task_group() as group,
    ):
        # Another batch of the same loop takes the only slot for long.
        await anyio.sleep(0.5)
        group.start_soon(loop.run_all, [Invocation("c", anyio.sleep, (50,))])
        async for result in results:
            ended[result.index] = result, anyio.current_time() - start

    result, seconds = ended[0]
    assert (result.status, result.error) == (Status.TIMEOUT, "Timeout after 5s in total")
    assert seconds == pytest.approx(5)


async def test_total_time_out_ends_a_job_that_a_slow_reader_holds_back() -> None:
    loop = make_loop(max_concurrency=1, max_retries=3, total_timeout_seconds=5)
    jobs = [Invocation("a", FakeAgent(OSError())), Invocation("b", anyio.sleep, (0,))]
    async with loop.as_completed(jobs) as results:
        await anyio.sleep(6)
        seen = {result.agent_id: result async for result in results}

    assert seen["b"].success
    assert (seen["a"].status, seen["a"].retries) == (Status.TIMEOUT, 0)
    assert seen["a"].latency_ms == pytest.approx(5000)


@backends
@pytest.mark.parametrize("seed", range(8))
def test_slot_granted_in_the_moment_in_which_the_total_time_is_up(backend: Any, seed: int) -> None:
    results: list[Any] = []

    async def main() -> None:
        loop = make_loop(max_concurrency=1, max_retries=3, total_timeout_seconds=5)
        agent = FakeAgent(OSError(), Reply(after_seconds=1))
        async with anyio.create_task_group() as group:
            group.start_soon(run_into, results, "run_all", loop, [Invocation("a", agent)])
            await anyio.sleep(0.5)
            await loop.with_config(total_timeout_seconds=None).run_single("hog", anyio.sleep, 4.5)

    run_scheduled(backend, seed, main)
    assert results[0].status is Status.TIMEOUT
    assert results[0].latency_ms == pytest.approx(5000)


async def test_input_that_was_pulled_before_the_limit_was_lowered_waits_for_a_worker() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))

    async def inputs() -> AsyncIterator[Any]:
        yield Invocation("a", anyio.sleep, (5,))
        await anyio.sleep(2)
        yield Invocation("b", anyio.sleep, (1,))

    async with anyio.create_task_group() as group:

        async def lower() -> None:
            await anyio.sleep(1)
            loop.limiter.max_concurrency = 1

        group.start_soon(lower)
        results = await loop.run_all(inputs())

    assert [result.latency_ms for result in results] == pytest.approx([5000, 1000])


async def test_invocation_that_waited_to_be_retried_is_forgotten_before_its_total_time_is_up() -> None:
    payloads: list[weakref.ref[Payload]] = []
    failed: set[int] = set()
    alive = 0

    async def agent(x: int, payload: Payload) -> None:
        nonlocal alive
        await anyio.sleep(1)
        if x not in failed:
            failed.add(x)
            raise OSError

        alive = max(alive, sum(ref() is not None for ref in payloads))

    loop = make_loop(max_concurrency=2, max_retries=1, total_timeout_seconds=10_000)
    async with loop.as_completed(with_payloads(agent, 200, payloads)) as results:
        async for result in results:
            assert result.retries == 1
            del result

    assert alive <= 2 * ASLEEP_PER_SLOT + 40


async def test_input_may_be_any_async_iterator() -> None:
    class Inputs:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Inputs:
            return self

        async def __anext__(self) -> Invocation[int]:
            await checkpoint()
            if not self.left:
                raise StopAsyncIteration

            self.left -= 1
            return Invocation("a", double, (self.left,))

    assert [result.output for result in await AgentLoop().run_all(Inputs())] == [4, 2, 0]


@both_verbs
async def test_metrics_of_a_batch_can_be_switched_off(verb: str) -> None:
    loop = AgentLoop(LoopConfig(collect_metrics=False))
    assert len(await run(verb, loop, Invocation.map(double, range(3)))) == 3
    assert loop.get_latency_stats()["count"] == 0


# -- fatal


@each_batch
async def test_fatal_verdict_starts_nothing_new_and_lets_what_runs_finish(verb: str) -> None:
    started: list[int] = []

    async def agent(x: int) -> int:
        started.append(x)
        await anyio.sleep(1 if x == 1 else 3)
        if x == 1:
            raise Unauthorized("bad key")

        return x

    loop = make_loop(max_concurrency=3)
    inputs = Invocation.map(agent_for(verb, agent), range(10), "q")
    results, stopped = await run_until_stopped(verb, loop, inputs)
    assert started == [0, 1, 2]
    assert [result.status for result in results[:3]] == [Status.SUCCESS, Status.ERROR, Status.SUCCESS]
    assert stopped.reason == "'q-1' failed with Unauthorized: bad key"
    assert "classify=" in str(stopped)
    assert stopped.__cause__ is results[1].exception
    assert [result.index for result in results] == list(range(10 if verb == "run_all" else 3))
    for result in results[3:]:
        assert result.status is Status.SKIPPED
        assert result.exception is stopped
        assert (result.latency_ms, result.retries, result.failures) == (0, 0, ())


@both_verbs
async def test_fatal_verdict_ends_what_waits_to_be_retried(verb: str) -> None:
    async def agent(x: int) -> int:
        await anyio.sleep(x)
        raise FakeHTTPError(401) if x == 3 else OSError(x)

    start = anyio.current_time()
    backoff = Backoff(initial_seconds=99, max_seconds=99, jitter="none")
    loop = make_loop(max_concurrency=9, max_retries=3, backoff=backoff)
    results = await run(verb, loop, Invocation.map(agent, range(6)))
    assert [(result.status, result.retries) for result in results] == [(Status.ERROR, 0)] * 6
    assert anyio.current_time() - start == pytest.approx(5)
    for result in (results[0], results[5]):
        assert "not retried: the batch was stopped" in result.exception.__notes__[0]


@both_verbs
async def test_fatal_verdict_ends_what_waits_for_a_slot(verb: str) -> None:
    loop, agent = make_loop(max_concurrency=2), FakeAgent(Fail(FakeHTTPError(401), after_seconds=1))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "other", anyio.sleep, 50)
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        results, _ = await run_until_stopped(verb, loop, Invocation.map(agent, range(3)))
        assert anyio.current_time() - start == pytest.approx(1)

    assert [result.status for result in results[:2]] == [Status.ERROR, Status.SKIPPED]
    assert len(results) == (3 if verb == "run_all" else 2)


async def test_permanent_failure_after_a_fatal_verdict_is_not_blamed_on_it() -> None:
    async def agent(x: int) -> None:
        await anyio.sleep(x)
        raise FakeHTTPError(401) if x == 1 else TypeError

    results = await AgentLoop().run_all(Invocation.map(agent, range(1, 3)))
    assert [result.status for result in results] == [Status.ERROR] * 2
    assert not hasattr(results[1].exception, "__notes__")


@both_verbs
async def test_fatal_verdict_ends_a_batch_although_the_input_hangs(verb: str) -> None:
    async def inputs() -> AsyncIterator[Any]:
        yield ("a", FakeAgent(FakeHTTPError(401)), (), {})
        await anyio.sleep_forever()

    # What is missing could not be told from a list, so that run_all() raises too.
    results, stopped = await run_until_stopped(verb, AgentLoop(), inputs())
    assert stopped.reason == "'a' failed with FakeHTTPError: HTTP 401"
    assert [result.status for result in results] == [Status.ERROR]
    assert [result.status for result in stopped.results] == [Status.ERROR] * (verb == "run_all")


# -- inputs that fail


def failing_input(error: BaseException, agent: Any) -> tuple[Any, Any]:
    """Return a sync and an async input of three invocations that then raise."""

    def sync() -> Iterator[Any]:
        yield from Invocation.map(agent, range(3))
        raise error

    async def asynchronous() -> AsyncIterator[Any]:
        for item in sync():
            yield item

    return sync(), asynchronous()


@each_batch
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_failing_input_ends_the_batch_after_what_runs(verb: str, asynchronous: bool) -> None:
    error, finished, results = ValueError("input"), [], []

    async def agent(x: int) -> None:
        await anyio.sleep(1 + x)
        finished.append(x)

    inputs = failing_input(error, agent_for(verb, agent))[asynchronous]
    with pytest.raises(ValueError, match="input") as caught:
        await run_into(results, verb, make_loop(max_concurrency=2), inputs)

    assert caught.value is error
    assert finished == [0, 1, 2]
    assert [result.index for result in results] == ([] if verb == "run_all" else finished)


@each_reader
async def test_error_of_the_input_is_raised_at_each_further_read(verb: str) -> None:
    error = KeyError("input")
    async with getattr(make_loop(), verb)(failing_input(error, agent_for(verb, double))[0]) as items:
        for _ in range(2):
            with pytest.raises(KeyError) as caught:
                async for _ in items:
                    pass

            assert caught.value is error


@each_batch
async def test_bad_input_is_a_failing_input(verb: str) -> None:
    with pytest.raises(TypeError, match="expected an Invocation or a tuple"):
        await run(verb, AgentLoop(), [Invocation("a", agent_for(verb, double), (1,)), ("b", double)])

    with pytest.raises(TypeError, match="fn must be an async function, got 3"):
        await run(verb, AgentLoop(), [("b", 3, (), {})])


@pytest.mark.parametrize("limit", [1, 2, 10])
async def test_interrupt_from_the_input_is_not_lost_with_a_reader_that_leaves_meanwhile(limit: int) -> None:
    was_raised = False

    def inputs() -> Iterator[Invocation[int]]:
        nonlocal was_raised
        yield Invocation("a", double, (1,))
        was_raised = True
        raise KeyboardInterrupt

    try:
        async with make_loop(max_concurrency=limit).as_completed(inputs()) as results:
            async for _ in results:
                break
    except KeyboardInterrupt:
        assert was_raised
    else:
        assert not was_raised


@both_verbs
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_interrupt_from_the_input_propagates_at_once(verb: str, asynchronous: bool) -> None:
    inputs = failing_input(KeyboardInterrupt(), anyio.sleep)[asynchronous]
    with pytest.raises(KeyboardInterrupt):
        await run(verb, make_loop(max_concurrency=9), inputs)


@both_verbs
async def test_async_input_is_closed_with_the_batch(verb: str) -> None:
    closed = []

    async def inputs() -> AsyncIterator[Any]:
        try:
            while True:
                yield ("a", anyio.sleep, (1,), {})
        finally:
            await checkpoint()
            closed.append(True)

    with anyio.move_on_after(5):
        await run(verb, AgentLoop(), inputs())

    assert closed == [True]


async def test_slow_async_input_delays_no_retry() -> None:
    agent = FakeAgent(OSError(), Reply())

    async def inputs() -> AsyncIterator[Any]:
        yield ("a", agent, (), {})
        await anyio.sleep(100)

    await make_loop(max_concurrency=1, max_retries=1).run_all(inputs())
    first, second = agent.calls
    assert second.started_at - first.started_at == pytest.approx(1)


async def test_async_input_is_pulled_by_one_task_so_it_may_hold_scopes_open() -> None:
    async def inputs() -> AsyncIterator[Any]:
        with anyio.CancelScope():
            async with anyio.create_task_group():
                for i in range(20):
                    yield ("a", double, (i,), {})
                    await checkpoint()

    results = await AgentLoop(LoopConfig(max_concurrency=3)).run_all(inputs())
    assert [result.output for result in results] == [2 * i for i in range(20)]


@each_batch
@entered_or_not
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupt_from_an_agent_cancels_the_rest_and_propagates_bare(
    verb: str, kind: type[BaseException], entered: bool
) -> None:
    loop = make_loop(max_concurrency=3)
    agents = [FakeAgent(Fail(kind, after_seconds=1)), *[FakeAgent(Stall())] * 8]
    with pytest.raises(kind):
        async with within(loop, entered):
            await run(verb, loop, [Invocation("a", agent_for(verb, agent)) for agent in agents])

    assert [call.cancelled for call in agents[1].calls] == [True, True]
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 3


# -- fairness


@both_verbs
async def test_agents_that_never_wait_let_others_run(verb: str) -> None:
    turns = 0
    done = False

    async def other() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        await run(verb, AgentLoop(LoopConfig(max_concurrency=50)), Invocation.map(instant, range(3000)))
        done = True

    assert turns >= 10


async def test_agents_that_never_wait_do_not_delay_cancellation() -> None:
    started = 0

    def inputs() -> Iterator[Any]:
        nonlocal started
        while True:
            started += 1
            yield ("a", instant, (1,), {})

    async with anyio.create_task_group() as group:
        group.start_soon(AgentLoop().run_all, inputs())
        await checkpoint()
        await checkpoint()
        group.cancel_scope.cancel()

    assert started < 1000


@pytest.mark.parametrize(
    ("agent", "verb", "most"),
    [(instant, "run_all", 5), (double, "run_all", 12), (double, "as_completed", 13)],
)
async def test_tasks_do_not_grow_with_the_input(agent: Any, verb: str, most: int) -> None:
    peak = 0

    async def counting(x: int) -> None:
        nonlocal peak
        peak = max(peak, len(anyio.get_running_tasks()))
        await agent(x)

    before = len(anyio.get_running_tasks())
    await run(verb, make_loop(max_concurrency=10), Invocation.map(counting, range(600)))
    # Agents that never wait need one worker for each time slice. On trio there is a timer besides.
    assert peak <= before + most - (anyio.get_cancelled_exc_class() is asyncio.CancelledError)


# -- memory and tasks


class Payload:
    pass


def with_payloads(agent: Any, count: int, payloads: list[weakref.ref[Payload]]) -> Iterator[Any]:
    """Yield invocations with an object each that nothing else refers to, and note these objects."""
    for i in range(count):
        payload = Payload()
        payloads.append(weakref.ref(payload))
        yield Invocation("a", agent, (i, payload))
        del payload


@both_verbs
@pytest.mark.parametrize("outcome", ["success", "error", "retried", "timeout"])
async def test_nothing_keeps_the_arguments_of_a_finished_invocation_alive(verb: str, outcome: str) -> None:
    payloads: list[weakref.ref[Payload]] = []
    alive: list[int] = []
    failed: set[int] = set()

    async def agent(x: int, payload: Payload) -> int:
        await checkpoint()
        alive.append(sum(ref() is not None for ref in payloads))
        if outcome == "error" or (outcome == "retried" and x not in failed):
            failed.add(x)
            raise OSError(x)

        if outcome == "timeout":
            await anyio.sleep(10)

        return x

    inputs = with_payloads(agent, 40, payloads)
    loop = make_loop(max_concurrency=2, timeout_seconds=1, max_retries=int(outcome == "retried"))
    gc.collect()
    gc.disable()
    try:
        if verb == "run_all":
            results = await loop.run_all(inputs)
            assert len(results) == 40
            del results
        else:
            async with loop.as_completed(inputs) as done:
                async for result in done:
                    del result

        assert sum(ref() is not None for ref in payloads) == 0
    finally:
        gc.enable()

    if outcome in ("success", "timeout") and verb == "as_completed":
        assert max(alive) <= 5


# -- the limit while running


@both_verbs
async def test_limit_that_changes_starts_more_at_once_or_interrupts_nothing_and_then_holds(verb: str) -> None:
    loop, agent = make_loop(max_concurrency=2), FakeAgent(Reply(after_seconds=10))
    async with anyio.create_task_group() as group:
        group.start_soon(run, verb, loop, Invocation.map(agent, range(20)))
        await anyio.sleep(1)
        assert agent.running == 2
        loop.limiter.max_concurrency = 8
        await anyio.wait_all_tasks_blocked()
        assert agent.running == 8
        loop.limiter.max_concurrency = 3
        await anyio.sleep(8)
        assert agent.running == 8

    # Two of the eight end a second before the others.
    starts = [call.started_at - agent.calls[0].started_at for call in agent.calls]
    assert starts == pytest.approx([0, 0, *[1] * 6, *[11] * 3, *[21] * 3, *[31] * 3, *[41] * 3])


async def test_two_batches_share_one_limit_fairly() -> None:
    limiter, order = Limiter(2), []

    async def agent(name: str) -> None:
        order.append(name)
        await anyio.sleep(1)

    async with anyio.create_task_group() as group:
        for name in "ab":
            jobs = [Invocation(name, agent, (name,)) for _ in range(20)]
            group.start_soon(AgentLoop(limiter=limiter).run_all, jobs)
            await anyio.wait_all_tasks_blocked()

    assert len(order) == 40
    middle = order[4:30]
    assert middle.count("a") >= 10
    assert middle.count("b") >= 10


async def test_single_invocation_is_not_starved_by_a_batch() -> None:
    loop = make_loop(max_concurrency=2)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", anyio.sleep, (1,)) for _ in range(100)])
        await anyio.wait_all_tasks_blocked()
        result = await loop.run_single("single", anyio.sleep, 0)
        assert result.queue_ms <= 1000
        group.cancel_scope.cancel()


# -- what results keep, and what a batch closes


@both_verbs
async def test_success_keeps_no_frames_of_its_failed_attempts(verb: str) -> None:
    class Held:
        pass

    held: weakref.WeakSet[Held] = weakref.WeakSet()

    async def agent(x: int) -> str:
        big = Held()
        held.add(big)
        await checkpoint()
        if len(held) <= 3 * (x + 1):
            try:
                raise KeyError("inner")
            except KeyError as exc:
                raise OSError("outer") from ExceptionGroup("several", [exc, FakeHTTPError(429)])

        return "ok"

    [result] = await run(verb, AgentLoop(LoopConfig(max_retries=9)), [Invocation("a", agent, (0,))])
    assert result.success
    assert [str(exc) for exc in result.failures] == ["outer"] * 3
    assert isinstance(result.failures[0].__cause__, ExceptionGroup)
    gc.collect()
    assert not held


async def test_reason_of_a_stop_is_bounded_and_shared_by_all_that_was_skipped() -> None:
    async def agent(x: int) -> None:
        raise Unauthorized("x" * 100_000)

    results = await AgentLoop(LoopConfig(max_concurrency=1)).run_all(Invocation.map(agent, range(99)))
    assert len({id(result.exception) for result in results[1:]}) == 1
    stopped = results[1].exception
    assert isinstance(stopped, BatchStopped)
    assert len(stopped.reason) == 500
    assert stopped.reason.endswith("...")
    assert stopped.__cause__ is results[0].exception


async def test_batch_that_ends_with_its_fatal_failure_is_complete() -> None:
    for inputs in (list, iter):
        agent = FakeAgent(*[Reply()] * 4, FakeHTTPError(401))
        jobs = inputs([Invocation("a", agent)] * 5)
        results = await run("as_completed", make_loop(max_concurrency=1), jobs)
        assert [result.status for result in results] == [*[Status.SUCCESS] * 4, Status.ERROR]


@pytest.mark.parametrize(
    "way", ["to its end", "left", "fatal", "cancelled", "by map", "by map with a function"]
)
@pytest.mark.parametrize("asynchronous", [False, True])
@each_batch
async def test_generator_given_as_input_is_closed(verb: str, asynchronous: bool, way: str) -> None:
    closed: list[str] = []
    var: ContextVar[int] = ContextVar("var", default=0)

    async def agent(x: int) -> None:
        await anyio.sleep(1)
        if x == 3 and way != "cancelled":
            raise FakeHTTPError(401)

    def items() -> Iterator[int]:
        token = var.set(1)
        try:
            yield from range(3 if way == "to its end" else 1000)
        finally:
            closed.append("closed")
            var.reset(token)  # only in the context that it began in

    async def async_items() -> AsyncIterator[int]:
        try:
            for x in range(3 if way == "to its end" else 1000):
                yield x
        finally:
            await checkpoint()
            closed.append("closed")

    fn = agent_for(verb, agent)
    source: Any = async_items() if asynchronous else items()
    if way.startswith("by map"):
        inputs: Any = Invocation.map(fn, source, str if "function" in way else None)
    else:
        inputs = source_of(fn, source) if asynchronous else source_of_sync(fn, source)

    loop = make_loop(max_concurrency=2)
    with anyio.move_on_after(2.5 if way == "cancelled" else 1000):
        if way == "left" and verb != "run_all":
            async with getattr(loop, verb)(inputs) as results:
                await anext(results)
        else:
            _, stopped = await run_until_stopped(verb, loop, inputs)
            assert (stopped is None) == (way == "to its end")

    assert closed == ["closed"]


def source_of_sync(fn: Any, items: Iterator[int]) -> Iterator[Any]:
    try:
        for x in items:
            yield ("a", fn, (x,), {})
    finally:
        items.close()


async def source_of(fn: Any, items: AsyncIterator[int]) -> AsyncIterator[Any]:
    try:
        async for x in items:
            yield ("a", fn, (x,), {})
    finally:
        await items.aclose()


# -- a clock that goes back


offset = 0.0


class AsyncioClock(asyncio.SelectorEventLoop):
    def time(self) -> float:
        return super().time() - offset


class TrioClock(trio.abc.Clock):
    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return time.perf_counter() - offset

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()


@both_verbs
@pytest.mark.parametrize(
    ("backend", "options"), [("asyncio", {"loop_factory": AsyncioClock}), ("trio", {"clock": TrioClock()})]
)
@pytest.mark.parametrize("on_event", [None, id])
def test_clock_that_goes_back_makes_no_duration_negative(
    on_event: Any, backend: str, options: dict[str, Any], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "offset", 0.0)

    async def agent(x: int) -> int:
        await checkpoint()
        if x == 3:
            monkeypatch.setitem(globals(), "offset", 1000.0)

        await checkpoint()
        if x in (4, 5):
            raise TypeError(x)

        return x

    loop = AgentLoop(LoopConfig(max_concurrency=3), on_event=on_event)
    results = anyio.run(
        run, verb, loop, Invocation.map(agent, range(10)), backend=backend, backend_options=options
    )
    assert [result.output for result in results] == [0, 1, 2, 3, None, None, 6, 7, 8, 9]
    assert min(result.latency_ms for result in results) == 0
    assert all(result.queue_ms >= 0 for result in results)
    assert loop.metrics.snapshot().latency.count == 10


async def test_async_input_that_was_read_to_its_end_has_a_result_for_each() -> None:
    async def agent(x: int) -> None:
        await anyio.sleep(x)
        if x == 1:
            raise FakeHTTPError(401)

    async def inputs() -> AsyncIterator[Any]:
        for x in (5, 5, 1, 7):
            yield Invocation("a", agent, (x,))

    results = await AgentLoop().run_all(inputs())
    assert [str(result.status) for result in results] == ["success", "success", "error", "success"]


# -- agents that leave a scope open in a batch that is cancelled


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("shield", [False, True])
async def test_cancelled_batch_ends_although_its_agents_leave_scopes_open(shield: bool, limit: int) -> None:
    async def agent() -> None:
        anyio.CancelScope(shield=shield).__enter__()
        await anyio.sleep(2)

    loop = AgentLoop(LoopConfig(max_concurrency=limit))
    with anyio.move_on_after(1) as scope:
        await loop.run_all([Invocation("a", agent)] * 3)

    assert scope.cancelled_caught
    # A shielded agent hears nothing of the cancellation.
    counts = loop.metrics.snapshot().counts
    assert counts[Status.ERROR if shield else Status.CANCELLED] == sum(counts.values()) == limit


async def test_worker_in_place_of_another_is_cancelled_although_all_else_in_its_batch_is_shielded() -> None:
    async def agent() -> None:
        anyio.CancelScope().__enter__()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(2)

    loop = AgentLoop(LoopConfig(max_concurrency=1))
    with anyio.move_on_after(1) as scope:
        async with loop.as_completed([Invocation("a", agent)] * 3) as results:
            await anyio.sleep(0)
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1.5)

            async for _ in results:
                pass

    assert scope.cancelled_caught
