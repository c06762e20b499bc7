"""What an asyncio program can do to a task: native cancellation, and the marks that it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest
from agents import (
    agent_for,
    each_batch,
    each_verb,
    entered_or_not,
    make_loop,
    one_a_second,
    run,
    run_into,
    run_scheduled,
    run_stream,
    run_until_stopped,
    stray_cancellation,
    within,
)
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Invocation,
    InvocationCancelled,
    InvocationTimeout,
    LeftOpenError,
    Limiter,
    LoopConfig,
    Status,
)
from agentloop.testing import FakeHTTPError, virtual_clock


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return virtual_clock("asyncio")


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def ok(x: int = 0) -> int:
    await asyncio.sleep(1)
    return x


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Wait for a task that was cancelled natively."""
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancels_itself() -> None:
    current_task().cancel()
    await asyncio.sleep(1)


async def cancels_itself_and_returns() -> str:
    current_task().cancel()
    return "kept"


async def cancels_itself_and_raises() -> None:
    current_task().cancel()
    raise ValueError("mine")


async def swallows_its_own_cancellation() -> str:
    current_task().cancel()
    try:
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        return "kept"

    raise AssertionError


async def awaits_a_cancelled_future() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def awaits_a_cancelled_task() -> None:
    task = asyncio.ensure_future(asyncio.sleep(10))
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


async def raises_cancelled_error() -> None:
    raise asyncio.CancelledError


async def lets_a_task_group_fail() -> str:
    async def fail() -> None:
        raise OSError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.sleep(1)
    except* OSError:
        pass

    return "kept"


each_outcome = pytest.mark.parametrize(
    ("agent", "status"),
    [
        (cancels_itself, Status.CANCELLED),
        (cancels_itself_and_returns, Status.SUCCESS),
        (cancels_itself_and_raises, Status.ERROR),
        (swallows_its_own_cancellation, Status.SUCCESS),
        (awaits_a_cancelled_future, Status.CANCELLED),
        (awaits_a_cancelled_task, Status.CANCELLED),
        (raises_cancelled_error, Status.CANCELLED),
        (lets_a_task_group_fail, Status.SUCCESS),
    ],
)


@pytest.mark.parametrize("limit", [1, 3])
@each_outcome
async def test_one_agent_is_one_result_and_the_next_starts_clean(
    agent: Any, status: Status, limit: int
) -> None:
    async def checks_its_task() -> int:
        assert current_task().cancelling() == 0
        await asyncio.sleep(1)
        return current_task().cancelling()

    async def goes_on() -> None:
        for step in (agent, checkpoint):
            with contextlib.suppress(ValueError, asyncio.CancelledError):
                await step()

        await asyncio.sleep(100)

    jobs = [Invocation("odd", agent), Invocation("clean", checks_its_task), Invocation("late", goes_on)] * 6
    results = await make_loop(max_concurrency=limit, timeout_seconds=5).run_all(jobs)
    assert [result.status for result in results] == [status, Status.SUCCESS, Status.TIMEOUT] * 6
    assert [result.output for result in results[1::3]] == [0] * 6
    assert current_task().cancelling() == 0
    if status is Status.CANCELLED:
        assert isinstance(results[0].exception, InvocationCancelled)
        assert isinstance(results[0].exception.__cause__, asyncio.CancelledError)


async def orders_its_cancellation() -> None:
    asyncio.get_running_loop().call_later(1.5, current_task().cancel)
    await asyncio.sleep(1)


async def test_cancellation_that_an_agent_ordered_for_later_ends_no_batch() -> None:
    async def inputs() -> Any:
        yield Invocation("a", orders_its_cancellation)
        await asyncio.sleep(3)
        for i in range(3):
            yield Invocation("b", ok, (i,))

    results = await make_loop(max_concurrency=1).run_all(inputs())
    assert [result.status for result in results] == [Status.SUCCESS] * 4


