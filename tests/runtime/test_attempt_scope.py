"""The scope that times one attempt after the other out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from agentloop import AgentLoop, Backoff, Invocation, Limiter, LoopConfig, Status
from agentloop._eventloop import loop as event_loop
from agentloop._eventloop.backend import (
    DeadlineQueue,
    TaskDeadlineQueue,
    make_deadline_queue,
    make_task_deadline_queue,
)
from agentloop._limits.limiter import pool_of
from agentloop._runtime import batch
from agentloop._runtime.attempt_scope import AttemptScope
from agentloop.testing import VirtualClockDeadlock, virtual_clock


async def sleep(seconds: float) -> float:
    with anyio.CancelScope():  # one of the agent's own lies within ours
        await anyio.sleep(seconds)

    return anyio.current_effective_deadline() - anyio.current_time()


@pytest.fixture(params=["as it is", "without an alarm"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AgentLoop:
    if request.param == "without an alarm":
        monkeypatch.setattr(event_loop, "make_deadline_queue", lambda backend: None)
        monkeypatch.setattr(batch, "make_task_deadline_queue", lambda backend: None)

    return AgentLoop(LoopConfig(max_concurrency=1, timeout_seconds=5, max_retries=0))


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


async def test_time_that_a_worker_has_nothing_to_do_is_nobodys(loop: AgentLoop) -> None:
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


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_attempt_that_had_less_time_than_others_leaves_the_next_one_its_time(backend: str) -> None:
    failed = False

    async def fail_once() -> None:
        nonlocal failed
        await anyio.sleep(1 if failed else 3)
        if not failed:
            failed = True
            raise ConnectionError

    async def main() -> None:
        loop = AgentLoop(
            LoopConfig(
                max_concurrency=2,
                timeout_seconds=5,
                total_timeout_seconds=6,
                max_retries=1,
                backoff=Backoff(initial_seconds=0.25, jitter="none"),
            )
        )
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

    name, options = virtual_clock(backend)
    anyio.run(main, backend=name, backend_options=options)


# --- one timer for all


class Scopes:
    """An alarm, and scopes which tasks are in."""

    def __init__(self, alarm: DeadlineQueue) -> None:
        self.start = anyio.current_time()
        self.alarm = alarm
        self.scopes: dict[str, anyio.CancelScope] = {}
        self.ended: dict[str, float] = {}

    async def hold(self, name: str, *, task_status: TaskStatus[None]) -> None:
        with anyio.CancelScope() as self.scopes[name]:
            task_status.started()
            await anyio.sleep_forever()

        self.ended[name] = pytest.approx(anyio.current_time() - self.start)

    def set(self, name: str, seconds: float) -> None:
        self.alarm.set(self.alarm.inner(self.scopes[name]), self.start + seconds)
        assert self.scopes[name].deadline == self.start + seconds, name

    def drop(self, name: str) -> None:
        self.alarm.drop(self.alarm.inner(self.scopes[name]))

    async def times(self) -> dict[str, float]:
        """Return after how many seconds each was cancelled, if it was within twenty."""
        await anyio.sleep_until(self.start + 20)
        return dict(self.ended)


@asynccontextmanager
async def scopes(*names: str) -> AsyncIterator[Scopes]:
    backend = anyio.lowlevel.current_token().backend_class
    alarm = make_deadline_queue(backend) or make_task_deadline_queue(backend)
    assert alarm is not None
    held = Scopes(alarm)
    async with anyio.create_task_group() as group:
        if isinstance(alarm, TaskDeadlineQueue):
            group.start_soon(alarm.watch)

        for name in names:
            await group.start(held.hold, name)

        yield held
        group.cancel_scope.cancel()


async def test_asyncio_has_timers_and_trio_needs_a_task(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    backend = anyio.lowlevel.current_token().backend_class
    assert (make_deadline_queue(backend) is not None) is (anyio_backend[0] == "asyncio")
    assert (make_task_deadline_queue(backend) is not None) is (anyio_backend[0] == "trio")
    assert make_deadline_queue(object()) is None
    assert make_task_deadline_queue(object()) is None


class TestAlarm:
    async def test_each_scope_ends_at_its_own_time(self) -> None:
        async with scopes("a", "b", "c", "dropped", "moved") as held:
            for seconds, name in enumerate(held.scopes, 1):
                held.set(name, seconds)

            held.set("a", 6)
            held.drop("dropped")
            held.scopes["moved"].deadline = held.start + 7
            assert await held.times() == {"a": 6, "b": 2, "c": 3, "moved": 7}

    async def test_each_move_is_kept(self) -> None:
        async with scopes("a", "b", "c") as held:
            for name, moves in {"a": (4, 6, 8, 14), "b": (5, 5, 13), "c": (12,)}.items():
                for seconds in moves:
                    held.set(name, seconds)

            # When a is looked at, and has been moved, others are watched that end after and before it.
            assert await held.times() == {"a": 14, "b": 13, "c": 12}

    async def test_who_ends_before_others_has_a_timer_of_its_own(self) -> None:
        async with scopes("early", "late", "latest") as held:
            for name, seconds in {"early": 1, "late": 10, "latest": 11}.items():
                held.set(name, seconds)

            held.set("late", 5)
            assert await held.times() == {"early": 1, "late": 5, "latest": 11}
            held.drop("late")
            assert not held.alarm._alone

    async def test_who_had_a_timer_of_its_own_is_not_ended_at_that_time(self) -> None:
        async with scopes("moved", "other") as held:
            held.set("other", 10)
            held.set("moved", 5)
            held.set("moved", 12)
            assert await held.times() == {"moved": 12, "other": 10}

    async def test_scope_without_a_deadline_is_not_ended(self) -> None:
        async with scopes("never", "not any more", "again") as held:
            held.set("not any more", 2)
            for name in held.scopes:
                held.set(name, math.inf)

            held.set("again", 3)
            assert await held.times() == {"again": 3}

    async def test_who_comes_when_there_is_nobody_else_may_end_earlier(self) -> None:
        async with scopes("gone", "next") as held:
            held.set("gone", 10)
            held.drop("gone")
            held.set("next", 5)
            assert await held.times() == {"next": 5}

    async def test_shorter_time_than_that_which_the_timer_waits_for_is_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with scopes("gone", "short") as held:
            monkeypatch.setattr(held.alarm, "_rests", False)
            held.set("gone", 10)
            held.drop("gone")
            held.set("short", 5)
            assert await held.times() == {"short": 5}

    @pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
    async def test_scope_is_entered_again(self) -> None:
        pool = pool_of(Limiter(1))
        timer = AttemptScope(pool, pool.loop.alarm)
        with anyio.CancelScope():
            first = timer.open(anyio.current_time() + 5)
            assert not timer.close()

        # Neither the scope that was around it nor its time are left of the last time.
        await anyio.sleep(10)
        again = timer.open(anyio.current_time() + 5)
        assert again is first
        with anyio.CancelScope() as inner:
            await anyio.sleep(1)

        assert not inner.cancel_called
        with pytest.raises(anyio.get_cancelled_exc_class()) as raised:
            await anyio.sleep(8)

        assert timer.close(raised.value)
        assert timer.open(math.inf) is not first
        timer.close()

    @pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
    async def test_scope_that_is_entered_again_in_a_task_without_scopes_is_in_none(self) -> None:
        pool = pool_of(Limiter(1))
        timer = AttemptScope(pool, pool.loop.alarm)
        with anyio.CancelScope() as around:
            timer.open(anyio.current_time() + 5)
            timer.close()
            around.cancel()

        async def look() -> float:
            timer.open(anyio.current_time() + 5)
            try:
                return anyio.current_effective_deadline() - anyio.current_time()
            finally:
                timer.close()

        assert await asyncio.create_task(look()) == 5

    @pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
    @pytest.mark.parametrize("mark", ["_child_scopes", "_tasks"])
    async def test_scope_that_somebody_is_still_in_is_not_entered_again(self, mark: str) -> None:
        alarm = pool_of(Limiter(1)).loop.alarm
        assert alarm is not None
        scope: Any = anyio.CancelScope()
        getattr(scope, mark).add(object())
        alarm.keep(scope)
        assert alarm.spare == []

    async def test_scopes_that_do_not_show_their_deadline_are_not_trusted(self) -> None:
        class Scope(AbstractContextManager[Any]):
            deadline, _timeout_handle = math.inf, None

            def __exit__(self, *exc: object) -> None:
                pass

        class Backend:
            create_cancel_scope = Scope

        assert make_deadline_queue(Backend) is None

    @pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
    @pytest.mark.parametrize("once", ["as AnyIO's", "keeps something", "refuses"])
    async def test_scopes_that_are_not_as_new_once_left_are_not_entered_again(self, once: str) -> None:
        kind: Any = type(anyio.CancelScope())
        entered: list[Any] = []

        class Scope(kind):
            __slots__ = ("kept",)

            def __enter__(self) -> Any:
                if once == "keeps something":
                    self.kept = True
                elif once == "refuses" and self in entered:
                    raise RuntimeError("each is for one use")

                entered.append(self)
                return super().__enter__()

        class Backend:
            create_cancel_scope = Scope

        alarm = make_deadline_queue(Backend)
        assert alarm is not None
        alarm.keep(anyio.CancelScope())
        assert bool(alarm.spare) is (once == "as AnyIO's")


@pytest.mark.parametrize("verb", ["single", "batch"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_timer_with_nothing_to_watch_is_nothing_to_wait_for_on_a_clock_that_jumps(
    backend: str, verb: str
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
        if verb == "batch":
            await AgentLoop().run_all(inputs())
        else:
            await AgentLoop().run_single("a", anyio.sleep, 1)
            await wait()

    name, options = virtual_clock(backend)
    with pytest.raises(VirtualClockDeadlock):
        anyio.run(main, backend=name, backend_options=options)

    assert seconds == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_time_outs_come_on_a_clock_that_does_not_wait_for_them(backend: str) -> None:
    async def main() -> list[Status]:
        loop = AgentLoop(LoopConfig(max_concurrency=2, timeout_seconds=0.02, max_retries=0))
        results = await loop.run_all(Invocation.map(anyio.sleep, [0, 0.005, 9, 0, 9]))
        single = await loop.run_single("a", anyio.sleep, 9)
        assert (await loop.run_single("a", anyio.sleep, 0.005)).success
        return [*(result.status for result in results), single.status]

    good, late = Status.SUCCESS, Status.TIMEOUT
    assert anyio.run(main, backend=backend) == [good, good, late, good, late, late]
