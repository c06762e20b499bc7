"""The scope that times one attempt after the other out."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import anyio
import pytest

from agentloop import AgentLoop, Invocation, LoopConfig, Status, _batch, _pool
from agentloop._backend import Alarm, make_alarm, make_task_alarm
from agentloop.testing import VirtualClockDeadlock, virtual_clock


async def sleep(seconds: float) -> float:
    with anyio.CancelScope():  # one of the agent's own lies within ours
        await anyio.sleep(seconds)

    return anyio.current_effective_deadline() - anyio.current_time()


@pytest.fixture(params=["as it is", "without an alarm"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AgentLoop:
    if request.param == "without an alarm":
        monkeypatch.setattr(_pool, "make_alarm", lambda backend: None)
        monkeypatch.setattr(_batch, "make_task_alarm", lambda backend: None)

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


# --- one timer for all


def names(scopes: dict[str, anyio.CancelScope]) -> set[str]:
    return {name for name, scope in scopes.items() if scope.cancel_called}


@pytest.fixture
def alarm(anyio_backend: tuple[str, dict[str, Any]]) -> Callable[[], Alarm]:
    def make() -> Alarm:
        alarm = make_alarm(anyio.lowlevel.current_token().backend_class)
        assert alarm is not None
        return alarm

    return make


async def test_asyncio_has_timers_and_trio_needs_a_task(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    backend = anyio.lowlevel.current_token().backend_class
    assert (make_alarm(backend) is not None) is (anyio_backend[0] == "asyncio")
    assert (make_task_alarm(backend) is not None) is (anyio_backend[0] == "trio")
    assert make_alarm(object()) is None
    assert make_task_alarm(object()) is None


@pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
class TestAlarm:
    async def test_each_scope_ends_at_its_own_time(self, alarm: Callable[[], Alarm]) -> None:
        shared, start = alarm(), anyio.current_time()
        scopes = {name: anyio.CancelScope() for name in ("a", "b", "c", "dropped", "moved")}
        for seconds, (name, scope) in enumerate(scopes.items(), 1):
            assert shared.set(scope, start + seconds)
            assert scope.deadline == start + seconds, name

        assert shared.set(scopes["a"], start + 6)
        shared.drop(scopes["dropped"])
        scopes["moved"].deadline = start + 7
        seen = []
        for _ in range(8):
            await anyio.sleep_until(start + len(seen) + 0.5)
            seen.append(names(scopes))

        late = {"a", "b", "c"}
        assert seen == [set(), set(), {"b"}, {"b", "c"}, {"b", "c"}, {"b", "c"}, late, late]

    async def test_who_ends_before_others_needs_a_timer_of_its_own(self, alarm: Callable[[], Alarm]) -> None:
        shared, start = alarm(), anyio.current_time()
        late, early = anyio.CancelScope(), anyio.CancelScope()
        assert shared.set(early, start + 1)
        assert shared.set(late, start + 10)
        assert not shared.set(early, start + 5)
        assert not shared.set(anyio.CancelScope(), math.inf)
        await anyio.sleep(7)
        assert not early.cancel_called  # it was told that nobody watches it any more
        shared.drop(late)
        assert shared.set(early, start + 8)
        await anyio.sleep(2)
        assert early.cancel_called
        assert not late.cancel_called

    async def test_shorter_time_than_that_which_the_timer_waits_for_is_kept(
        self, alarm: Callable[[], Alarm], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared, start = alarm(), anyio.current_time()
        monkeypatch.setattr(shared, "_stays", True)
        gone, short = anyio.CancelScope(), anyio.CancelScope()
        assert shared.set(gone, start + 300)
        shared.drop(gone)
        assert shared.set(short, start + 5)
        await anyio.sleep(6)
        assert short.cancel_called
        await anyio.sleep(300)
        assert not gone.cancel_called

    async def test_scopes_that_do_not_show_their_deadline_are_not_trusted(self) -> None:
        class Scope(AbstractContextManager[Any]):
            deadline, _timeout_handle = math.inf, None

            def __exit__(self, *exc: object) -> None:
                pass

        class Backend:
            create_cancel_scope = Scope

        assert make_alarm(Backend) is None


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
