"""The scope that times out one attempt after the other."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest
from agents import backends, run, run_scheduled
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint, current_token

from agentloop import AgentLoop, Backoff, Invocation, InvocationTimeout, Limiter, LoopConfig, Status
from agentloop._eventloop.deadlines import AttemptScope, DeadlineQueue, TimeLimit
from agentloop._eventloop.insides import AsyncioScope
from agentloop._eventloop.loop import kind_of_loop
from agentloop._eventloop.public import PublicScope
from agentloop.testing import Fail, FakeAgent, Reply, VirtualClockDeadlock


async def sleep(seconds: float) -> float:
    with anyio.CancelScope():  # one of the agent's own lies within ours
        await anyio.sleep(seconds)

    return anyio.current_effective_deadline() - anyio.current_time()


class PublicLimiter(Limiter):
    """Has its attempts run without the insides of AnyIO and trio."""

    def _make_pool(self) -> Any:
        pool = super()._make_pool()
        pool.loop = pool.kind(pool.token, public=True)
        return pool


@pytest.fixture(params=[Limiter, PublicLimiter])
def limiter(request: pytest.FixtureRequest) -> Limiter:
    return request.param(1)


@pytest.fixture
def loop(limiter: Limiter) -> AgentLoop:
    return AgentLoop(LoopConfig(timeout_seconds=5, max_retries=0), limiter=limiter)


async def test_each_attempt_of_a_worker_has_its_own_time(loop: AgentLoop) -> None:
    results = await loop.run_all(Invocation.map(sleep, [1, 4, 4.5, 9, 4.75, 1, 8, 8]))
    timed_out = [result.status is Status.TIMEOUT for result in results]
    assert timed_out == [False, False, False, True, False, False, True, True]
    assert [result.latency_ms for result in results] == [
        pytest.approx(1000 * seconds) for seconds in (1, 4, 4.5, 5, 4.75, 1, 5, 5)
    ]


async def test_agent_sees_its_own_deadline(loop: AgentLoop) -> None:
    results = await loop.run_all(Invocation.map(sleep, [1, 2, 3, 0, 4]))
    assert [result.output for result in results] == [
        pytest.approx(5 - seconds) for seconds in (1, 2, 3, 0, 4)
    ]


async def test_attempt_is_not_charged_for_the_time_in_which_its_worker_had_nothing_to_do(
    loop: AgentLoop,
) -> None:
    async def inputs() -> Any:
        for _ in range(3):
            yield Invocation("a", sleep, (1,))
            await anyio.sleep(30)

    results = await loop.run_all(inputs())
    assert [result.status for result in results] == [Status.SUCCESS] * 3


async def test_earlier_deadline_than_that_of_the_attempt_before_is_kept(loop: AgentLoop) -> None:
    loop = loop.with_config(total_timeout_seconds=6, max_retries=1, timeout_seconds=4)
    results = await loop.run_all(Invocation.map(sleep, [1, 20, 1]))
    assert [result.status for result in results] == [Status.SUCCESS, Status.TIMEOUT, Status.SUCCESS]
    assert results[1].latency_ms == pytest.approx(6000)


async def test_result_that_was_ready_when_the_time_was_up_leaves_the_next_attempt_its_time(
    loop: AgentLoop,
) -> None:
    async def stubborn() -> str:
        try:
            await anyio.sleep(9)
        except BaseException:
            pass

        return "late"

    results = await loop.run_all([Invocation("a", stubborn), Invocation("b", sleep, (4,))])
    assert [result.output for result in results] == ["late", pytest.approx(1)]


@pytest.mark.parametrize("kind", [Limiter, PublicLimiter])
@backends
def test_attempt_that_had_less_time_than_others_leaves_the_next_one_its_time(
    backend: str, kind: type[Limiter]
) -> None:
    fail_once = FakeAgent(Fail(ConnectionError, after_seconds=3), Reply(after_seconds=1))

    async def main() -> None:
        backoff = Backoff(initial_seconds=0.25, jitter="none")
        config = LoopConfig(timeout_seconds=5, total_timeout_seconds=6, max_retries=1, backoff=backoff)
        loop = AgentLoop(config, limiter=kind(2))
        start = anyio.current_time()

        async def inputs() -> AsyncIterator[Invocation[Any]]:
            yield Invocation("a", sleep, (2,))
            yield Invocation("b", fail_once)  # again at 3.25, until 6 at most
            yield Invocation("c", sleep, (4,))  # at 2, until 7 at most
            await anyio.sleep_until(start + 3.5)
            yield Invocation("d", sleep, (4.5,))  # at 4.25, after b, until 9.25 at most

        results = await loop.run_all(inputs())
        assert [result.error for result in results] == [None] * 4
        assert anyio.current_time() - start == pytest.approx(8.75)

    run_scheduled(backend, None, main)


async def test_worker_that_waits_in_line_is_not_cancelled_by_the_deadline_of_its_attempt_before(
    limiter: Limiter, loop: AgentLoop
) -> None:
    order: list[str] = []

    async def work(name: str, seconds: float) -> None:
        order.append(name)
        await anyio.sleep(seconds)

    async def later(name: str, begin: float, seconds: float) -> None:
        await anyio.sleep(begin)
        await AgentLoop(limiter=limiter).run_single(name, work, name, seconds)

    async with anyio.create_task_group() as group:
        group.start_soon(later, "b", 0.5, 20)
        group.start_soon(later, "d", 2, 1)
        await loop.run_all([Invocation("a", work, ("a", 1)), Invocation("c", work, ("c", 1))])

    # A worker that was cancelled would have stood in line again, behind d.
    assert order == ["a", "b", "c", "d"]


@pytest.mark.parametrize("verb", ["run_all", "run_single"])
async def test_slot_is_given_back_if_the_scope_cannot_be_entered(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=1), limiter=limiter)
    await loop.run_single("a", checkpoint)
    for kind in (kind_of_loop().inside_scope, PublicScope):

        def fail(scope: AttemptScope, deadline: float, begin: Any = kind.begin) -> bool:
            if math.isfinite(deadline):
                raise MemoryError

            return bool(begin(scope, deadline))

        monkeypatch.setattr(kind, "begin", fail)

    with pytest.raises(MemoryError):
        await run(verb, loop, [Invocation("a", checkpoint)])

    assert loop.statistics().running == 0


# --- one timer for all attempts


class ByHand(DeadlineQueue):
    """Notes the time of its timer, and fires only by hand."""

    def __init__(self, stops_timer: bool = True) -> None:
        super().__init__(stops_timer)
        self.wound: list[float] = []

    def _set_timer(self, at: float) -> None:
        self._timer_at = at
        self.wound.append(at)

    def _stop_timer(self) -> None:
        self._set_timer(math.inf)


class Watched(PublicScope):
    """Notes when the queue has called it."""

    def __init__(self, queue: DeadlineQueue) -> None:
        super().__init__(anyio.current_time, anyio.CancelScope, queue)
        self.scope = cast("anyio.CancelScope", object())  # as if it were in use
        self.called_at: list[float] = []

    def due(self, now: float) -> None:
        self.called_at.append(now)


class TestDeadlineQueue:
    def test_scopes_are_called_in_order_once_their_time_is_up(self) -> None:
        queue = ByHand()
        a, b, c = (Watched(queue) for _ in range(3))
        assert [queue.watch(scope, at) for scope, at in ((a, 1), (b, 2), (c, 2))] == [True] * 3
        assert queue.wound == [1]
        queue.check_due(1)
        assert [scope.called_at for scope in (a, b, c)] == [[1], [], []]
        assert queue.wound == [1, 2]
        queue.check_due(5)
        assert [scope.called_at for scope in (a, b, c)] == [[1], [5], [5]]
        assert queue.wound == [1, 2]

    def test_time_before_that_of_another_scope_is_not_watched(self) -> None:
        queue = ByHand()
        late, early = Watched(queue), Watched(queue)
        assert queue.watch(late, 10)
        assert not queue.watch(early, 5)
        assert queue.watch(early, 10)
        queue.check_due(10)
        assert (late.called_at, early.called_at) == ([10], [10])

    def test_scope_is_watched_for_its_latest_time_alone(self) -> None:
        queue = ByHand()
        first, last = Watched(queue), Watched(queue)
        for scope, at in ((first, 1), (last, 2), (first, 3)):
            assert queue.watch(scope, at)

        queue.check_due(2)
        assert (first.called_at, last.called_at, queue.wound) == ([], [2], [1, 3])
        # Too early, so that it is not watched at all.
        assert queue.watch(last, 4)
        assert not queue.watch(first, 2)
        queue.check_due(4)
        assert (first.called_at, last.called_at) == ([], [2, 4])

    def test_scope_without_a_deadline_is_not_watched(self) -> None:
        queue = ByHand()
        never, other = Watched(queue), Watched(queue)
        assert queue.watch(never, 1)
        assert queue.watch(never, math.inf)
        assert queue.watch(other, 2)
        queue.check_due(2)
        assert (never.called_at, other.called_at) == ([], [2])

    def test_empty_queue_takes_any_time(self) -> None:
        queue = ByHand()
        gone, rung, next_one = (Watched(queue) for _ in range(3))
        queue.watch(gone, 10)
        queue.forget(gone)
        assert queue.watch(rung, 5)
        queue.check_due(5)
        assert queue.watch(next_one, 4)
        queue.check_due(5)
        assert (gone.called_at, rung.called_at, next_one.called_at) == ([], [5], [5])

    def test_scopes_that_were_left_make_room_for_an_earlier_time(self) -> None:
        queue = ByHand()
        used, left, early = (Watched(queue) for _ in range(3))
        left.scope = None
        assert [queue.watch(scope, at) for scope, at in ((used, 3), (left, 10), (early, 5))] == [True] * 3
        assert queue.scopes == {used: 3, early: 5}
        assert not queue.watch(left, 4)
        used.scope = early.scope = None
        assert queue.watch(left, 1)
        assert queue.scopes == {left: 1}

    def test_scope_that_was_left_stays_for_the_next_attempt_until_it_is_due(self) -> None:
        async def main() -> None:
            queue = ByHand(stops_timer=False)
            scope = AsyncioScope(anyio.current_time, anyio.CancelScope, queue)
            at = anyio.current_time() + 1000
            for later in (0, 1):
                scope.begin(at + later)
                scope.leave()
                assert (queue.scopes, queue.wound) == ({scope: at}, [at])

            queue.check_due(at)
            assert queue.scopes == {}
            scope.begin(at + 2)
            assert queue.scopes == {scope: at + 2}
            scope.leave()
            scope.forget()
            assert queue.scopes == {}

        anyio.run(main, backend="asyncio")

    def test_scope_whose_agent_had_its_result_when_it_was_due_is_watched_for_the_next_one(self) -> None:
        async def main() -> None:
            queue = ByHand(stops_timer=False)
            scope = AsyncioScope(anyio.current_time, anyio.CancelScope, queue)
            at = anyio.current_time() + 1000
            scope.begin(at)
            queue.check_due(at)
            scope.leave()
            scope.begin(at + 1)
            assert queue.scopes == {scope: at + 1}
            scope.leave()

        anyio.run(main, backend="asyncio")

    def test_timer_is_stopped_on_a_virtual_clock_once_nothing_is_watched(self) -> None:
        queue = ByHand()
        first, last = Watched(queue), Watched(queue)
        queue.watch(first, 1)
        queue.watch(last, 2)
        queue.forget(first)
        assert queue.wound == [1]
        queue.forget(last)
        assert queue.wound == [1, math.inf]
        queue.watch(last, 3)
        assert queue.wound == [1, math.inf, 3]

    def test_timer_is_left_to_run_out_on_a_real_clock(self) -> None:
        queue = ByHand(stops_timer=False)
        scope = Watched(queue)
        for at in (10, 12):
            queue.watch(scope, at)
            queue.forget(scope)

        assert queue.wound == [10]
        queue.watch(scope, 14)
        queue.check_due(10)
        assert (scope.called_at, queue.wound) == ([], [10, 14])
        queue.forget(scope)
        # The timer would fire too late for this one.
        queue.watch(scope, 5)
        assert queue.wound == [10, 14, 5]


# --- the scopes of attempts


class Attempts:
    """
    Attempts that last until they are timed out, each in a task of its own.

    :param queue: cancels them in time, if the event loop does not
    """

    def __init__(self, public: bool, queue: DeadlineQueue | None) -> None:
        self.start = anyio.current_time()
        self.scopes: dict[str, AttemptScope] = {}
        self.ended: dict[str, float] = {}
        self._loop = kind_of_loop()(current_token(), public)
        self._queue = queue

    def make(self) -> AttemptScope:
        return self._loop.attempt_scope(self._queue)

    async def hold(self, name: str, moves: tuple[float, ...], *, task_status: TaskStatus[None]) -> None:
        self.scopes[name] = scope = self.make()
        for seconds in moves:
            self.begin(name, seconds)

        task_status.started()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as exc:
            if not scope.leave(exc):
                raise

        self.ended[name] = pytest.approx(anyio.current_time() - self.start)

    def begin(self, name: str, seconds: float) -> None:
        attempt = self.scopes[name]
        assert attempt.begin(self.start + seconds)
        assert attempt.scope is not None
        assert attempt.scope.deadline == self.start + seconds, name

    async def times(self) -> dict[str, float]:
        """Return after how many seconds each was timed out, if it was within twenty."""
        await anyio.sleep_until(self.start + 20)
        return dict(self.ended)


@asynccontextmanager
async def attempts(public: bool = False, **moves: tuple[float, ...]) -> AsyncIterator[Attempts]:
    """Begin attempts, in this order, and move their deadlines, in seconds from now."""
    queue = None if public else kind_of_loop()(current_token()).batch_deadlines()
    held = Attempts(public, queue)
    async with anyio.create_task_group() as group:
        if queue is not None:
            group.start_soon(queue.watch_scopes)

        for name, seconds in moves.items():
            await group.start(held.hold, name, seconds)

        yield held
        group.cancel_scope.cancel()


@pytest.mark.parametrize("public", [False, True], ids=["insides", "public"])
class TestAttemptScope:
    async def test_each_attempt_ends_at_its_own_time(self, public: bool) -> None:
        async with attempts(public, a=(1,), b=(2,), c=(3,), d=(3,)) as held:
            assert await held.times() == {"a": 1, "b": 2, "c": 3, "d": 3}

    async def test_each_move_of_a_deadline_is_kept(self, public: bool) -> None:
        # When the queue looks at a, which has moved, it watches others that end before and after it.
        async with attempts(public, a=(4, 6, 8, 14), b=(5, 5, 13), c=(12,)) as held:
            assert await held.times() == {"a": 14, "b": 13, "c": 12}

    async def test_attempt_that_ends_before_others_has_a_timer_of_its_own(self, public: bool) -> None:
        async with attempts(public, late=(10,), early=(1,), later=(11,), moved=(12, 5)) as held:
            assert await held.times() == {"early": 1, "moved": 5, "late": 10, "later": 11}

    async def test_attempt_with_a_timer_of_its_own_moves_it(self, public: bool) -> None:
        async with attempts(public, other=(10,), later=(5, 12), earlier=(5, 4), never=(5, math.inf)) as held:
            assert await held.times() == {"earlier": 4, "other": 10, "later": 12}

    async def test_attempt_without_a_deadline_is_not_timed_out(self, public: bool) -> None:
        async with attempts(public, never=(math.inf,), no_more=(2, math.inf), again=(math.inf, 3)) as held:
            assert await held.times() == {"again": 3}

    async def test_deadline_of_a_scope_can_be_set_as_that_of_any_other(self, public: bool) -> None:
        async with attempts(public, later=(1,), earlier=(8,)) as held:
            later, earlier = (attempt.scope for attempt in held.scopes.values())
            assert later is not None
            assert earlier is not None
            later.deadline = held.start + 9
            earlier.deadline = held.start + 7
            assert await held.times() == {"earlier": 7, "later": 9}

    @pytest.mark.parametrize("deadline", [3, 20], ids=["a timer of its own", "the queue's"])
    async def test_deadline_of_an_attempt_that_was_left_cancels_nothing(
        self, public: bool, deadline: float
    ) -> None:
        async with attempts(public, other=(10,)) as held:
            mine = held.make()
            assert mine.begin(held.start + deadline)
            await checkpoint()
            assert not mine.leave()
            assert await held.times() == {"other": 10}

    async def test_attempt_is_cancelled_for_a_reason(self, public: bool) -> None:
        async with attempts(public, a=(5,), b=(5,)) as held:
            held.scopes["a"].cancel("enough")
            assert held.scopes["a"].reason == "enough"
            assert await held.times() == {"a": 0, "b": 5}
            # There is nothing to cancel any more.
            held.scopes["b"].cancel("too late")
            assert held.scopes["b"].reason is None

    async def test_next_attempt_in_a_scope_begins_anew(self, public: bool) -> None:
        attempt = kind_of_loop()(current_token(), public).attempt_scope()
        assert attempt.begin(math.inf)
        attempt.set_limit(TimeLimit(InvocationTimeout, 5))
        attempt.note(OSError())
        attempt.cancel("enough")
        with pytest.raises(anyio.get_cancelled_exc_class()) as raised:
            await anyio.sleep_forever()

        assert attempt.leave(raised.value)
        assert attempt.begin(math.inf)
        assert (attempt.limit, attempt.reason, attempt.cause) == (None, None, None)
        await checkpoint()
        assert not attempt.leave()

    async def test_error_leaves_the_scope(self, public: bool) -> None:
        attempt = kind_of_loop()(current_token(), public).attempt_scope()
        assert not attempt.leave()
        attempt.begin(math.inf)
        assert not attempt.leave(OSError())
        assert attempt.scope is None


@pytest.mark.parametrize("kind", [Limiter, PublicLimiter])
@pytest.mark.parametrize("verb", ["single", "batch"])
@backends
def test_virtual_clock_does_not_jump_to_the_time_limit_of_an_attempt_that_has_ended(
    backend: str, verb: str, kind: type[Limiter]
) -> None:
    seconds = 0.0

    async def wait() -> None:
        nonlocal seconds
        start = anyio.current_time()
        try:
            await anyio.sleep_forever()
        finally:
            seconds = anyio.current_time() - start

    async def inputs() -> AsyncIterator[Invocation[None]]:
        yield Invocation("a", anyio.sleep, (1,))
        await anyio.sleep(2)
        await wait()

    async def main() -> None:
        loop = AgentLoop(limiter=kind(1))
        if verb == "batch":
            await loop.run_all(inputs())
        else:
            await loop.run_single("a", anyio.sleep, 1)
            await wait()

    with pytest.raises(VirtualClockDeadlock):
        run_scheduled(backend, None, main)

    assert seconds == 0


@pytest.mark.parametrize("kind", [Limiter, PublicLimiter])
@backends
def test_attempts_are_timed_out_on_a_real_clock(backend: str, kind: type[Limiter]) -> None:
    async def main() -> list[Status]:
        loop = AgentLoop(LoopConfig(timeout_seconds=0.1, max_retries=0), limiter=kind(2))
        results = await loop.run_all(Invocation.map(anyio.sleep, [0, 0.005, 9, 0, 9]))
        single = await loop.run_single("a", anyio.sleep, 9)
        assert (await loop.run_single("a", anyio.sleep, 0.005)).success
        return [*(result.status for result in results), single.status]

    good, late = Status.SUCCESS, Status.TIMEOUT
    assert anyio.run(main, backend=backend) == [good, good, late, good, late, late]