async def test_cancellation_that_an_agent_ordered_for_later_hits_one_waiting_for_a_slot() -> None:
    loop = make_loop(max_concurrency=2)
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "first", asyncio.sleep, 0.5)
        await anyio.wait_all_tasks_blocked()
        batch = [Invocation("a", orders_its_cancellation), *Invocation.map(ok, range(2))]
        group.start_soon(run_into, results, "run_all", loop, batch)
        await anyio.sleep(0.6)
        group.start_soon(loop.run_single, "hog", asyncio.sleep, 5)
        await anyio.sleep(0.5)
        group.start_soon(loop.run_single, "hog", asyncio.sleep, 5)

    assert [result.index for result in results] == [0, 1, 2]


# -- native cancellation of the caller


async def chunks_of(agent: Any) -> AsyncGenerator[int]:
    yield 1
    await agent()


def jobs(verb: str, agent: Any) -> list[Invocation[Any]]:
    return [Invocation("a", chunks_of, (agent,)) if "stream" in verb else Invocation("a", agent)] * 5


@each_verb
@entered_or_not
async def test_native_cancellation_of_the_caller_cancels_the_agents_and_propagates(
    verb: str, entered: bool
) -> None:
    cleaned = started = 0

    async def agent() -> None:
        nonlocal cleaned, started
        started += 1
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)

            cleaned += 1

    loop = make_loop(max_concurrency=3)
    async with within(loop, entered):
        task = asyncio.ensure_future(run(verb, loop, jobs(verb, agent)))
        await asyncio.sleep(1)
        task.cancel()
        await cancelled(task)

    assert task.cancelled()
    assert cleaned == started == (1 if verb in ("run_single", "run_streaming") else 3)
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == started


async def test_agents_own_cancellation_of_the_callers_task_is_the_callers() -> None:
    await cancelled(asyncio.ensure_future(AgentLoop().run_single("a", cancels_itself)))


async def takes_its_own_cancellation_back() -> None:
    with contextlib.suppress(asyncio.CancelledError):
        current_task().cancel(object())
        await asyncio.sleep(1)

    current_task().uncancel()
    raise asyncio.CancelledError


async def raises_a_stray_cancellation() -> None:
    raise await stray_cancellation()


@pytest.mark.parametrize(
    "agent",
    [
        awaits_a_cancelled_future,
        awaits_a_cancelled_task,
        raises_cancelled_error,
        raises_a_stray_cancellation,
        takes_its_own_cancellation_back,
    ],
)
async def test_cancellation_that_no_caller_has_asked_for_is_a_result(agent: Any) -> None:
    result = await AgentLoop().run_single("a", agent)
    assert result.status is Status.CANCELLED
    assert current_task().cancelling() == 0


async def test_native_cancellation_of_task_groups_in_a_task_group_is_the_callers() -> None:
    # AnyIO then takes back the mark that the cancellation has left on the task.
    async def inner() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 50)
            await anyio.sleep(50)

    async def agent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(inner)

    await by_cancel(lambda: AgentLoop().run_single("a", agent))


@pytest.mark.parametrize("ending", [Status.ERROR, Status.TIMEOUT])
async def test_task_group_that_fails_in_a_nested_invocation_is_no_callers_cancellation(
    ending: Status,
) -> None:
    async def outer() -> None:
        # Before CPython 3.13 this leaves a mark on the task, which is the outer agent's too.
        assert (await loop.run_single("inner", lets_a_task_group_fail)).success
        if ending is Status.ERROR:
            raise ValueError("mine")

        await asyncio.sleep(50)

    loop = make_loop(timeout_seconds=5)
    assert (await asyncio.ensure_future(loop.run_single("outer", outer))).status is ending


async def test_callers_cancellation_while_a_task_group_fails_is_the_callers() -> None:
    calls = 0

    async def end_slowly() -> None:
        try:
            await asyncio.sleep(50)
        finally:
            await asyncio.sleep(2)

    async def agent() -> None:
        nonlocal calls
        calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(end_slowly())
            group.create_task(fail_soon())

    await by_cancel(lambda: AgentLoop().run_single("a", agent))
    assert calls == 1


async def test_native_cancellation_and_our_time_out_in_one_moment_is_the_callers() -> None:
    task = asyncio.ensure_future(make_loop(timeout_seconds=1).run_single("a", asyncio.sleep, 100))
    asyncio.get_running_loop().call_later(1, task.cancel)
    await cancelled(task)


