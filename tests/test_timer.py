"""The scope that times one attempt after the other out."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentloop import AgentLoop, Invocation, LoopConfig, Status, _pool
from agentloop._backend import can_postpone


async def sleep(seconds: float) -> float:
    with anyio.CancelScope():  # one of the agent's own lies within ours
        await anyio.sleep(seconds)

    return anyio.current_effective_deadline() - anyio.current_time()


@pytest.fixture(params=["as it is", "without postponing"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AgentLoop:
    if request.param == "without postponing":
        monkeypatch.setattr(_pool, "can_postpone", lambda scope: False)

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


# --- what is postponed


async def test_deadline_can_be_postponed_on_asyncio_and_leaves_no_timer(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    scope = anyio.CancelScope()
    assert can_postpone(scope) is (anyio_backend[0] == "asyncio")
    # A timer that was left would end the scope, or keep the clock from seeing a deadlock.
    await anyio.sleep(5000)
    assert not scope.cancel_called


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_does_not_look_at_its_deadline_again_is_not_trusted() -> None:
    class Handle:
        def when(self) -> float:
            return 0.0

        def cancel(self) -> None:
            pass

    class Scope:
        _deadline = 0.0

        def _timeout(self) -> None:
            self._timeout_handle = Handle()

    assert not can_postpone(Scope())
    assert not can_postpone(object())
