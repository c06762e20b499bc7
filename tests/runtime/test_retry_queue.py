"""The invocations of a batch that wait to be retried, and those whose total time passes while they wait."""

from __future__ import annotations

import anyio
import pytest

from agentloop import AgentLoop, Backoff, Invocation, Limiter, LoopConfig, Status
from agentloop._batch.inputs import ASLEEP_PER_SLOT


@pytest.mark.parametrize("attempts", [1, 2, 9, 16, 17, 18, 30])
async def test_total_time_passes_in_line_however_often_an_invocation_was_retried(attempts: int) -> None:
    limiter = Limiter(1)
    config = LoopConfig(
        timeout_seconds=None,
        total_timeout_seconds=5,
        max_retries=100,
        backoff=Backoff(initial_seconds=0.1, multiplier=1, jitter="none"),
    )
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == attempts:
            # It takes the only slot during the wait for the next attempt.
            group.start_soon(AgentLoop(limiter=limiter).run_single, "b", anyio.sleep, 60)

        raise LookupError

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        [result] = await AgentLoop(config, limiter=limiter).run_all([Invocation("a", fail)])
        group.cancel_scope.cancel()

    assert (result.status, result.error) == (Status.TIMEOUT, "Timeout after 5s in total")
    assert calls == attempts
    assert anyio.current_time() - start == pytest.approx(5)


async def test_input_is_pulled_again_once_those_that_wait_have_been_retried() -> None:
    config = LoopConfig(max_concurrency=1, max_retries=100, backoff=Backoff(initial_seconds=1, jitter="none"))
    failures = 0

    async def fail_often() -> None:
        nonlocal failures
        failures += 1
        if failures <= 2 * ASLEEP_PER_SLOT:
            raise LookupError

    with anyio.fail_after(3600):
        results = await AgentLoop(config).run_all(Invocation("a", fail_often) for _ in range(20))

    assert [result.status for result in results] == [Status.SUCCESS] * 20