async def test_agents_that_shield_or_gather_are_cancelled_by_our_time_out() -> None:
    async def shields() -> None:
        await asyncio.shield(inner)

    async def gathers() -> None:
        await asyncio.gather(asyncio.sleep(50), asyncio.sleep(60))

    async def waits() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), 50)

    async def queues() -> None:
        await asyncio.Queue[int]().get()

    async def groups() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(50))

    inner = asyncio.ensure_future(asyncio.sleep(3))
    jobs = [Invocation("a", agent) for agent in (shields, gathers, waits, queues, groups)] * 2
    results = await make_loop(timeout_seconds=1).run_all(jobs)
    assert [result.status for result in results] == [Status.TIMEOUT] * 10
    await inner


async def test_callers_cancellation_is_not_taken_for_a_mark_that_the_agent_left() -> None:
    async def agent() -> None:
        current_task().cancel()
        scope.cancel()

    with anyio.CancelScope() as scope:
        await AgentLoop().run_all([Invocation("a", agent)] * 3)

    assert scope.cancelled_caught
    assert current_task().cancelling() == 0


# -- streams


async def slowly(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        await asyncio.sleep(i % 7 / 10)
        yield i


async def read_impatiently(reader: Any) -> tuple[list[Any], int]:
    """Read to the end under a native time limit that passes again and again, and count how often it did."""
    seen: list[Any] = []
    waits = 0
    while True:
        try:
            seen.append(await asyncio.wait_for(anext(reader), 0.1))
        except TimeoutError:
            waits += 1
        except StopAsyncIteration:
            return seen, waits


@pytest.mark.long
@entered_or_not
def test_native_cancellation_while_waiting_for_a_chunk_loses_none(entered: bool) -> None:
    # There is a chunk every 0.3 s on average: often a chunk comes in the very moment in which the limit ends.
    async def main() -> None:
        loop = make_loop(max_concurrency=1)
        async with within(loop, entered), loop.run_streaming("a", slowly, 150) as stream:
            seen, waits = await read_impatiently(stream)

        assert seen == list(range(150))
        assert waits > 100
        assert current_task().cancelling() == 0

    for seed in range(6):
        run_scheduled("asyncio", seed, main)


async def test_native_cancellation_while_waiting_for_a_result_or_an_event_loses_none() -> None:
    loop = make_loop(max_concurrency=3)
    async with loop.as_completed(Invocation.map(lambda x: asyncio.sleep(x % 7 / 10), range(50))) as results:
        seen, _ = await read_impatiently(results)
        assert sorted(result.index for result in seen) == list(range(50))

    async with loop.stream_all(Invocation.map(slowly, [30] * 5)) as events:
        seen, _ = await read_impatiently(events)
        chunks = sorted((event.index, event.chunk) for event in seen if isinstance(event, ChunkEvent))
        assert chunks == [(index, i) for index in range(5) for i in range(30)]


@entered_or_not
@pytest.mark.parametrize("times", [1, 3])
async def test_reader_that_is_cancelled_natively_while_it_leaves_waits_for_the_agent(
    times: int, entered: bool
) -> None:
    cleaned = False

    async def agent() -> AsyncGenerator[int]:
        nonlocal cleaned
        try:
            yield 1
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(5)

            cleaned = True

    async def read() -> None:
        async with loop.run_streaming("a", agent):
            await asyncio.sleep(1)

    loop = AgentLoop()
    async with within(loop, entered):
        task = asyncio.ensure_future(read())
        await asyncio.sleep(2)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.5)

        await cancelled(task)
        assert cleaned
        assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


@entered_or_not
@pytest.mark.parametrize("first", [False, True])
@each_outcome
async def test_streaming_agent_may_do_to_its_task_as_it_likes(
    agent: Any, status: Status, first: bool, entered: bool
) -> None:
    async def chunks() -> AsyncGenerator[Any]:
        if not first:
            yield 1

        yield await agent()

    loop = make_loop(timeout_seconds=5)
    async with within(loop, entered):
        seen, error, result = await run_stream(loop, chunks)
        assert current_task().cancelling() == 0

    kinds = {Status.ERROR: ValueError, Status.CANCELLED: InvocationCancelled, Status.SUCCESS: type(None)}
    assert type(error) is kinds[status]
    assert result.status is status
    assert len(seen) == result.chunks == (status is Status.SUCCESS) + (not first)


