"""Blocking functions as agents: in_thread()."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import attrs
import pytest
from agents import agent_for, backends, count, double, run, run_into, run_stream

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Invocation,
    InvocationTimeout,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    Status,
    current_attempt,
    in_thread,
)
from agentloop._runtime.threads import _Place

var: ContextVar[Any] = ContextVar("var", default="unset")

ONCE = LoopConfig(max_retries=0)
SHORT = LoopConfig(max_retries=0, timeout_seconds=0.15, max_concurrency=1)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Real clocks: a virtual one stands still while a thread works, and these threads hang."""
    return str(request.param)


class Hanging:
    """A blocking function that hangs until it is released, and counts how many threads are in it."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.now = self.most = self.calls = 0

    def __call__(self, x: Any = None) -> Any:
        with self.lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)

        assert self.released.wait(10)
        with self.lock:
            self.now -= 1

        return x


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.released.set()


@pytest.fixture
async def full(hanging: Hanging) -> AgentLoop:
    """A loop whose only place is taken by a thread that hangs."""
    loop = AgentLoop(SHORT)
    await abandon(loop, hanging)
    return loop


async def until(condition: Callable[[], object]) -> None:
    """Wait for what threads do."""
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.001)


async def call(results: list[Any], loop: AgentLoop, fn: Any, *args: Any) -> None:
    results.append(await loop.run_single("a", in_thread(fn), *args))


async def refuses(loop: AgentLoop) -> None:
    """Look whether there is no place for a thread."""
    with anyio.move_on_after(0.05):
        await loop.run_single("a", in_thread(int))
        pytest.fail("there was a place")


async def abandon(loop: AgentLoop, hanging: Hanging, count: int = 1) -> None:
    """Leave threads behind that hang."""
    results = await loop.run_all(Invocation.map(in_thread(hanging), range(count)))
    assert [result.status for result in results] == [Status.TIMEOUT] * count
    assert hanging.now == count


# --- what it returns and raises


async def test_blocking_function_is_run_in_a_worker_thread() -> None:
    def whoami(number: int, *, scale: int) -> tuple[bool, int]:
        return threading.current_thread() is threading.main_thread(), number * scale

    loop = AgentLoop(ONCE)
    assert (await loop.run_single("a", in_thread(whoami), 2, scale=3)).unwrap() == (False, 6)
    results = await loop.run_all([Invocation("a", in_thread(whoami), (2,), {"scale": 4})])
    assert results[0].unwrap() == (False, 8)


async def test_error_of_the_function_is_the_object_that_it_raised() -> None:
    error = OSError("broken")

    def fail() -> None:
        raise error

    result = await AgentLoop(ONCE).run_single("a", in_thread(fail))
    assert result.exception is error


@pytest.mark.parametrize("verb", ["run_single", "run_all"])
async def test_function_is_retried_and_sees_its_attempt_and_the_agents_variables(verb: str) -> None:
    seen: list[Any] = []

    def flaky() -> str:
        attempt = current_attempt()
        seen.append((attempt.agent_id, attempt.number, len(attempt.failures), var.get()))
        if attempt.number < 3:
            raise OSError

        return attempt.idempotency_key

    var.set("caller")
    loop = AgentLoop(LoopConfig(max_retries=2, backoff=Backoff(0.001, jitter="none")))
    [result] = await run(verb, loop, [Invocation("a", in_thread(flaky))])
    assert result.unwrap()
    assert result.retries == 2
    assert seen == [("a", number, number - 1, "caller") for number in (1, 2, 3)]


async def test_stop_iteration_of_the_function_is_told() -> None:
    def take() -> object:
        return next(iter(()))

    result = await AgentLoop(ONCE).run_single("a", in_thread(take))
    assert isinstance(result.exception, RuntimeError)
    assert "take" in str(result.exception)
    assert "raised StopIteration" in str(result.exception)
    assert isinstance(result.exception.__cause__, StopIteration)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@backends
def test_interrupt_propagates(backend: Any, error: type[BaseException]) -> None:
    def interrupt() -> None:
        raise error

    with pytest.raises(BaseException) as caught:
        anyio.run(AgentLoop(ONCE).run_single, "a", in_thread(interrupt), backend=backend)

    assert (
        caught.group_contains(error) if isinstance(caught.value, BaseExceptionGroup) else caught.type is error
    )


# --- what it refuses


def letters() -> Iterator[str]:
    yield "a"


class Letters:
    def __call__(self) -> Iterator[str]:
        return (yield from letters())


@pytest.mark.parametrize("fn", [double, count, partial(double), in_thread(int)])
def test_async_function_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="fn must be a plain function, got an async one"):
        in_thread(fn)


@pytest.mark.parametrize("fn", [letters, partial(letters), Letters()])
def test_generator_function_is_refused(fn: Any) -> None:
    with pytest.raises(
        TypeError, match=r"got a generator function, .*: a blocking function cannot be streamed; return a"
    ):
        in_thread(fn)


def test_function_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="fn must be callable, got 5"):
        in_thread(5)  # type: ignore[arg-type]  # what the test is about


async def test_function_that_returns_a_coroutine_stops_its_batch() -> None:
    jobs = Invocation.map(in_thread(lambda x: double(x)), range(3))
    results = await AgentLoop(attrs.evolve(SHORT, timeout_seconds=5)).run_all(jobs)
    assert isinstance(results[0].exception, TypeError)
    assert "returned a coroutine: pass an async function itself" in str(results[0].exception)
    assert isinstance(results[1].exception, BatchStopped)


async def test_streams_refuse_it() -> None:
    _, error, _ = await run_stream(AgentLoop(ONCE), in_thread(list))
    assert isinstance(error, TypeError)
    assert "pass an async generator function" in str(error)


async def test_blocking_function_as_an_agent_is_told_to_be_wrapped() -> None:
    def blocking() -> int:
        return 5

    result = await AgentLoop(ONCE).run_single("a", blocking)  # type: ignore[arg-type]  # the point
    assert str(result.exception).endswith(
        "cannot be awaited: pass an async function, or in_thread(fn) for a blocking one"
    )


# --- what it looks like


def test_agent_has_the_name_of_its_function() -> None:
    def parse(text: str) -> str:
        """Parse."""
        return text

    agent = in_thread(parse)
    assert (agent.__name__, agent.__doc__, vars(agent)["__wrapped__"]) == ("parse", "Parse.", parse)
    agents: list[Any] = [agent, in_thread(partial(parse)), in_thread(Hanging()), in_thread(time.sleep)]
    ids = [next(iter(Invocation.map(agent, [""]))).agent_id for agent in agents]
    assert ids == ["parse-0", "parse-0", "Hanging-0", "sleep-0"]


# --- how many there are at once


@pytest.mark.parametrize("limit", [3, 50], ids=["few", "more than AnyIO's default"])
async def test_as_many_threads_run_at_once_as_the_limit(limit: int) -> None:
    lock, all_in = threading.Lock(), threading.Barrier(limit, timeout=5)
    running = most = 0

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

        all_in.wait()
        with lock:
            running -= 1

    loop = AgentLoop(LoopConfig(max_concurrency=limit, max_retries=0))
    for result in await loop.run_all(Invocation.map(in_thread(work), range(4 * limit))):
        result.unwrap()

    assert most == limit


async def test_abandoned_threads_keep_their_places_and_calls_that_wait_are_not_timed_out(
    hanging: Hanging,
) -> None:
    config = LoopConfig(max_concurrency=2, timeout_seconds=0.15, max_retries=3, backoff=Backoff(0.001))
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        jobs = Invocation.map(in_thread(hanging), range(6))
        group.start_soon(run_into, results, "run_all", AgentLoop(config), jobs)
        await until(lambda: hanging.now == 2)
        # Time enough for many time-outs.
        await anyio.sleep(0.4)
        assert (hanging.calls, hanging.now) == (2, 2)
        hanging.released.set()

    assert [result.unwrap() for result in results] == list(range(6))
    assert hanging.most == 2
    # Each of those that were timed out had a thread.
    retries = sum(result.retries for result in results)
    assert retries >= 2
    assert hanging.calls == 6 + retries


async def test_attempt_is_timed_out_while_its_thread_hangs_and_another_one_when_it_has_waited(
    hanging: Hanging, full: AgentLoop
) -> None:
    again = Hanging()
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(call, results, full, again)
        await anyio.sleep(0.25)
        assert not results
        hanging.released.set()

    (result,) = results
    assert (result.status, again.calls) == (Status.TIMEOUT, 1)
    assert isinstance(result.exception, InvocationTimeout)
    assert (result.exception.seconds, result.exception.total) == (0.15, False)
    again.released.set()
    await until(lambda: not again.now)
    # The next attempt in the same scope has its own deadline.
    assert (await full.run_single("a", in_thread(int))).unwrap() == 0


@pytest.mark.parametrize("verb", ["run_single", "run_all"])
async def test_total_timeout_goes_on_while_a_call_waits_for_a_place(full: AgentLoop, verb: str) -> None:
    bounded = full.with_config(total_timeout_seconds=0.3)
    [result] = await run(verb, bounded, [Invocation("a", in_thread(int))])
    assert isinstance(result.exception, InvocationTimeout)
    assert (result.exception.seconds, result.exception.total) == (0.3, True)


async def test_total_timeout_bounds_an_attempt_that_has_waited(hanging: Hanging) -> None:
    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=0.2))
    await abandon(loop, hanging)
    again = Hanging()
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(call, results, loop.with_config(total_timeout_seconds=0.25), again)
        await anyio.sleep(0.1)
        hanging.released.set()

    assert isinstance(results[0].exception, InvocationTimeout)
    assert results[0].exception.total
    again.released.set()


async def test_retried_attempt_that_waits_for_a_place_is_not_timed_out(hanging: Hanging) -> None:
    loop = AgentLoop(attrs.evolve(SHORT, max_retries=1, backoff=Backoff(0.001)))
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(call, results, loop, hanging, 5)
        await anyio.sleep(0.4)
        hanging.released.set()

    assert (results[0].unwrap(), results[0].retries) == (5, 1)


async def test_calls_of_one_attempt_that_wait_together_move_its_deadline_once(
    hanging: Hanging, full: AgentLoop
) -> None:
    deadlines: list[float] = []
    began: list[float] = []

    async def agent() -> None:
        began.append(anyio.current_time())
        deadlines.append(anyio.current_effective_deadline())
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(in_thread(int))

            await anyio.wait_all_tasks_blocked()
            deadlines.append(anyio.current_effective_deadline())

        deadlines.append(anyio.current_effective_deadline())
        began.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        group.start_soon(full.run_single, "a", agent)
        await anyio.sleep(0.1)
        hanging.released.set()

    before, meanwhile, after = deadlines
    assert meanwhile == float("inf")
    # By at least what it has waited, and by no more than all that went by.
    assert 0.05 < after - before <= began[1] - began[0]


async def test_stream_that_calls_a_function_counts_the_wait(full: AgentLoop) -> None:
    _, error, _ = await run_stream(full, agent_for("run_streaming", in_thread(int)))
    assert isinstance(error, InvocationTimeout)


async def test_raised_limit_lets_a_call_that_waits_go_on_and_a_lowered_one_holds(full: AgentLoop) -> None:
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(call, results, full, int)
        await anyio.wait_all_tasks_blocked()
        full.limiter.max_concurrency = 2

    assert results[0].unwrap() == 0
    full.limiter.max_concurrency = 1
    await refuses(full)


async def test_limiter_that_is_not_adaptive_bounds_threads_too(hanging: Hanging) -> None:
    config = attrs.evolve(SHORT, max_concurrency=10)
    loop = AgentLoop(config, limiter=Limiter(1, adaptive=False))
    await abandon(loop, hanging)
    await refuses(loop)


async def test_each_key_has_places_of_its_own(hanging: Hanging) -> None:
    limiter = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: Limiter(1))
    loop = AgentLoop(attrs.evolve(SHORT, max_concurrency=10), limiter=limiter)
    assert (await loop.run_single("a", in_thread(hanging))).status is Status.TIMEOUT
    assert (await loop.run_single("b", in_thread(int))).unwrap() == 0
    await refuses(loop)


# --- cancellation


async def test_cancelled_caller_leaves_a_thread_behind_that_keeps_its_place(hanging: Hanging) -> None:
    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=None))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "a", in_thread(hanging))
        await until(lambda: hanging.now)
        group.cancel_scope.cancel()

    assert loop.statistics().running == 0
    # While it waits for a place, a call can be cancelled too, and leaves nothing in line.
    for _ in range(2):
        await refuses(loop)

    hanging.released.set()
    assert (await loop.run_single("a", in_thread(int))).unwrap() == 0


async def test_natively_cancelled_caller_leaves_a_thread_behind(hanging: Hanging, anyio_backend: str) -> None:
    if anyio_backend == "trio":
        pytest.skip("trio has no native cancellation")

    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=None))
    for agent in (hanging, int):  # in its thread, and waiting for a place
        task = asyncio.create_task(loop.run_single("a", in_thread(agent)))
        await until(lambda: hanging.now)
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    hanging.released.set()
    assert (await loop.run_single("a", in_thread(int))).unwrap() == 0
    assert hanging.calls == 1


async def test_call_that_is_cancelled_before_its_thread_begins_gives_its_place_back() -> None:
    calls: list[None] = []

    async def agent() -> int:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await in_thread(calls.append)(None)

        return await in_thread(int)()

    assert (await AgentLoop(attrs.evolve(SHORT, timeout_seconds=5)).run_single("a", agent)).unwrap() == 0
    assert not calls


def test_thread_that_begins_after_its_call_was_cancelled_does_not_call_the_function() -> None:
    nowhere: Any = SimpleNamespace(loop=None)
    place = _Place(nowhere, nowhere, None)
    assert place.cancel()
    assert place.run(pytest.fail) is None


async def test_function_can_ask_whether_it_was_cancelled() -> None:
    ended = threading.Event()

    def work() -> None:
        try:
            while True:
                anyio.from_thread.check_cancelled()
                time.sleep(0.001)
        finally:
            ended.set()

    assert (await AgentLoop(SHORT).run_single("a", in_thread(work))).status is Status.TIMEOUT
    await until(ended.is_set)


async def test_task_left_over_from_an_attempt_moves_no_deadline(hanging: Hanging, full: AgentLoop) -> None:
    outputs: list[int] = []
    async with anyio.create_task_group() as group:

        async def linger(before: anyio.Event) -> None:
            await before.wait()
            outputs.append(await in_thread(int)())

        async def agent() -> None:
            now, later = anyio.Event(), anyio.Event()
            now.set()
            # One waits for its place before the attempt has ended, and one afterwards.
            group.start_soon(linger, now)
            group.start_soon(linger, later)
            await anyio.sleep(0.01)
            ends.append(later)

        ends: list[anyio.Event] = []
        (await full.run_single("a", agent)).unwrap()
        ends[0].set()
        await anyio.wait_all_tasks_blocked()
        deadlines: list[float] = []

        async def other() -> None:
            deadlines.append(anyio.current_effective_deadline())
            hanging.released.set()
            await until(lambda: len(outputs) == 2)
            deadlines.append(anyio.current_effective_deadline())

        (await full.with_config(timeout_seconds=5).run_single("b", other)).unwrap()

    assert deadlines[0] == deadlines[1]


# --- where it runs


async def test_nested_agents_run_functions_with_one_slot() -> None:
    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=5))

    async def outer() -> int:
        results = await loop.run_all(Invocation.map(in_thread(abs), [-1, -2]))
        return sum(result.unwrap() for result in results)

    assert (await loop.run_single("outer", outer)).unwrap() == 3


async def test_thread_that_runs_agents_counts_for_their_threads_too() -> None:
    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=5))

    def outer() -> int:
        return anyio.from_thread.run(loop.run_single, "inner", in_thread(int)).unwrap() + 1

    assert (await loop.run_single("outer", in_thread(outer))).unwrap() == 1


async def test_event_loop_of_its_own_in_a_thread_has_nothing_to_do_with_the_places(
    anyio_backend: str,
) -> None:
    def outer() -> int:
        return anyio.run(in_thread(int), backend=anyio_backend)

    loop = AgentLoop(attrs.evolve(SHORT, timeout_seconds=5))
    assert (await loop.run_single("a", in_thread(outer))).unwrap() == 0


async def test_called_outside_of_an_agent_it_runs_the_function_in_a_thread() -> None:
    assert await in_thread(threading.current_thread)() is not threading.current_thread()
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await in_thread(next)(iter(()))


@backends
def test_thread_may_end_after_its_event_loop(backend: Any, hanging: Hanging) -> None:
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        hanging()

    loop = AgentLoop(SHORT)
    for _ in range(2):
        # In each event loop the places are new.
        result = anyio.run(loop.run_single, "a", in_thread(work), backend=backend)
        assert result.status is Status.TIMEOUT

    hanging.released.set()
    for thread in threads:
        # Trio keeps its threads for a while.
        if backend == "asyncio":
            thread.join(5)

    while hanging.now:
        time.sleep(0.001)
