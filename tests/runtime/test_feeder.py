"""The task of a batch that pulls an async input."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import pytest

from agentloop import AgentLoop, Invocation, LoopConfig, Status
from agentloop.testing import virtual_clock


@pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
async def test_feeder_that_is_cancelled_natively_while_it_waits_for_room_goes_on() -> None:
    async def inputs() -> AsyncIterator[Invocation[None]]:
        for _ in range(5):
            yield Invocation("a", anyio.sleep, (1,))

    async def cancel() -> None:
        await anyio.sleep(1.5)
        [feeder] = [task for task in asyncio.all_tasks() if task.get_name() == "agentloop feeder"]
        feeder.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        results = await AgentLoop(LoopConfig(max_concurrency=1)).run_all(inputs())

    assert [result.status for result in results] == [Status.SUCCESS] * 5