@pytest.mark.parametrize("limit", ["timeout_seconds", "idle_timeout_seconds", "total_timeout_seconds"])
async def test_time_out_of_a_stream_is_not_hidden_by_a_leaked_cancellation(limit: str) -> None:
    async def agent() -> AsyncGenerator[int]:
        await lets_a_task_group_fail()
        yield 1
        await swallows_its_own_cancellation()
        await asyncio.sleep(100)

    chunks, error, result = await run_stream(make_loop(**{limit: 5}), agent)
    assert chunks == [1]
    assert isinstance(error, InvocationTimeout)
    assert result.status is Status.TIMEOUT


async def test_cancellation_that_a_streaming_agent_asked_for_does_not_reach_its_next_attempt() -> None:
    calls = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            current_task().cancel()
            raise OSError

        await asyncio.sleep(1)
        yield calls

    assert (await run_stream(make_loop(max_retries=2), agent))[0] == [2]


async def test_cancellation_that_an_agent_ordered_for_later_ends_its_stream_only() -> None:
    async def agent() -> AsyncGenerator[int]:
        await orders_its_cancellation()
        raise OSError
        yield

    async with make_loop(max_retries=3, backoff=Backoff(initial_seconds=5, jitter="none")) as loop:
        _, error, result = await run_stream(loop, agent)
        assert isinstance(error, InvocationCancelled)
        assert result.status is Status.CANCELLED
        assert (await loop.run_single("b", ok, 3)).output == 3


# -- the caller's cancellation, and an agent that makes an error of it


async def makes_an_error() -> None:
    try:
        await asyncio.sleep(50)
    except asyncio.CancelledError:
        raise TimeoutError("connect timed out")  # noqa: B904  # as clients do that chain nothing


async def wraps_it() -> None:
    try:
        await asyncio.sleep(50)
    except asyncio.CancelledError as exc:
        raise ConnectionError("request aborted") from exc


async def raises_later() -> None:
    aborted = False
    try:
        await asyncio.sleep(50)
    except asyncio.CancelledError:
        aborted = True

    if aborted:
        raise ConnectionError("aborted")


async def makes_a_group_of_it() -> None:
    try:
        await asyncio.sleep(50)
    except asyncio.CancelledError as exc:
        raise BaseExceptionGroup("all", [exc, OSError("cleanup")]) from None


async def makes_a_group_of_errors() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(makes_an_error())
        group.create_task(wraps_it())


async def waits_in_a_task_group_of_anyio() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(makes_an_error)
        group.start_soon(anyio.sleep, 50)


CONVERTERS = [
    makes_an_error,
    wraps_it,
    raises_later,
    makes_a_group_of_it,
    makes_a_group_of_errors,
    waits_in_a_task_group_of_anyio,
]


async def by_cancel(run: Any) -> None:
    task = asyncio.ensure_future(run())
    await asyncio.sleep(1)
    task.cancel("enough")
    await cancelled(task)
    assert task.cancelled()


async def by_timeout(run: Any) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await run()


async def by_wait_for(run: Any) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run(), 1)


async def by_sibling(run: Any) -> None:
    async def fail() -> None:
        await asyncio.sleep(1)
        raise KeyError("sibling")

    async def siblings() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(run())

    with pytest.RaisesGroup(KeyError):
        # In a task of its own, whose count of cancellations the group leaves raised.
        await asyncio.create_task(siblings())


@entered_or_not
@each_verb
@pytest.mark.parametrize("cancel", [by_cancel, by_timeout, by_wait_for, by_sibling])
@pytest.mark.parametrize("agent", [anyio.sleep_forever, *CONVERTERS])
async def test_cancellation_of_the_caller_propagates_although_the_agent_made_an_error_of_it(
    agent: Any, cancel: Any, verb: str, entered: bool
) -> None:
    calls = 0
    loop = make_loop(max_retries=3)

    async def counted() -> None:
        nonlocal calls
        calls += 1
        await agent()

    async with within(loop, entered):
        await cancel(lambda: run(verb, loop, jobs(verb, counted)[:1]))

    assert calls == 1
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1
    assert current_task().cancelling() == 0


async def fails_in_its_body() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail_soon())
        await asyncio.sleep(50)


async def fails_while_it_is_left() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail_soon())


async def fail_soon() -> None:
    await asyncio.sleep(0.1)
    raise OSError("child")


async def handles_a_failing_group_and_fails() -> None:
    try:
        await fails_while_it_is_left()
    except* OSError:
        pass

    raise OSError("later")


async def steps() -> AsyncGenerator[int]:
    await fails_while_it_is_left()
    yield 1


async def fails_in_a_generator() -> None:
    async for _ in steps():
        pass


@contextlib.asynccontextmanager
async def group_as_a_context() -> AsyncGenerator[None]:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail_soon())
        yield


async def fails_in_a_context() -> None:
    async with group_as_a_context():
        pass


async def fails_twice() -> None:
    for _ in range(2):
        try:
            await fails_while_it_is_left()
        except* OSError:
            pass

    async with asyncio.TaskGroup() as group:
        group.create_task(fails_while_it_is_left())


FAILING = [
    fails_in_its_body,
    fails_while_it_is_left,
    handles_a_failing_group_and_fails,
    fails_in_a_generator,
    fails_in_a_context,
    fails_twice,
]


@pytest.mark.parametrize("agent", FAILING)
async def test_failing_task_group_of_the_agent_is_the_agents_error(agent: Any) -> None:
    loop = make_loop(max_retries=2)
    result = await asyncio.create_task(loop.run_single("a", agent))
    assert result.status is Status.ERROR
    assert isinstance(result.exception, OSError | ExceptionGroup)
    assert (len(result.failures), result.retries) == (3, 2)


@pytest.mark.parametrize("agent", [fails_while_it_is_left, handles_a_failing_group_and_fails])
async def test_cancellation_of_the_caller_is_seen_after_a_failing_task_group(agent: Any) -> None:
    async def fails_and_waits() -> None:
        try:
            await agent()
        except (OSError, ExceptionGroup):
            await makes_an_error()

    await by_cancel(lambda: AgentLoop().run_single("a", fails_and_waits))


async def test_failing_task_group_of_the_agent_hides_no_time_out() -> None:
    async def agent() -> None:
        try:
            await fails_while_it_is_left()
        except* OSError:
            await asyncio.sleep(50)

    result = await asyncio.create_task(make_loop(timeout_seconds=5).run_single("a", agent))
    assert result.status is Status.TIMEOUT


@entered_or_not
@pytest.mark.parametrize("verb", ["run_streaming", "as_completed", "stream_all"])
async def test_native_cancellation_in_the_step_of_an_inner_scopes_is_the_callers(
    verb: str, entered: bool
) -> None:
    loop, scope = make_loop(), anyio.CancelScope()

    async def agent(_: int = 0) -> int:
        await anyio.sleep(9)
        return 0

    async def stream(x: int = 0) -> AsyncGenerator[int]:
        yield await agent(x)

    async def read() -> None:
        opened: dict[str, Any] = {
            "run_streaming": lambda: loop.run_streaming("agent", stream),
            "as_completed": lambda: loop.as_completed(Invocation.map(agent, [0])),
            "stream_all": lambda: loop.stream_all(Invocation.map(stream, [0])),
        }
        async with within(loop, entered), opened[verb]() as items:
            with scope:
                await anext(items)

    task = asyncio.ensure_future(read())
    await asyncio.sleep(1)
    scope.cancel()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert loop.statistics().running == 0


async def test_native_timeout_of_a_batch_is_not_lost_where_an_agent_left_a_scope_open() -> None:
    async def leave_open() -> None:
        anyio.CancelScope().__enter__()

    async def clean_up_slowly() -> None:
        try:
            await anyio.sleep(9)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)

    # The cancellation arrives while an agent cleans up after its own time-out.
    loop = make_loop(timeout_seconds=0.5)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6):
            await loop.run_all([Invocation("a", leave_open), Invocation("b", clean_up_slowly)])

    assert loop.statistics().running == 0


# -- the library's own tasks


def tasks_named(name: str) -> list[asyncio.Task[Any]]:
    """Return the tasks of the library that have a name and have not ended, but for the current one."""
    tasks = asyncio.all_tasks() - {current_task()}
    return [task for task in tasks if task.get_name() == f"agentloop {name}" and not task.done()]


async def results_of(verb: str, loop: AgentLoop, inputs: Any) -> tuple[list[Any], BaseException | None]:
    results: list[Any] = []
    try:
        await run_into(results, verb, loop, inputs)
    except (BatchStopped, InvocationCancelled) as exc:
        return results, exc

    return results, None


@entered_or_not
@each_batch
@pytest.mark.parametrize("source", ["list", "generator", "async"])
@pytest.mark.parametrize("name", ["worker", "alarm", "feeder", "producer", "watch"])
async def test_own_task_that_is_cancelled_from_outside_costs_no_result(
    name: str, source: str, verb: str, entered: bool
) -> None:
    backoff = Backoff(initial_seconds=9, jitter="none")
    loop = make_loop(max_concurrency=2, max_retries=1, backoff=backoff, idle_timeout_seconds=20)
    failed = cancelled = 0

    async def agent(x: int) -> int:
        nonlocal failed, cancelled
        await asyncio.sleep(1)
        if x == 0 and not failed:
            failed = 1
            raise ConnectionError

        if x == 3:
            for task in tasks_named(name):
                cancelled += 1
                task.cancel()

        return x

    async def stream(x: int) -> AsyncGenerator[int]:
        yield await agent(x)
        await asyncio.sleep(0.5)
        yield x

    def jobs() -> Any:
        yield from Invocation.map(stream if verb == "stream_all" else agent, range(20))

    async def async_jobs() -> AsyncGenerator[Any]:
        for job in jobs():
            yield job
            await asyncio.sleep(0.1)

    inputs = {"list": lambda: [*jobs()], "generator": jobs, "async": async_jobs}[source]()
    with anyio.fail_after(500):
        async with within(loop, entered):
            results, error = await results_of(verb, loop, inputs)

    statuses = [result.status for result in results]
    if error is None:
        assert sorted(result.index for result in results) == list(range(20))
        assert Status.SKIPPED not in statuses

    # A worker costs its own agent, and nothing else does anything but what reads the input or the results.
    if cancelled and name in ("alarm", "watch"):
        assert statuses == [Status.SUCCESS] * 20
    elif name == "worker":
        assert error is None
        assert statuses.count(Status.CANCELLED) <= cancelled


@pytest.mark.parametrize("asynchronous", [False, True])
@each_batch
@pytest.mark.parametrize("at", [0, 1, 3])
async def test_own_task_that_is_cancelled_before_it_begins_stops_the_batch(
    verb: str, at: int, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    event_loop = asyncio.get_running_loop()
    create_task = event_loop.create_task

    def create_and_cancel(coroutine: Any, *, name: str | None = None) -> asyncio.Task[Any]:
        task = create_task(coroutine, name=name)
        if name == "agentloop worker":
            started.append(1)
            if len(started) == at + 1:
                task.cancel()

        return task

    async def agent(x: int) -> int:
        await asyncio.sleep(1 + x)
        return x

    jobs = [*Invocation.map(agent_for(verb, agent), range(9))]

    async def one_a_second() -> AsyncGenerator[Any]:
        for job in jobs:
            yield job
            await asyncio.sleep(1)

    loop = make_loop(max_concurrency=4)
    monkeypatch.setattr(event_loop, "create_task", create_and_cancel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its coroutine was never awaited
        inputs = one_a_second() if asynchronous else jobs
        results, stopped = await run_until_stopped(verb, loop, inputs)
        gc.collect()

    if verb == "run_all" and not asynchronous:
        assert [result.index for result in results] == list(range(9))

    assert stopped.reason == "one of its own tasks was cancelled from outside"
    assert {result.status for result in results} <= {Status.SUCCESS, Status.CANCELLED, Status.SKIPPED}
    assert loop.statistics().running == 0


async def test_stream_whose_task_is_cancelled_from_outside_does_not_look_complete() -> None:
    got = []
    with pytest.raises(InvocationCancelled):
        async with AgentLoop().run_streaming("a", one_a_second, 9) as chunks:
            async for chunk in chunks:
                got.append(chunk)
                if chunk == 3:
                    [task] = tasks_named("producer")
                    task.cancel()

    assert got == [0, 1, 2, 3]


async def test_spoilt_task_that_is_cancelled_natively_waits_on() -> None:
    async def agent(x: int) -> int:
        if x == 0:
            anyio.CancelScope().__enter__()
            return x

        if x == 1:
            await asyncio.sleep(1)
            for task in tasks_named("worker"):
                task.cancel()

        await asyncio.sleep(2)
        return x

    results = await make_loop(max_concurrency=2).run_all(Invocation.map(agent, range(6)))
    assert [result.output for result in results if result.success] == [1, 3, 4, 5]
    assert results[2].status is Status.CANCELLED
    assert isinstance(results[0].exception, LeftOpenError)


@pytest.mark.parametrize("how", ["cancel", "raise", "late"])
async def test_native_cancellation_while_an_input_is_closed_is_survived(how: str) -> None:
    closed = 0

    async def inputs() -> AsyncGenerator[Any]:
        nonlocal closed
        try:
            for x in range(9):
                yield ("a", agent, (x,), {})
        finally:
            if how == "raise":
                raise asyncio.CancelledError

            await asyncio.sleep(99 if how == "late" else 3)
            closed += 1

    async def agent(x: int) -> None:
        await asyncio.sleep(1)
        if x == 1:
            raise FakeHTTPError(401)

        if x == 0:
            await asyncio.sleep(1)
            for task in tasks_named("feeder") if how == "cancel" else ():
                task.cancel()

    with pytest.raises(BatchStopped) as caught:
        await make_loop(max_concurrency=2).run_all(inputs())

    assert len(caught.value.results) == 2
    assert not closed


async def test_feeder_that_is_cancelled_natively_while_it_waits_for_room_goes_on() -> None:
    async def inputs() -> AsyncGenerator[Any]:
        for x in range(5):
            yield Invocation("a", ok, (x,))

    async def cancel() -> None:
        await anyio.sleep(1.5)
        [feeder] = tasks_named("feeder")
        feeder.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        results = await make_loop(max_concurrency=1).run_all(inputs())

    assert [result.output for result in results] == list(range(5))


@pytest.mark.parametrize("busy", [False, True])
async def test_limiter_that_another_event_loop_has_taken_meanwhile_is_taken_back_if_it_is_idle(
    busy: bool,
) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    begun, over = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        await anyio.to_thread.run_sync(over.wait)

    def elsewhere() -> None:
        asyncio.run(loop.run_single("b", wait if busy else checkpoint))
        begun.set()

    thread = threading.Thread(target=elsewhere)
    outcome: Any = pytest.raises(RuntimeError, match="in use") if busy else contextlib.nullcontext()
    with outcome:
        async with loop.as_completed(Invocation.map(ok, range(3))) as results:
            # The batch has not begun: nothing was awaited since it was made.
            thread.start()
            begun.wait()
            if not busy:
                thread.join()

            assert sorted([result.output async for result in results]) == [0, 1, 2]

    over.set()
    thread.join()


# -- native cancellation of the library's own tasks, before their first step


@contextlib.contextmanager
def losing(name: str) -> Iterator[None]:
    """Cancel the first task of a name before it can begin."""
    lost: list[str] = []

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        new: list[asyncio.Task[Any]] = []

        def cancel() -> None:
            if new[0].get_name() == name and not lost:
                lost.append(name)
                new[0].cancel()

        # Before the first step of the task, which is scheduled next.
        loop.call_soon(cancel)
        new.append(asyncio.Task(coro, loop=loop, **options))
        return new[0]

    loop = asyncio.get_running_loop()
    loop.set_task_factory(make)
    try:
        yield
    finally:
        loop.set_task_factory(None)

    assert lost


@pytest.fixture
def never_begun() -> Iterator[None]:
    """Let no other test find what AnyIO was to run in a task that never began, and does not close."""
    yield
    gc.collect()


def loses_tasks(test: Any) -> Any:
    """Mark a test in which tasks are cancelled before they can begin."""
    ignore = pytest.mark.filterwarnings("ignore:coroutine 'Tasks._run' was never awaited")
    return ignore(pytest.mark.usefixtures("never_begun")(test))


@loses_tasks
@pytest.mark.parametrize("elsewhere", [False, True])
@entered_or_not
@pytest.mark.parametrize("verb", ["run_streaming", "as_completed", "stream_all"])
async def test_stream_whose_task_was_cancelled_before_it_began_raises(
    verb: str, entered: bool, elsewhere: bool
) -> None:
    loop = AgentLoop()

    async def read() -> None:
        with pytest.raises(InvocationCancelled, match="cancelled from outside"), losing("agentloop producer"):
            if verb == "run_streaming":
                async with loop.run_streaming("a", chunks_of, ok) as stream:
                    await anext(stream)
            else:
                await run(verb, loop, jobs(verb, ok))

    async def use() -> None:
        async with within(loop, entered):
            if elsewhere:
                await asyncio.ensure_future(read())
            else:
                await read()

            await asyncio.sleep(1)

    # What else an entered loop has to do would be cancelled too.
    raises = pytest.raises(InvocationCancelled, match="cancelled from outside")
    with raises if entered else contextlib.nullcontext():
        await use()

    counts = loop.metrics.snapshot().counts
    assert sum(counts.values()) == counts[Status.SKIPPED] == (verb == "run_streaming")


@loses_tasks
@entered_or_not
async def test_stream_whose_watch_was_cancelled_before_it_began_raises(entered: bool) -> None:
    loop = AgentLoop(LoopConfig(idle_timeout_seconds=5))
    with pytest.raises(InvocationCancelled):
        async with within(loop, entered):
            with losing("agentloop watch"):
                async with loop.run_streaming("a", slowly, 10) as stream:
                    async for _ in stream:
                        pass

    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


@loses_tasks
async def test_reader_that_is_cancelled_while_its_stream_begins_leaves_nothing() -> None:
    async with AgentLoop() as loop:
        task = asyncio.ensure_future(run_stream(loop, chunks_of, ok))
        await asyncio.sleep(0)
        task.cancel()
        await cancelled(task)


async def test_reader_that_is_cancelled_natively_before_its_stream_begins_leaves_nothing() -> None:
    loop = AgentLoop()

    async def read() -> None:
        async with loop.run_streaming("a", slowly, 10):
            current_task().cancel()

    await cancelled(asyncio.ensure_future(read()))
    assert tasks_named("producer") == []
    assert loop.metrics.snapshot().counts[Status.SKIPPED] == 1


async def test_spoilt_task_that_is_cancelled_natively_waits_for_the_tasks_left_in_it() -> None:
    ended = False
    groups: list[Any] = []

    async def slow() -> None:
        nonlocal ended
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2)

            ended = True

    async def agent() -> None:
        groups.append(anyio.create_task_group())
        await groups[0].__aenter__()
        groups[0].start_soon(slow)
        await checkpoint()

    async def sabotage() -> None:
        await asyncio.sleep(1)
        for task in tasks_named("worker"):
            task.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(sabotage)
        [result] = await AgentLoop(LoopConfig(max_concurrency=2)).run_all([Invocation("a", agent)])
        assert isinstance(result.exception, LeftOpenError)
        assert ended


async def test_cancellation_in_the_moment_of_a_drain_leaves_the_line_in_order() -> None:
    limiter, end = Limiter(1), anyio.Event()
    drained, other = AgentLoop(limiter=limiter), AgentLoop(limiter=limiter)
    async with anyio.create_task_group() as group:
        group.start_soon(other.run_single, "running", end.wait)
        await anyio.wait_all_tasks_blocked()
        waiting = asyncio.ensure_future(drained.run_single("waiting", ok))
        await anyio.wait_all_tasks_blocked()
        drained.drain()
        waiting.cancel()
        await cancelled(waiting)
        group.start_soon(other.run_single, "next", ok)
        await anyio.wait_all_tasks_blocked()
        end.set()
